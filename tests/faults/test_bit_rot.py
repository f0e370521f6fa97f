"""One flipped bit, one cut or missing file, anywhere in what is stored: found before it is used (F37, F38)."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from broken import SizeOnly, Unchecked, Unsealed
from damage import flipped, inflict
from digits_slice import digits_slice
from results import Table, repeats
from safetensors.numpy import save
from scenario import DAMAGES

from lepton_ray.data.tables import ingest, open_table
from lepton_ray.errors import IntegrityError, LeptonError
from lepton_ray.registry import Registry
from lepton_ray.storage import Store
from lepton_ray.training.checkpoints import CheckpointStore
from lepton_ray.training.lease import RunLease

RUN = "rot"
FILES = {"model.safetensors": b"m" * 700, "optimizer.safetensors": b"o" * 900, "state.json": b'{"step": 1}'}


@dataclass(frozen=True)
class Kept:
    """Something stored, and how it is read."""

    keys: list[str]
    read: Callable[[], Any]
    """What a user gets, comparable; raises LeptonError where it is found damaged."""


def checkpoints(store: Store, kind: type[CheckpointStore] = CheckpointStore) -> Kept:
    """Two checkpoints; what is read is the content by step."""
    if not store.list(f"runs/{RUN}"):
        lease = RunLease.acquire(store, RUN)
        lease.release()
        for step in (10, 20):
            files = {name: data + str(step).encode() for name, data in FILES.items()}
            CheckpointStore(store, RUN, 1).save(step, files, {})

    def read() -> Any:
        found = kind(store, RUN, 2).newest()
        if found is None or found.step != 20:
            raise IntegrityError("passed over")
        return found.files

    return Kept([entry.key for entry in store.list(f"runs/{RUN}/checkpoints/step-{20:012d}")], read)


def models(store: Store) -> Kept:
    """A registered version."""
    registry = Registry(store)
    weights = save({"weights": np.arange(300, dtype=np.float32)})
    registry.publish("digits", weights=weights, card={"task": {"name": "any"}}, transforms={"mean": [0.13]})

    def read() -> Any:
        return registry.load(registry.resolve("digits:1"))

    return Kept([entry.key for entry in store.list("models/digits/versions/1") if entry.size], read)


def tables(store: Store) -> Kept:
    """The data files of a table (its log belongs to Delta Lake)."""
    ingest(store, "digits", digits_slice(60))
    keys = [entry.key for entry in store.list("") if entry.key.endswith(".parquet")]
    return Kept(keys, lambda: open_table(store, "digits").read())


def undetected(store: Store, kept: Kept, trials: int, seed: int) -> tuple[int, int]:
    """How many flips were not found although they changed what is read, and how many were found."""
    draw = random.Random(seed)  # noqa: S311 - not a secret
    good, missed, found = kept.read(), 0, 0
    for _ in range(trials):
        key = draw.choice(kept.keys)
        data = store.get(key)
        store.put(key, flipped(data, draw))
        try:
            missed += kept.read() != good
        except LeptonError:
            found += 1
        store.put(key, data)
    assert kept.read() == good
    return missed, found


@pytest.mark.parametrize("make", [checkpoints, models, tables])
def test_no_flipped_bit_goes_unseen(make: Callable[[Store], Kept], file_store: Store, table: Table) -> None:
    """In checkpoints, models and the rows of tables."""
    trials = repeats(40, 400)
    missed, found = undetected(file_store, make(file_store), trials, seed=1)
    assert missed == 0
    assert found > trials // 2, "most flips hit bytes that are read"
    table.add("F38", f"one flipped bit: {make.__name__}", "any byte of any file", trials, f"{missed} undetected")


@pytest.mark.parametrize("kind", [Unchecked, SizeOnly, Unsealed])
def test_readers_that_check_less_are_caught(kind: type[CheckpointStore], file_store: Store) -> None:
    """The same flips get past a reader without hashes, one that looks at sizes, and one that believes manifests."""
    missed = 0
    try:
        missed, _ = undetected(file_store, checkpoints(file_store, kind), 600, seed=2)
    except (KeyError, ValueError):  # so far off that it is no reading
        missed = 1
    assert missed > 0


def test_torn_checkpoints_are_passed_over(file_store: Store, table: Table) -> None:
    """A file cut, empty or gone, the manifest cut or flipped: the one before is used, and what was skipped is told."""
    count = repeats(30, 300)
    for number in range(count):
        draw = random.Random(number)  # noqa: S311 - not a secret
        file_store.delete_prefix("runs") if file_store.list("runs") else None
        checkpoints(file_store)
        key = inflict(file_store, RUN, 20, DAMAGES[number % len(DAMAGES)], draw)
        found = CheckpointStore(file_store, RUN, 2).newest()
        assert found is not None
        assert found.step == 10, key
        assert len(found.skipped) == 1
    table.add("F37", "torn, short, empty or missing file", "newest checkpoint", count, "0 wrong resumes")
