"""Imports go down only, and each library has its door: the contracts hold, and each one sees a planted violation."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CONTRACTS = [
    contract["name"]
    for contract in tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
]
PLANTED = {
    "Rooms import downward only, and neighbours on one floor do not know each other": (
        ("lepton_ray/storage/planted.py", "import lepton_ray.cli.output\n"),
        ("lepton_ray/registry/planted.py", "from lepton_ray.monitoring import planted_too\n"),
        ("lepton_ray/training/planted.py", "from lepton_ray.orchestrator import decision\n"),
    ),
    "Settings, errors and decisions load without heavy libraries": (
        ("lepton_ray/settings/planted.py", "import torch\n"),
        ("lepton_ray/training/failure_policy.py", "import ray\n"),
    ),
    "Prometheus has one door: monitoring": (("lepton_ray/tasks/planted.py", "import prometheus_client\n"),),
    "Delta Lake has one door: data": (("lepton_ray/registry/planted.py", "def f():\n    import deltalake\n"),),
    "S3 has one door: storage": (("lepton_ray/data/planted.py", "from s3fs import S3FileSystem\n"),),
}
"""Contract -> (file, bad line) that it must find."""


def lint_imports(folder: Path) -> str:
    """What `lint-imports` says about the package in a folder."""
    program = Path(sys.executable).parent / "lint-imports"
    done = subprocess.run(
        [str(program), "--no-cache"],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(folder), "COLUMNS": "200"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode in (0, 1), done.stdout + done.stderr
    return done.stdout + done.stderr


def broken(report: str) -> set[str]:
    """Names of the contracts that a report calls broken."""
    return {name for name in CONTRACTS if f"{name} BROKEN" in report}


def test_contracts_hold() -> None:
    """The package as it is."""
    report = lint_imports(ROOT)
    assert broken(report) == set(), report
    assert f"{len(CONTRACTS)} kept, 0 broken" in report


def test_each_contract_has_its_planted_violation() -> None:
    """A new contract needs a proof that it sees something."""
    assert set(PLANTED) == set(CONTRACTS)


@pytest.mark.parametrize(
    ("contract", "file", "line"), [(name, *item) for name, items in PLANTED.items() for item in items]
)
def test_planted_import_is_found(tmp_path: Path, contract: str, file: str, line: str) -> None:
    """In a copy of the package one bad import breaks its contract and is named."""
    for folder in ("lepton_ray", "jobs"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    (tmp_path / "lepton_ray" / "monitoring" / "planted_too.py").touch()
    (tmp_path / file).write_text(line)
    report = lint_imports(tmp_path)
    assert contract in broken(report)
    assert file.removesuffix(".py").replace("/", ".") in report
