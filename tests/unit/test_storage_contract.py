"""What every store promises, whatever it stands on."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable

import pytest

from lepton_ray.errors import ConflictError, LeptonError, NotFoundError, UsageError
from lepton_ray.storage import Store, open_store

WRITERS = 8


def rounds(store: Store) -> int:
    """How often a race is run: the S3 server makes losers wait for a second or two."""
    return 50 if store.uri.startswith("file") else 2


def race(act: Callable[[int], object], threads: int = WRITERS) -> list[object]:
    """What `act(0)` to `act(threads - 1)` return, or the error they raise, when all start together."""
    results: list[object] = [None] * threads
    barrier = threading.Barrier(threads)

    def run(index: int) -> None:
        barrier.wait(timeout=10)
        try:
            results[index] = act(index)
        except LeptonError as error:
            results[index] = error

    workers = [threading.Thread(target=run, args=(index,)) for index in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(timeout=60)
    return results


def test_object_comes_back_as_put(store: Store):
    """Bytes and etag of `fetch` are those of the last `put`, and each content has its own etag."""
    first = store.put("a/b.json", b"one")
    second = store.put("a/b.json", b"\x00two")
    fetched = store.fetch("a/b.json")
    assert (store.get("a/b.json"), fetched.data, fetched.etag) == (b"\x00two", b"\x00two", second)
    assert first != second
    assert store.exists("a/b.json")


def test_empty_object_is_an_object(store: Store):
    store.put("empty", b"")
    assert store.get("empty") == b""
    assert [(entry.key, entry.size) for entry in store.list("")] == [("empty", 0)]


def test_missing_object_is_named(store: Store):
    """A folder, too, is not an object."""
    store.put("a/b", b"x")
    for key in ("a", "a/c", "a/b/c"):
        with pytest.raises(NotFoundError, match=key):
            store.get(key)
        assert not store.exists(key)


def test_put_if_absent_keeps_what_is_there(store: Store):
    store.put_if_absent("claim", b"mine")
    with pytest.raises(ConflictError, match="claim"):
        store.put_if_absent("claim", b"yours")
    with pytest.raises(ConflictError, match="claim"):
        store.put_if_absent("claim", b"mine")  # equal content is no excuse
    assert store.get("claim") == b"mine"


def test_replace_needs_the_current_etag(store: Store):
    old = store.put("record", b"1")
    new = store.replace("record", b"2", old)
    with pytest.raises(ConflictError, match="record"):
        store.replace("record", b"3", old)
    assert store.get("record") == b"2"
    store.replace("record", b"4", new)
    assert store.get("record") == b"4"


def test_replace_never_creates(store: Store):
    etag = store.put("record", b"1")
    store.delete("record")
    with pytest.raises(ConflictError, match="record"):
        store.replace("record", b"2", etag)
    assert not store.exists("record")


def test_put_if_absent_race_has_one_winner(store: Store):
    """Of eight threads that claim one key together, one succeeds and the object is its."""
    for round_ in range(rounds(store)):
        results = race(lambda index, key=f"claims/{round_}": store.put_if_absent(key, b"%d" % index))
        winners = [index for index, result in enumerate(results) if isinstance(result, str)]
        assert len(winners) == 1
        assert sum(isinstance(result, ConflictError) for result in results) == WRITERS - 1
        assert store.get(f"claims/{round_}") == b"%d" % winners[0]


def test_replace_race_has_one_winner(store: Store):
    """Of eight threads that read one etag and replace, one succeeds."""
    etag = store.put("record", b"start")
    for round_ in range(rounds(store)):
        results = race(lambda index, tag=etag, r=round_: store.replace("record", b"%d-%d" % (r, index), tag))
        winners = [index for index, result in enumerate(results) if isinstance(result, str)]
        assert len(winners) == 1
        assert store.get("record") == b"%d-%d" % (round_, winners[0])
        etag = store.fetch("record").etag


def test_list_is_recursive_and_sorted(store: Store):
    """`runs/a` means that folder: neither the object of that name nor `runs/ab`."""
    for key in ("runs/ab/x", "runs/a/2", "runs/a/10/deep", "runs/a.json", "top"):
        store.put(key, key.encode())
    assert [entry.key for entry in store.list("runs/a")] == ["runs/a/10/deep", "runs/a/2"]
    assert [entry.key for entry in store.list("runs/a/")] == ["runs/a/10/deep", "runs/a/2"]
    everything = ["runs/a.json", "runs/a/10/deep", "runs/a/2", "runs/ab/x", "top"]
    assert [(entry.key, entry.size) for entry in store.list("")] == [(key, len(key)) for key in everything]
    assert store.list("nothing/here") == []
    assert store.list("top") == []


def test_list_names_shows_one_level(store: Store):
    for key in ("models/digits/versions/1/manifest.json", "models/other/x", "models/readme"):
        store.put(key, b"x")
    assert store.list_names("models") == ["digits", "other", "readme"]
    assert store.list_names("") == ["models"]
    assert store.list_names("models/none") == []


def test_delete_of_missing_object_is_fine(store: Store):
    store.put("a/b/c", b"x")
    store.delete("a/b/c")
    store.delete("a/b/c")
    store.delete("a/b/c/d")
    assert not store.exists("a/b/c")
    assert store.list("") == []


def test_folder_emptied_by_delete_is_not_shown(file_store: Store):
    file_store.put("a/b/c", b"x")
    file_store.delete("a/b/c")
    assert file_store.list_names("a") == []
    assert file_store.list_names("") == []


def test_delete_prefix_removes_that_folder_only(store: Store):
    for key in ("runs/a/1", "runs/a/b/2", "runs/ab/3", "runs/a.json"):
        store.put(key, b"x")
    assert store.delete_prefix("runs/a") == 2
    assert store.list_names("runs") == ["a.json", "ab"]
    assert [entry.key for entry in store.list("")] == ["runs/a.json", "runs/ab/3"]
    assert store.delete_prefix("runs/a") == 0
    with pytest.raises(UsageError):
        store.delete_prefix("")


def test_check_writable_leaves_nothing_visible(store: Store):
    store.check_writable()
    store.check_writable()
    assert store.list("") == []
    assert store.list_names("") == []


@pytest.mark.parametrize(
    "key",
    [
        *["", "/a", "a/", "a//b", ".", "a/./b", "../a", "a/../../b", "a\\b", "a\nb", "a\x00", "\u202ea", "x" * 1025],
        *["a/" + "x" * 256, ".lepton/lock-00", "a/.lepton-tmp-1", "\ud800"],
    ],
)
def test_bad_keys_are_refused(file_store: Store, key: str):
    """In every call, before anything is touched; the message stays one printable line."""
    calls: list[Callable[[], object]] = [
        lambda: file_store.get(key),
        lambda: file_store.put(key, b"x"),
        lambda: file_store.put_if_absent(key, b"x"),
        lambda: file_store.replace(key, b"x", "etag"),
        lambda: file_store.exists(key),
        lambda: file_store.delete(key),
    ]
    for call in calls:
        with pytest.raises(UsageError) as caught:
            call()
        assert str(caught.value).isprintable()
    assert file_store.list("") == []


def test_copied_store_opens_anew(store: Store):
    """Copying (and so sending to another process) takes the URI along, nothing else."""
    store.put("a", b"x")
    assert store.__reduce__() == (open_store, (store.uri,))
    assert copy.copy(store).get("a") == b"x"
