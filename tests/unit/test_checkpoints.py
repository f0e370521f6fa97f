"""Verified checkpoints: what is torn, short, flipped or uncommitted is never restored, and never lost silently."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from lepton_ray.errors import RefusedError, UnavailableError
from lepton_ray.storage import Store
from lepton_ray.training.checkpoints import CheckpointStore, weights_digest
from lepton_ray.training.lease import RunLease

FILES = {"model.safetensors": b"m" * 500, "optimizer.safetensors": b"o" * 900, "state.json": b'{"step": 1}'}


def files_of(step: int) -> dict[str, bytes]:
    return {name: data + str(step).encode() for name, data in FILES.items()}


@pytest.fixture
def checkpoints(store: Store) -> CheckpointStore:
    lease = RunLease.acquire(store, "run")
    lease.release()
    made = CheckpointStore(store, "run", lease.attempt)
    for step in (10, 20, 30):
        made.save(step, files_of(step), {"world_size": 2})
    return made


def data_keys(store: Store, checkpoints: CheckpointStore, step: int) -> list[str]:
    return [entry.key for entry in store.list(checkpoints.folder(step)) if not entry.key.endswith("manifest.json")]


def test_the_newest_checkpoint_comes_back_byte_for_byte(checkpoints: CheckpointStore) -> None:
    found = checkpoints.newest()
    assert found is not None
    assert (found.step, found.files, found.skipped) == (30, files_of(30), [])
    assert found.manifest["world_size"] == 2


def test_a_new_run_has_no_checkpoint(file_store: Store) -> None:
    assert CheckpointStore(file_store, "fresh", 1).newest() is None


def test_every_flipped_bit_is_found_and_passed_over(store: Store, checkpoints: CheckpointStore) -> None:
    """One bit, anywhere in any file of the newest checkpoint or in its manifest: the one before is used."""
    draw = random.Random(4)  # noqa: S311 - which bits are flipped is no secret
    keys = [entry.key for entry in store.list(checkpoints.folder(30))]
    assert len(keys) == 4
    for _ in range(20):
        for key in keys:
            good = store.get(key)
            bad = bytearray(good)
            bad[draw.randrange(len(bad))] ^= 1 << draw.randrange(8)
            store.put(key, bytes(bad))
            found = checkpoints.newest()
            assert found is not None
            changed_only_a_fact = found.step == 30 and key.endswith("manifest.json") and found.files == files_of(30)
            assert changed_only_a_fact or (found.step == 20 and found.files == files_of(20))
            if found.step == 20:
                assert found.skipped[0].startswith("step 30: ")
            store.put(key, good)


def test_a_torn_or_missing_file_is_passed_over(store: Store, checkpoints: CheckpointStore) -> None:
    torn, missing = data_keys(store, checkpoints, 30)[0], data_keys(store, checkpoints, 20)[0]
    store.put(torn, store.get(torn)[:-1])
    store.delete(missing)
    found = checkpoints.newest()
    assert found is not None
    assert found.step == 10
    assert "bytes, expected" in found.skipped[0]
    assert "is missing" in found.skipped[1]


def test_files_without_manifest_are_no_checkpoint(store: Store, checkpoints: CheckpointStore) -> None:
    """A writer killed before its commit leaves files that nobody reads and the next attempt removes."""
    store.put(f"{checkpoints.folder(40)}/000001-killed/model.safetensors", b"half")
    found = checkpoints.newest()
    assert found is not None
    assert found.step == 30
    assert found.skipped == ["step 40: not committed"]
    assert CheckpointStore(store, "run", 2).collect_orphans() == 1
    assert store.list(checkpoints.folder(40)) == []


def test_files_of_the_running_attempt_are_no_orphans(store: Store, checkpoints: CheckpointStore) -> None:
    store.put(f"{checkpoints.folder(40)}/000001-running/model.safetensors", b"half")
    assert checkpoints.collect_orphans() == 0


def kept(store: Store, checkpoints: CheckpointStore) -> list[int]:
    """The steps of which anything is there: some S3 servers go on listing a folder that was emptied."""
    return [step for step in checkpoints.steps() if store.list(checkpoints.folder(step))]


def test_retention_keeps_the_newest_and_removes_whole_checkpoints(store: Store, checkpoints: CheckpointStore) -> None:
    assert checkpoints.retain(2) == [10]
    assert kept(store, checkpoints) == [20, 30]
    assert store.list(checkpoints.folder(10)) == []


def test_the_best_checkpoint_is_kept_beside_the_newest(store: Store, checkpoints: CheckpointStore) -> None:
    """However old the best step is, its checkpoint stays until another is better."""
    checkpoints.save(40, files_of(40), {})
    assert checkpoints.retain(2, best=10) == [20]
    assert kept(store, checkpoints) == [10, 30, 40]
    assert checkpoints.load(10).files == files_of(10)
    assert checkpoints.retain(2, best=40) == [10]
    assert kept(store, checkpoints) == [30, 40]


def test_files_of_several_writers_are_one_checkpoint_once_committed(checkpoints: CheckpointStore) -> None:
    """What each rank wrote is no checkpoint until one manifest names it all."""
    entries = {}
    for rank in (0, 1):
        entries |= checkpoints.write(40, {f"model-rank{rank}.safetensors": bytes([rank]) * 9})
    found = checkpoints.newest()
    assert found is not None
    assert found.step == 30
    checkpoints.commit(40, entries, {"world_size": 2})
    found = checkpoints.newest()
    assert found is not None
    assert found.files == {"model-rank0.safetensors": bytes(9), "model-rank1.safetensors": b"\x01" * 9}
    assert weights_digest(found.manifest) != weights_digest(checkpoints.manifest(30))
    assert weights_digest(checkpoints.manifest(30)) == checkpoints.manifest(30)["files"]["model.safetensors"]["sha256"]


def test_a_fenced_attempt_cannot_commit(store: Store, checkpoints: CheckpointStore) -> None:
    """After another driver took the run over, the old one's checkpoint is refused and does not exist."""
    RunLease.acquire(store, "run").release()
    with pytest.raises(RefusedError, match="attempt 1 was taken over by attempt 2"):
        checkpoints.save(40, files_of(40), {})
    found = checkpoints.newest()
    assert found is not None
    assert found.step == 30


def test_a_damaged_checkpoint_is_replaced_when_its_step_comes_again(store: Store, checkpoints: CheckpointStore) -> None:
    """The run falls back past step 30, reaches it again, and must not be stuck with the damaged one."""
    key = data_keys(store, checkpoints, 30)[0]
    store.put(key, b"damaged")
    checkpoints.save(30, files_of(31), {})
    found = checkpoints.newest()
    assert found is not None
    assert (found.step, found.files) == (30, files_of(31))


def test_a_good_checkpoint_stands_when_its_step_comes_again(checkpoints: CheckpointStore) -> None:
    checkpoints.save(30, files_of(99), {})
    found = checkpoints.newest()
    assert found is not None
    assert found.files == files_of(30)


def test_storage_that_is_away_is_no_reason_to_start_over(file_store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """None would mean a run from step 0: an outage must be an error instead."""
    lease = RunLease.acquire(file_store, "run")
    lease.release()
    checkpoints = CheckpointStore(file_store, "run", 1)
    checkpoints.save(10, files_of(10), {})

    def away(key: str) -> bytes:
        raise UnavailableError(f"{key}: storage is away")

    monkeypatch.setattr(file_store, "get", away)
    with pytest.raises(UnavailableError):
        checkpoints.newest()


def test_no_pickle_is_written(file_store: Store, tmp_path: Path) -> None:
    """The files of a checkpoint are safetensors and JSON only."""
    lease = RunLease.acquire(file_store, "run")
    lease.release()
    CheckpointStore(file_store, "run", 1).save(10, files_of(10), {})
    names = {entry.key.rsplit(".", 1)[-1] for entry in file_store.list("runs")}
    assert names == {"safetensors", "json"}
