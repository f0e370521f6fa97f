"""Where a node keeps the hot copies of a run; known to the driver too, which removes what a failed run leaves."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path

SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 - the system's shared memory; the folder in it is this user's alone


def folder_of(store_uri: str, run: str, created_at: float) -> Path:
    """The folder for a run, told from an earlier one of the same name by when it was started first."""
    identity = json.dumps([store_uri, run, created_at])
    return SHARED_MEMORY / f"lepton-ray-{os.getuid()}" / hashlib.sha256(identity.encode()).hexdigest()[:24]


def own_folder(folder: Path) -> bool:
    """Make the folder; False where shared memory is missing or somebody else's folder stands in the way."""
    try:
        folder.parent.mkdir(mode=0o700, exist_ok=True)
        about = folder.parent.lstat()
        if about.st_uid != os.getuid() or folder.parent.is_symlink():
            return False
        folder.mkdir(mode=0o700, exist_ok=True)
    except OSError:
        return False
    return True


def remove_copies(store_uri: str, run: str, created_at: float) -> None:
    """Remove the copies of a run that nobody will resume from this node's memory."""
    shutil.rmtree(folder_of(store_uri, run, created_at), ignore_errors=True)
