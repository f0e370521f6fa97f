"""Which hot copies a worker group may start from."""

from __future__ import annotations

import mmap
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lepton_ray.data.order import SampleLedger
from lepton_ray.training import hot_memory
from lepton_ray.training.hot_choice import choose as choose_copies
from lepton_ray.training.hot_folder import folder_of, own_folder


def copy(rank: int, step: int, *, generation: int = 1, world_size: int = 2, whole: bool = True) -> dict[str, Any]:
    """What is said of one rank's copy; each rank used one sample."""
    samples = SampleLedger()
    samples.add(0, np.array([rank], np.int64))
    return {
        "rank": rank, "step": step, "generation": generation, "world_size": world_size, "whole": whole,
        "state": {"samples": samples.to_json(), "step": step},
    }  # fmt: skip


def log(rank: int, first: int, last: int, *, generation: int = 1) -> dict[str, Any]:
    """What is said of one rank's log of samples."""
    return {"rank": rank, "generation": generation, "world_size": 2, "first": first, "last": last, "path": ""}


def choose(
    *copies: dict[str, Any], after: int = 0, sharded: bool = False, logs: tuple[dict[str, Any], ...] = ()
) -> int | None:
    """The step that is chosen."""
    found = choose_copies([list(copies)], after, list(logs), sharded)
    return None if found is None else found["step"]


def test_the_newest_step_of_which_all_ranks_have_a_copy() -> None:
    """A step that one rank did not finish is passed over for the one before it."""
    assert choose(copy(0, 7), copy(1, 7), copy(0, 8)) == 7
    assert choose(copy(0, 7), copy(1, 7), copy(0, 8), copy(1, 8)) == 8
    assert choose(copy(0, 8)) is None
    assert choose() is None


def test_a_newer_checkpoint_wins() -> None:
    """Copies that are not ahead of the newest checkpoint are left alone."""
    assert choose(copy(0, 7), copy(1, 7), after=7) is None
    assert choose(copy(0, 8), copy(1, 8), after=7) == 8


def test_copies_of_two_generations_are_never_mixed() -> None:
    """Rank 0 of one worker group and rank 1 of another make no state."""
    assert choose(copy(0, 8, generation=1), copy(1, 8, generation=2)) is None


def test_one_whole_copy_is_enough_unless_sharded() -> None:
    """With ddp one rank's tensors do; with fsdp every rank's shards are needed."""
    half = (copy(0, 5), copy(1, 5, whole=False))
    assert choose(*half) == 5
    assert choose(*half, sharded=True) is None
    assert choose(copy(0, 5, whole=False), copy(1, 5, whole=False)) is None


def test_samples_of_all_ranks_are_joined() -> None:
    """The state carries the account of the whole group."""
    found = choose_copies([[copy(0, 5)], [copy(1, 5)]], 0, [], False)
    assert found is not None
    assert found["samples"].used_exactly_once(0, 2)


def test_a_lost_ranks_log_stands_for_its_copy() -> None:
    """What survivors salvaged is used where every other rank's samples are known up to that very step."""
    assert choose(copy(0, 9), logs=(log(1, 0, 9),)) == 9
    assert choose(copy(0, 9), logs=(log(1, 0, 10),)) == 9
    assert choose(copy(0, 9), logs=(log(1, 0, 8),)) is None
    assert choose(copy(0, 9), logs=(log(1, 10, 12),)) is None
    assert choose(copy(0, 9), logs=(log(1, 0, 9, generation=2),)) is None
    assert choose(copy(0, 9), logs=(log(1, 0, 9),), sharded=True) is None
    assert choose(copy(0, 7), copy(1, 7), copy(0, 9), logs=(log(1, 0, 8),)) == 7


def test_a_lost_nodes_samples_are_told_by_plan() -> None:
    """Nothing is left of a lost node: the common account of an earlier step, and the plan, stand for it."""
    base = {"generation": 1, "step": 6, "samples": copy(1, 6)["state"]["samples"], "plan": {}}

    def chosen(*bases: dict[str, Any], sharded: bool = False) -> Any:
        return choose_copies([[copy(0, 9)]], 0, [], sharded, list(bases))

    found = chosen({**base, "step": 2}, base)
    assert (found["step"], found["base"]) == (9, base)
    assert found["samples"] == SampleLedger.from_json(base["samples"])
    assert chosen({**base, "generation": 2}) is None
    assert chosen({**base, "step": 10}) is None
    assert chosen(base, sharded=True) is None
    told = choose_copies([[copy(0, 9)], [copy(1, 9)]], 0, [], False, [base])
    assert told is not None
    assert told["base"] is None


@pytest.mark.parametrize("position", [0, 63, 64, 4095])
def test_a_flipped_bit_is_seen(position: int) -> None:
    """Any single bit of a buffer changes its digest."""
    memory = mmap.mmap(-1, 4096)
    memory[:] = np.random.default_rng(0).bytes(4096)
    before = hot_memory.digest_of(memory)
    memory[position] ^= 0x10
    assert hot_memory.digest_of(memory) != before
    assert hot_memory.digest_of(bytes(memory)) == hot_memory.digest_of(memory)


def test_somebody_elses_folder_is_not_used(tmp_path: Path) -> None:
    """A link where the user's folder should be switches hot copies off; the folder itself is private."""
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    assert not own_folder(tmp_path / "link" / "run")
    assert own_folder(tmp_path / "mine" / "run")
    assert (tmp_path / "mine").stat().st_mode & 0o777 == 0o700


def test_a_run_begun_anew_has_a_folder_of_its_own() -> None:
    """Copies of an earlier run of the same name are never taken for its successor's."""
    folders = {folder_of("file:///s", "a", 1.0), folder_of("file:///s", "a", 2.0), folder_of("file:///t", "a", 1.0)}
    assert len(folders) == 3
    assert all(str(os.getuid()) in folder.parent.name for folder in folders)
