"""What a store on a disk does with links, pipes, full disks and killed writers."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lepton_ray.errors import LeptonError, NotFoundError, RefusedError, UnavailableError, UsageError
from lepton_ray.storage import Store, open_store

STUCK_WRITER = """
import os, pathlib, sys, threading
from lepton_ray.storage import open_store

def stuck(*_):
    print("written", flush=True)
    threading.Event().wait(60)

uri, method, *etag = sys.argv[1:]
if etag:
    pathlib.Path.replace = stuck
else:
    os.fsync = stuck
getattr(open_store(uri), method)("runs/a/model", b"new" * 100_000, *etag)
"""


def folder_of(store: Store) -> Path:
    """Where a file store lies."""
    return Path(store.uri.removeprefix("file://"))


def kill_writer(*arguments: str) -> None:
    """Start a writer that stops between writing and committing, and SIGKILL it there."""
    writer = subprocess.Popen([sys.executable, "-c", STUCK_WRITER, *arguments], stdout=subprocess.PIPE, text=True)
    with writer:
        assert writer.stdout is not None
        assert writer.stdout.readline() == "written\n"
        writer.kill()
        writer.wait(timeout=10)


@pytest.mark.parametrize("method", ["put", "put_if_absent"])
def test_killed_writer_leaves_nothing_visible(file_store: Store, method: str):
    """SIGKILL after the bytes are written and before they are committed: no object, and the next writer succeeds."""
    file_store.put("runs/a/other", b"x")
    kill_writer(file_store.uri, method)
    left = [path.name for path in (folder_of(file_store) / "runs/a").iterdir()]
    assert len(left) == 2, "the test wants a leftover, or it proves nothing"
    assert [entry.key for entry in file_store.list("")] == ["runs/a/other"]
    assert file_store.list_names("runs/a") == ["other"]
    with pytest.raises(NotFoundError):
        file_store.get("runs/a/model")
    file_store.put_if_absent("runs/a/model", b"whole")
    assert file_store.get("runs/a/model") == b"whole"
    assert file_store.delete_prefix("runs/a") == 2
    assert not (folder_of(file_store) / "runs/a").exists()


def test_killed_replacer_keeps_old_and_frees_lock(file_store: Store):
    """SIGKILL while it holds the key's lock: the lock is gone with the process."""
    etag = file_store.put("runs/a/model", b"old")
    kill_writer(file_store.uri, "replace", etag)
    assert file_store.get("runs/a/model") == b"old"
    file_store.replace("runs/a/model", b"next", etag)
    assert file_store.get("runs/a/model") == b"next"


def test_full_disk_keeps_old_object(file_store: Store, monkeypatch: pytest.MonkeyPatch):
    """The error names the store, and no temporary file stays."""
    file_store.put("a/b", b"old")

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(LeptonError, match="disk is full") as caught:
        file_store.put("a/b", b"new")
    assert file_store.uri in str(caught.value)
    assert file_store.get("a/b") == b"old"
    assert [path.name for path in (folder_of(file_store) / "a").iterdir()] == ["b"]


@pytest.mark.parametrize(
    ("code", "kind"), [(errno.EROFS, UsageError), (errno.EACCES, UsageError), (errno.EIO, UnavailableError)]
)
def test_refused_link_becomes_one_line(
    file_store: Store, monkeypatch: pytest.MonkeyPatch, code: int, kind: type[LeptonError]
):
    def refused(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "link", refused)
    for call in (file_store.check_writable, lambda: file_store.put_if_absent("a", b"x")):
        with pytest.raises(kind, match=file_store.uri):
            call()
    assert file_store.list("") == []


def test_unwritable_store_is_named(tmp_path: Path):
    """A file where the store should be, on the way to it, or a place where nobody may make a folder: exit code 2."""
    (tmp_path / "file").write_text("x")
    for place in (tmp_path / "file", tmp_path / "file" / "store", Path("/proc/store")):
        store = open_store(str(place))
        with pytest.raises(UsageError, match=store.uri):
            store.check_writable()


def test_links_out_of_the_store_are_refused(file_store: Store, tmp_path: Path):
    """Reading, writing and listing stay inside, whether a file or a folder is linked."""
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "secret").write_text("secret")
    file_store.put("a/b", b"x")
    (folder_of(file_store) / "a/file").symlink_to(outside / "secret")
    (folder_of(file_store) / "a/folder").symlink_to(outside)
    for key in ("a/file", "a/folder/secret"):
        with pytest.raises(RefusedError, match=key):
            file_store.get(key)
        with pytest.raises(RefusedError, match=key):
            file_store.put(key, b"overwritten")
    assert [entry.key for entry in file_store.list("")] == ["a/b"]
    assert file_store.list_names("a") == ["b"]
    file_store.delete_prefix("a")
    assert (outside / "secret").read_text() == "secret"


def test_links_within_the_store_work(file_store: Store):
    file_store.put("a/b", b"x")
    (folder_of(file_store) / "a/again").symlink_to("b")
    (folder_of(file_store) / "a/loop").symlink_to("loop")
    assert file_store.get("a/again") == b"x"
    assert [entry.key for entry in file_store.list("")] == ["a/again", "a/b"]


def test_store_behind_a_link_works(tmp_path: Path):
    """The store's own folder may be a link, as with mounted volumes."""
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    store = open_store(str(tmp_path / "link"))
    store.put("a/b", b"x")
    assert store.get("a/b") == b"x"
    assert [entry.key for entry in store.list("")] == ["a/b"]


def test_pipe_does_not_hang_the_reader(file_store: Store):
    file_store.put("a", b"x")
    os.mkfifo(folder_of(file_store) / "pipe")
    with pytest.raises(NotFoundError):
        file_store.get("pipe")
    assert [entry.key for entry in file_store.list("")] == ["a"]


def test_folder_and_file_do_not_mix(file_store: Store):
    file_store.put("a/b", b"x")
    with pytest.raises(UsageError, match="'a'"):
        file_store.put("a", b"x")
    with pytest.raises(UsageError, match="'a/b/c'"):
        file_store.put("a/b/c", b"x")
    assert file_store.get("a/b") == b"x"


@pytest.mark.parametrize("method", ["put", "put_if_absent"])
def test_write_survives_deletion_of_its_folder(file_store: Store, monkeypatch: pytest.MonkeyPatch, method: str):
    """The folder goes between writing and committing: the write is begun anew and succeeds."""
    file_store.put("runs/a/other", b"x")
    real, deletions = os.fsync, []

    def deleting(file: int) -> None:
        real(file)
        if not deletions:
            deletions.append("begun")
            deletions.append(file_store.delete_prefix("runs/a"))

    monkeypatch.setattr(os, "fsync", deleting)
    getattr(file_store, method)("runs/a/b", b"y")
    assert deletions == ["begun", 1]
    assert [entry.key for entry in file_store.list("")] == ["runs/a/b"]


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(key=st.text(alphabet=st.sampled_from("ab./\\ \x00\n-_%~$é😀"), max_size=12))
def test_any_key_is_refused_or_stays_inside(file_store: Store, key: str):
    """Either a UsageError, or the object is found under this very key and lies in the store's folder."""
    try:
        file_store.put(key, b"x")
    except UsageError:
        return
    assert [entry.key for entry in file_store.list("")] == [key]
    assert (folder_of(file_store) / key).resolve().is_relative_to(folder_of(file_store).resolve())
    file_store.delete(key)
