"""No file of the package, the jobs or the scripts loads formats that run code, starts a shell or unpacks blindly."""

from __future__ import annotations

from pathlib import Path

import pytest
from code_rules import Finding, findings

ROOT = Path(__file__).parents[2]
SOURCES = sorted(path for folder in ("lepton_ray", "jobs", "scripts") for path in (ROOT / folder).rglob("*.py"))

PLANTED = [
    ("pickle", "import pickle"),
    ("pickle", "import cloudpickle as c"),
    ("pickle", "from joblib import load"),
    ("pickle", "import dill"),
    ("pickle", "import marshal"),
    ("pickle", "def f():\n    import shelve"),
    ("pickle", "from ray import cloudpickle"),
    ("pickle", "import importlib\nimportlib.import_module('pickle')"),
    ("pickle", "__import__('_pickle')"),
    ("torch.load", "import torch\ntorch.load('x')"),
    ("torch.load", "import torch\ntorch.load('x', weights_only=True)"),
    ("torch.load", "import torch as t\nt.load('x')"),
    ("torch.load", "from torch import load as fetch\nfetch('x')"),
    ("torch.jit.load", "import torch.jit\ntorch.jit.load('x')"),
    ("torch.jit.load", "from torch import jit\njit.load('x')"),
    ("torch.export.load", "import torch\ntorch.export.load('x')"),
    ("yaml.load", "import yaml\nyaml.load(text)"),
    ("yaml.load", "import yaml\nyaml.load(text, Loader=yaml.Loader)"),
    ("yaml.load", "import yaml\nyaml.load(text, yaml.FullLoader)"),
    ("yaml.load", "from yaml import load_all\nload_all(text, Loader=L)"),
    ("yaml.load", "import yaml\nyaml.unsafe_load(text)"),
    ("eval", "eval('1')"),
    ("exec", "exec('1')"),
    ("exec", "import builtins\nbuiltins.exec('1')"),
    ("shell", "import subprocess\nsubprocess.run('ls', shell=True)"),
    ("shell", "from subprocess import Popen\nPopen('ls', shell=flag)"),
    ("shell", "import os\nos.system('ls')"),
    ("allow_pickle", "import numpy as np\nnp.load('x', allow_pickle=True)"),
    ("extractall", "archive.extractall('x')"),
    ("extractall", "archive.extractall('x', filter='fully_trusted')"),
    ("extractall", "import shutil\nshutil.unpack_archive('x', 'y')"),
]
ALLOWED = [
    "import yaml\nyaml.load(text, Loader=StrictLoader)",
    "import yaml\nfrom lepton_ray.settings.loading import StrictLoader as S\nyaml.load(text, Loader=S)",
    "import json\njson.load(file)",
    "from safetensors.torch import load\nload(data)",
    "import numpy as np\nnp.load('x', allow_pickle=False)",
    "archive.extractall('x', filter='data')",
    "import subprocess\nsubprocess.run(['ls'], shell=False)",
    "import os\nos.execv('x', [])",
    "model.eval()",
]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_file_is_safe(path: Path) -> None:
    """Each source file, by itself."""
    assert findings(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(("rule", "snippet"), PLANTED)
def test_planted_fault_is_found(rule: str, snippet: str) -> None:
    """The rule sees what it is for, on the line where it stands."""
    assert Finding(rule, len(snippet.splitlines())) in findings(snippet)


@pytest.mark.parametrize("snippet", ALLOWED)
def test_safe_form_is_allowed(snippet: str) -> None:
    """The safe way to do the same is not refused."""
    assert findings(snippet) == []


def test_all_rooms_are_looked_at() -> None:
    """The list of sources is not empty by mistake."""
    assert len(SOURCES) > 20
    assert {path.parts[len(ROOT.parts)] for path in SOURCES} == {"lepton_ray", "jobs", "scripts"}
