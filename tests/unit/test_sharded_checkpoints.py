"""A checkpoint of shards is one checkpoint: committed whole, verified, and loadable by any number of ranks."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from safetensors.torch import load
from small_training import moments, prepared, train, whole

from lepton_ray.monitoring.recorder import Recorder
from lepton_ray.storage import Store, open_store
from lepton_ray.training.checkpoint_writer import CheckpointWriter, NonFiniteStateError
from lepton_ray.training.checkpoints import CheckpointStore
from lepton_ray.training.lease import RunLease
from lepton_ray.training.parallel import Parallel
from lepton_ray.training.restoring import restore
from lepton_ray.training.state import copy_state, pack, unpack, whole_weights

WAYS: dict[str, dict[str, Any]] = {
    "ddp": {},
    "fsdp": {"strategy": "fsdp"},
    "powersgd": {"compression": "powersgd", "powersgd_start_step": 2, "bucket_mb": 0.003},
}
PAIRS = [(run, way) for run in ("ddp", "fsdp") for way in ("ddp", "fsdp")]
FIRST, SECOND, LAST = 4, 8, 12
DAMAGE = {
    "flipped": ("model-rank00001", "SHA-256 differs"),
    "short": ("optimizer-rank00000", "bytes, expected"),
    "missing": ("optimizer-rank00001", "is missing"),
    "layout": ("shards-rank00001", "SHA-256 differs"),
    "uncommitted": ("manifest", "not committed"),
}
"""Run -> the file that is damaged in it, and what is said of it."""


class Averages:
    """A moving average that is the weights themselves, times two."""

    def __init__(self, parallel: Parallel) -> None:
        self.tensors = {name: value.detach() * 2 for name, value in parallel.module.state_dict().items()}

    def state(self) -> dict[str, torch.Tensor]:
        return self.tensors

    def load(self, tensors: dict[str, torch.Tensor]) -> None:
        self.tensors = dict(tensors)


def writer_of(uri: str, run: str, parallel: Parallel) -> tuple[CheckpointStore, CheckpointWriter]:
    store = open_store(uri)
    checkpoints = CheckpointStore(store, run, 1)
    recorder = Recorder(uri, f"runs/{run}/metrics/{parallel.rank}.json", {"run": run}, every_s=60.0)
    return checkpoints, CheckpointWriter(checkpoints, 2, recorder, parallel)


def write_each_way(uri: str) -> dict[str, Any]:
    """Train to LAST with checkpoints at FIRST and SECOND; the whole state at SECOND, and the weights at the end."""
    found = {}
    for way, settings in WAYS.items():
        parallel, optimizer = prepared(**settings)
        _, writer = writer_of(uri, way, parallel)
        train(parallel, optimizer, 0, FIRST)
        writer.submit(FIRST, copy_state(parallel, optimizer, Averages(parallel)), {"step": FIRST})
        train(parallel, optimizer, FIRST, SECOND)
        state = {"step": SECOND, "controls": {"best": 4}}
        writer.submit(SECOND, copy_state(parallel, optimizer, Averages(parallel), into=writer.spare()), state)
        then = (whole(parallel), moments(parallel, optimizer))
        train(parallel, optimizer, SECOND, LAST)  # while it is written
        writer.finish()
        found[way] = (*then, whole(parallel))
    return found


def load_into(uri: str, ways: list[tuple[str, str]]) -> dict[tuple[str, str], Any]:
    """Restore each run into each strategy; the whole state restored, the average, and the weights at LAST."""
    found = {}
    for run, way in ways:
        parallel, optimizer = prepared(seed=9, **WAYS[way])
        average = Averages(parallel)
        restored = restore(CheckpointStore(open_store(uri), run, 1), parallel, optimizer, average)
        then = (whole(parallel), moments(parallel, optimizer))
        average_is_double = all(
            torch.equal(average.tensors[name], value * 2) for name, value in parallel.module.state_dict().items()
        )
        train(parallel, optimizer, restored.step, LAST)
        found[run, way] = (restored, *then, average_is_double, whole(parallel))
    return found


def write_and_poison(uri: str) -> tuple[dict[str, Any], Any]:
    return write_each_way(uri), poison_one_rank(uri)


def read_back(
    uri: str, pairs: list[tuple[str, str]], damaged: list[str]
) -> tuple[dict[tuple[str, str], Any], Any, bool]:
    return load_into(uri, pairs), places(uri, damaged), goes_on_bit_for_bit()


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    return (tmp_path_factory.mktemp("shards") / "store").as_uri()


@pytest.fixture(scope="module")
def two_ranks(uri: str) -> list[tuple[dict[str, Any], Any]]:
    """What two ranks saw while writing."""
    for run in (*WAYS, "poisoned"):
        RunLease.acquire(open_store(uri), run).release()
    return run_ranks(write_and_poison, 2, uri)


@pytest.fixture(scope="module")
def written(two_ranks: Any) -> dict[str, Any]:
    """What rank 0 saw of each way."""
    return dict(two_ranks[0][0])


@pytest.fixture(scope="module", params=[1, 2, 3])
def readers(request: pytest.FixtureRequest, uri: str, written: Any) -> list[Any]:
    """What one, two and three ranks got back."""
    damage(open_store(uri))
    return run_ranks(read_back, request.param, uri, [*PAIRS, ("powersgd", "powersgd")], list(DAMAGE))


def same(found: dict[str, Any], expected: dict[str, Any]) -> bool:
    return found.keys() == expected.keys() and all(np.array_equal(found[name], expected[name]) for name in found)


def test_each_rank_writes_its_shard_and_one_manifest_names_all(uri: str, written: Any) -> None:
    """Two ranks: two files of each kind, together no larger than the whole, and nothing but safetensors and JSON."""
    found = CheckpointStore(open_store(uri), "fsdp", 1).newest()
    assert found is not None
    assert sorted(found.files) == sorted(
        [f"{kind}-rank0000{rank}.safetensors" for kind in ("average", "model", "optimizer") for rank in (0, 1)]
        + ["shards-rank00000.json", "shards-rank00001.json", "state.json"]
    )
    assert json.loads(found.files["state.json"])["controls"] == {"best": 4}
    sizes = [
        sum(value.numel() for value in load(found.files[f"model-rank0000{rank}.safetensors"]).values())
        for rank in (0, 1)
    ]
    values = sum(value.size for value in written["fsdp"][0].values())
    assert sum(sizes) == values
    assert max(sizes) < 0.6 * values


@pytest.mark.parametrize("way", WAYS)
def test_published_weights_are_whole_and_the_average_where_there_is_one(uri: str, written: Any, way: str) -> None:
    found = CheckpointStore(open_store(uri), way, 1).newest()
    assert found is not None
    bare = {name: value.numpy() for name, value in load(whole_weights(found.files, averaged=False)).items()}
    assert same(bare, written[way][0])
    average = {name: value.numpy() for name, value in load(whole_weights(found.files)).items()}
    assert same(average, {name: value * 2 for name, value in written[way][0].items()})


def test_any_number_of_ranks_goes_on_from_either_strategy(written: Any, readers: Any) -> None:
    """Shards of two ranks into one, two and three, and into ddp; ddp's into shards: the same state bit for bit."""
    for run, way in PAIRS:
        for restored, weights, state, average_is_double, last in (rank[0][run, way] for rank in readers):
            assert (restored.step, restored.state["controls"], restored.skipped) == (SECOND, {"best": 4}, [])
            assert same(weights, written[run][0])
            assert same(state, written[run][1])
            assert average_is_double
            for name, value in written[run][2].items():
                np.testing.assert_allclose(last[name], value, rtol=1e-3, atol=1e-4, err_msg=name)
            if len(readers) == 2 and run == way:
                assert same(last, written[run][2])


def test_what_powersgd_remembers_is_restored_bit_for_bit(written: Any, readers: Any) -> None:
    """Errors, factors, random numbers: the weights of the run without the interruption.

    Another number of ranks drops them, and starts afresh from the same weights.
    """
    for rank in readers:
        restored, weights, _, _, last = rank[0]["powersgd", "powersgd"]
        assert restored.step == SECOND
        assert same(weights, written["powersgd"][0])
        assert same(last, written["powersgd"][2]) == (len(readers) == 2)


def goes_on_bit_for_bit() -> bool:
    """Whether a model restored in the middle computes what the undisturbed one does, with several buckets."""
    first, optimizer = prepared(bucket_mb=0.002)
    train(first, optimizer, 0, 3)
    files = pack(copy_state(first, optimizer, everywhere=True), {})
    train(first, optimizer, 3, 6)
    second, other = prepared(seed=5, bucket_mb=0.002)
    unpack(files, second, other)
    train(second, other, 3, 6)
    return same(whole(second), whole(first))


def test_a_resumed_run_sums_gradients_in_the_same_order(readers: Any) -> None:
    """DDP lays its buckets out before the first step: with three ranks another layout would give other bits."""
    assert all(rank[2] for rank in readers)


def places(uri: str, runs: list[str]) -> list[tuple[int, list[str]]]:
    """Where the ranks get to in each run."""
    found = []
    for run in runs:
        parallel, optimizer = prepared(strategy="fsdp")
        restored = restore(CheckpointStore(open_store(uri), run, 1), parallel, optimizer)
        found.append((restored.step, restored.skipped))
    return found


def damage(store: Store) -> None:
    """Copies of the sharded run whose newest checkpoint lost or changed one file."""
    for run, (name, _) in DAMAGE.items():
        for entry in store.list("runs/fsdp/checkpoints"):
            store.put(entry.key.replace("runs/fsdp/", f"runs/{run}/"), store.get(entry.key))
        newest = [entry.key for entry in store.list(CheckpointStore(store, run, 1).folder(SECOND))]
        (key,) = [key for key in newest if name in key]
        data = bytearray(store.get(key))
        data[len(data) // 2] ^= 1
        if run in ("flipped", "layout"):
            store.put(key, bytes(data))
        elif run == "short":
            store.put(key, bytes(data[:-1]))
        else:
            store.delete(key)


def test_a_damaged_shard_of_any_rank_takes_all_ranks_to_the_one_before(readers: Any) -> None:
    """Flipped, short or missing, a rank's own file or one that all read: no rank uses what another cannot read."""
    for rank in readers:
        for (step, skipped), (run, (name, words)) in zip(rank[1], DAMAGE.items(), strict=True):
            assert step == FIRST, run
            assert words in skipped[0]
            assert run == "uncommitted" or name in skipped[0]
        assert rank[1] == readers[0][1]


def poison_one_rank(uri: str) -> tuple[int | None, list[int], str]:
    """Rank 1's shard gets a NaN; what each rank says of it, and what is there after."""
    parallel, optimizer = prepared(strategy="fsdp")
    checkpoints, writer = writer_of(uri, "poisoned", parallel)
    train(parallel, optimizer, 0, 1)
    writer.submit(1, copy_state(parallel, optimizer), {"step": 1})
    copy = copy_state(parallel, optimizer)
    if dist.get_rank() == 1:
        copy.tensors["model"]["head.weight"][0, 0] = float("nan")
    writer.submit(2, copy, {"step": 2})
    writer.submit(3, copy_state(parallel, optimizer), {"step": 3})
    writer.submit(4, copy, {"step": 4})
    said = ""
    try:
        writer.finish()
    except NonFiniteStateError as error:
        said = str(error)
    return writer.non_finite_step, checkpoints.steps(), said


def test_a_state_that_is_not_finite_on_one_rank_is_committed_by_none(two_ranks: Any) -> None:
    """The run goes on and commits the next good one; a bad last one is an error on every rank."""
    for step, steps, said in (rank[1] for rank in two_ranks):
        assert (step, steps) == (4, [1, 3])
        assert "step 4: tensor head.weight is not finite" in said
