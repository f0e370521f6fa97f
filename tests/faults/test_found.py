"""What the harness found, each at the very place where it was: see README.md."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from faulty_store import Deed, FaultyStore

from lepton_ray.errors import IntegrityError, RefusedError
from lepton_ray.storage import Store
from lepton_ray.training.checkpoints import CheckpointStore
from lepton_ray.training.lease import RunLease, lease_key

RUN = "found"


def files(words: str) -> dict[str, bytes]:
    return {"model.safetensors": words.encode() * 40}


def taken(store: Store) -> CheckpointStore:
    """The checkpoints of a new attempt."""
    lease = RunLease.acquire(store, RUN)
    lease.release()
    return CheckpointStore(store, RUN, lease.attempt)


def at_write(number: int, act: Callable[[], object]) -> Callable[[bool, str], Deed]:
    """Something happens just before the n-th write (from 0) of whoever uses the store."""
    seen = [0]

    def decide(writes: bool, _key: str) -> Deed:
        if writes:
            seen[0] += 1
            if seen[0] == number + 1:
                act()
        return "pass"

    return decide


def damage(store: Store, checkpoints: CheckpointStore, step: int) -> None:
    """The model's file of a step is cut."""
    entry = checkpoints.manifest(step)["files"]["model.safetensors"]
    store.put(f"{checkpoints.folder(step)}/{entry['path']}", b"cut")


def test_a_repair_is_not_overwritten(file_store: Store) -> None:
    """Two find step 10 damaged; the slower one finds it repaired and leaves it, though it had seen the damage."""
    good = taken(file_store)
    good.save(10, files("first"), {})
    damage(file_store, good, 10)
    repair = at_write(2, lambda: good.save(10, files("repaired"), {}))  # file, manifest (refused), its replacement
    slow = CheckpointStore(FaultyStore(file_store, repair), RUN, 1)
    slow.save(10, files("late"), {})
    assert good.load(10).files == files("repaired")


def test_who_was_taken_over_in_a_commit_is_told(file_store: Store) -> None:
    """The new driver may have removed the files as orphans: the commit must not be acknowledged."""
    taken(file_store)
    zombie = CheckpointStore(FaultyStore(file_store, at_write(1, lambda: taken(file_store).collect_orphans())), RUN, 1)
    with pytest.raises(RefusedError, match="taken over"):
        zombie.save(10, files("late"), {})
    found = CheckpointStore(file_store, RUN, 2).newest()
    assert found is not None
    assert found.files == {}


def test_retention_of_who_was_taken_over_deletes_nothing(file_store: Store) -> None:
    old = taken(file_store)
    for step in (10, 20, 30):
        old.save(step, files(str(step)), {})
    taken(file_store)
    with pytest.raises(RefusedError, match="taken over"):
        old.retain(1)
    assert old.steps() == [10, 20, 30]


def test_retention_counts_what_can_be_read(file_store: Store) -> None:
    """Both newer ones are damaged, one by size and one by content: the only good one stays."""
    checkpoints = taken(file_store)
    for step in (10, 20, 30):
        checkpoints.save(step, files(str(step)), {})
    damage(file_store, checkpoints, 20)
    entry = checkpoints.manifest(30)["files"]["model.safetensors"]
    file_store.put(f"{checkpoints.folder(30)}/{entry['path']}", b"x" * entry["size"])
    assert taken(file_store).retain(2) == []
    assert checkpoints.load(10).files == files("10")


def test_retention_frozen_on_its_way_leaves_what_came_after(file_store: Store) -> None:
    """Step 10 is committed anew while its old files are being deleted: the new ones stay."""
    old = taken(file_store)
    for step in (10, 20):
        old.save(step, files(str(step)), {})
    new: list[CheckpointStore] = []

    def take_over() -> None:
        new.append(taken(file_store))
        new[0].save(10, files("anew"), {})

    frozen = CheckpointStore(FaultyStore(file_store, at_write(1, take_over)), RUN, 1)  # after the manifest is deleted
    assert frozen.retain(1) == [10]
    assert new[0].load(10).files == files("anew")


def test_a_commit_says_what_stands(file_store: Store) -> None:
    """Committed again, a step keeps its content, and the caller is told which that is."""
    checkpoints = taken(file_store)
    first = checkpoints.commit(10, checkpoints.write(10, files("first")), {})
    assert checkpoints.commit(10, checkpoints.write(10, files("second")), {}) == first


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b'{"attempt": "x"}', b"\xff"])
def test_a_damaged_lease_is_told_as_such(file_store: Store, data: bytes) -> None:
    """By who wants the run, and by who commits; the message says what to do."""
    checkpoints = taken(file_store)
    file_store.put(lease_key(RUN), data)
    for act in (lambda: RunLease.acquire(file_store, RUN), lambda: checkpoints.save(10, files("x"), {})):
        with pytest.raises(IntegrityError, match=r"lease.json is damaged .*then delete it"):
            act()
