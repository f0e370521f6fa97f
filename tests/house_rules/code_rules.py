"""What no file of the package may do, found in its syntax tree: formats that run code, shells, unbounded unpacking."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass

CODE_CARRYING = {"pickle", "_pickle", "cloudpickle", "joblib", "dill", "marshal", "shelve", "jsonpickle"}
"""Modules whose loaders run what they read."""
BANNED_CALLS = {
    "torch.load": "torch.load",
    "torch.jit.load": "torch.jit.load",
    "torch.export.load": "torch.export.load",
    "torch.hub.load": "torch.hub.load",
    "numpy.lib.format.open_memmap": "allow_pickle",
    "pandas.read_pickle": "pickle",
    "eval": "eval",
    "exec": "exec",
    "builtins.eval": "eval",
    "builtins.exec": "exec",
    "os.system": "shell",
    "os.popen": "shell",
    "subprocess.getoutput": "shell",
    "subprocess.getstatusoutput": "shell",
    "yaml.unsafe_load": "yaml.load",
    "yaml.unsafe_load_all": "yaml.load",
    "yaml.full_load": "yaml.load",
    "yaml.full_load_all": "yaml.load",
}
"""Dotted name of a call -> the rule it breaks."""


@dataclass(frozen=True)
class Finding:
    """A rule that is broken on a line."""

    rule: str
    line: int


def findings(source: str) -> list[Finding]:
    """Every broken rule of a Python source, in the order of the lines."""
    tree = ast.parse(source)
    names = imported_names(tree)
    found = [finding for node in ast.walk(tree) for finding in (*import_findings(node), *call_findings(node, names))]
    return sorted(set(found), key=lambda finding: (finding.line, finding.rule))


def imported_names(tree: ast.AST) -> dict[str, str]:
    """Local name -> the dotted name it stands for, over all imports of a file."""
    names: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                local = alias.asname or alias.name.split(".")[0]
                names[local] = alias.name if alias.asname else local
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            for alias in node.names:
                names[alias.asname or alias.name] = f"{node.module}.{alias.name}"
    return names


def import_findings(node: ast.AST) -> Iterator[Finding]:
    """Imports of code-carrying modules, also as part of another package (`ray.cloudpickle`)."""
    modules: list[str] = []
    if isinstance(node, ast.Import):
        modules = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
        modules = [node.module or "", *(alias.name for alias in node.names)]
    for module in modules:
        if CODE_CARRYING & set(module.split(".")):
            yield Finding("pickle", node.lineno)  # type: ignore[attr-defined]


def call_findings(node: ast.AST, names: dict[str, str]) -> Iterator[Finding]:
    """Calls that are banned by name or by an argument."""
    if not isinstance(node, ast.Call):
        return
    called = dotted(node.func, names)
    keywords = {keyword.arg: keyword.value for keyword in node.keywords if keyword.arg}
    if called in BANNED_CALLS:
        yield Finding(BANNED_CALLS[called], node.lineno)
    if called in ("yaml.load", "yaml.load_all"):
        loader = keywords.get("Loader", node.args[1] if len(node.args) > 1 else None)
        if loader is None or dotted(loader, names).split(".")[-1] != "StrictLoader":
            yield Finding("yaml.load", node.lineno)
    first = node.args[0] if node.args else None
    imported = str(first.value).split(".") if isinstance(first, ast.Constant) else []
    if called in ("importlib.import_module", "__import__") and CODE_CARRYING & set(imported):
        yield Finding("pickle", node.lineno)
    for keyword, rule in (("shell", "shell"), ("allow_pickle", "allow_pickle")):
        if keyword in keywords and not is_literal(keywords[keyword], value=False):
            yield Finding(rule, node.lineno)
    unpacks = called.split(".")[-1] in ("extractall", "unpack_archive")
    if unpacks and not is_literal(keywords.get("filter"), value="data"):
        yield Finding("extractall", node.lineno)


def dotted(node: ast.AST | None, names: dict[str, str]) -> str:
    """`t.jit.load` as `torch.jit.load` where `t` was imported so; the last part alone for what is no plain name."""
    parts: list[str] = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    if isinstance(node, ast.Name):
        parts.append(names.get(node.id, node.id))
    else:
        parts.append("")
    return ".".join(reversed(parts))


def is_literal(node: ast.AST | None, *, value: object) -> bool:
    """Whether a node is this constant, written out."""
    return isinstance(node, ast.Constant) and node.value == value
