"""Files in git name no package registry and no path of the machine they were written on."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# put together here, so that this file does not hold what it looks for
HOSTS = [
    ".".join(parts)
    for parts in (
        ("pypi", "org"),
        ("pythonhosted", "org"),
        ("npmjs", "org"),
        ("npmjs", "com"),
        ("crates", "io"),
        ("proxy", "golang", "org"),
        ("sum", "golang", "org"),
        ("deb", "debian", "org"),
        ("maven", "apache", "org"),
        ("repo1", "maven", "org"),
    )
]
FOLDERS = [str(ROOT), str(Path.home())]
FORBIDDEN = re.compile(
    "|".join([*map(re.escape, HOSTS), *(rf"(?<![\w.-]){re.escape(folder)}(?=[/\s\"'`]|$)" for folder in FOLDERS)])
)


def named(text: str) -> list[str]:
    """Forbidden hosts and paths in a text."""
    return FORBIDDEN.findall(text)


def test_no_registry_and_no_path_of_a_machine() -> None:
    """Neither in the text of a file nor in the target of a link."""
    listed = ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listed, capture_output=True, text=True, timeout=30, check=True).stdout.split("\0")
    paths = [ROOT / name for name in names if name]
    assert len(paths) > 50
    bad = []
    for path in paths:
        if path.is_symlink():
            text = str(path.readlink())
        elif path.is_file():
            text = path.read_bytes().decode("utf-8", "replace")
        else:
            continue  # deleted in the work tree
        bad += [f"{path.relative_to(ROOT)}: {found}" for found in named(text)]
    assert bad == []


@pytest.mark.parametrize(
    "text", [f"https://{HOSTS[0]}/simple", f"see files.{HOSTS[1]}", f"cd {FOLDERS[0]}", f'"{FOLDERS[1]}/x"']
)
def test_planted_name_is_found(text: str) -> None:
    """Hosts and paths are seen in the middle of a line."""
    assert len(named(text)) == 1


@pytest.mark.parametrize(
    "text", ["framework/mainly", "the root/leaf", f"s3://bucket{FOLDERS[1]}/x", "from PyPI", f"{FOLDERS[1]}x"]
)
def test_other_words_are_left_alone(text: str) -> None:
    """What only looks alike is no finding."""
    assert named(text) == []
