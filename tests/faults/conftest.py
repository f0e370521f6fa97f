"""Where the fault tests work, and the table that they fill."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from results import Table


@pytest.fixture(scope="session")
def table() -> Iterator[Table]:
    """Where tests enter their figures; written at the end where the environment names a file."""
    made = Table()
    yield made
    made.write()


@pytest.fixture
def fast_folder() -> Iterator[Path]:
    """A fresh folder in memory where the machine has that, since hundreds of scenarios wait for no disk."""
    memory = Path("/dev/shm")  # noqa: S108 - Linux's own; the folder in it is ours alone
    made = Path(tempfile.mkdtemp(prefix="lepton-faults-", dir=memory if os.access(memory, os.W_OK) else None))
    yield made
    shutil.rmtree(made, ignore_errors=True)
