"""The shape of the house: rooms that say what they hold, files one can read, names that mean something."""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).parents[2]
LONGEST_FILE = 400
LONGEST_JOB = 40
VAGUE = {"util", "utils", "helper", "helpers", "common", "misc", "constants", "shared", "types", "stuff", "base"}


def rooms_without_rules(package: Path) -> list[str]:
    """Rooms whose docstring does not say what they hold (`Holds:`) and what never goes in them (`Never:`)."""
    bad = []
    for folder in sorted(path for path in package.iterdir() if path.is_dir() and path.name != "__pycache__"):
        door = folder / "__init__.py"
        text = ast.get_docstring(ast.parse(door.read_text(encoding="utf-8"))) if door.is_file() else None
        if not text or "\nHolds: " not in text or "\nNever: " not in text:
            bad.append(folder.name)
    return bad


def long_files(folder: Path, limit: int) -> list[str]:
    """Python files under a folder with more lines than the limit."""
    files = sorted(folder.rglob("*.py"))
    return [path.name for path in files if len(path.read_text(encoding="utf-8").splitlines()) > limit]


def vague_names(folder: Path) -> list[str]:
    """Modules and packages whose name says nothing."""
    return sorted(path.name for path in folder.rglob("*") if path.stem in VAGUE and path.suffix in ("", ".py"))


def test_rooms_say_what_they_hold() -> None:
    """Whoever reads only these docstrings knows the house."""
    assert rooms_without_rules(ROOT / "lepton_ray") == []


def test_files_can_be_read_in_one_go() -> None:
    """400 lines at most in the package, 40 in a job's entry point."""
    assert long_files(ROOT / "lepton_ray", LONGEST_FILE) == []
    assert long_files(ROOT / "jobs", LONGEST_JOB) == []


def test_names_mean_something() -> None:
    """No module for whatever fits nowhere else."""
    for folder in ("lepton_ray", "jobs", "scripts", "benchmarks", "tests"):
        assert vague_names(ROOT / folder) == [], folder


def test_planted_faults_are_found(tmp_path: Path) -> None:
    """Each of the three checks sees a fault of its kind."""
    room = tmp_path / "room"
    room.mkdir()
    (room / "__init__.py").write_text('"""A room.\n\nHolds: things.\n"""\n')
    (room / "helpers.py").write_text("x = 1\n" * 401)
    assert rooms_without_rules(tmp_path) == ["room"]
    assert long_files(tmp_path, LONGEST_FILE) == ["helpers.py"]
    assert vague_names(tmp_path) == ["helpers.py"]
    (room / "__init__.py").write_text('"""A room.\n\nHolds: things.\nNever: others.\n"""\n')
    assert rooms_without_rules(tmp_path) == []
