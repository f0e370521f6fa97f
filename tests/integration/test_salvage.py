"""What the survivors of a lost rank hand on: the state of the newest step, whatever the interval of hot copies."""

from __future__ import annotations

import os
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from engine_runs import CREATED_AT, run_here
from ranks import exit_codes, run_ranks

from lepton_ray.training.checkpoints import MANIFEST
from lepton_ray.training.hot_folder import folder_of

RANKS = 2
TRAINING = {"epochs": 2, "global_batch": 12, "seed": 3, "checkpoint": {"every_steps": 1000}}


def doomed(rank: int, port: int, folder: str, doom: str, awaited: int | None) -> None:
    """One rank of a group that loses a rank, after the checkpoint of the step `awaited` is committed."""
    import torch.distributed as dist

    from lepton_ray.training import hot_copies

    os.environ["DOOMED"] = doom
    if awaited is not None:
        os.environ["DOOMED_AWAITS"] = f"{folder}/store/runs/lost/checkpoints/step-{awaited:012d}/{MANIFEST}"
    hot_copies.OVERHEAD = 1e-9  # no copy but the first few: what is found later was salvaged
    store = dist.TCPStore("127.0.0.1", port, is_master=False)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=RANKS, timeout=timedelta(seconds=60))
    try:
        run_here(folder, "lost", TRAINING, task="doomed")
    except RuntimeError as error:
        print(f"rank {rank}: {error}")  # noqa: T201 - told where the test fails


def again(folder: str) -> Any:
    """The run once more, to its end."""
    return run_here(folder, "lost", TRAINING, task="doomed")


def undisturbed(folder: str) -> Any:
    """The same run without a fault."""
    return run_here(folder, "calm", TRAINING, task="doomed")


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What the run gives when nothing happens."""
    return run_ranks(undisturbed, RANKS, str(tmp_path_factory.mktemp("calm")))[0]


@pytest.mark.parametrize(
    ("doom", "start", "node"), [("1:7:backward", 6, False), ("1:8:backward", 7, True), ("0:7:forward", 5, False)]
)
def test_a_lost_rank_costs_no_step_that_was_done(tmp_path: Path, calm: Any, doom: str, start: int, node: bool) -> None:
    """The next group begins at the step that failed; weights, buffers and samples end as if nothing had happened.

    With batch normalisation rank 0 alone has the buffers that count: when it is lost, its newest checkpoint is taken.
    Where a node is lost, what its ranks kept in their memory goes with it.
    """
    victim = doom[0]
    codes = exit_codes(doomed, RANKS, str(tmp_path), doom, start if victim == "0" else None)
    assert codes == [-9 if rank == int(victim) else 0 for rank in range(RANKS)]
    if node:
        kept = list(folder_of((tmp_path / "store").as_uri(), "lost", CREATED_AT).glob(f"g*-rank{victim}*"))
        assert kept
        for path in kept:
            path.unlink()
    found = run_ranks(again, RANKS, str(tmp_path))[0]
    assert found["start"] == start
    assert found["samples"] == calm["samples"]
    assert found["weights"].keys() == calm["weights"].keys()
    for name, value in calm["weights"].items():
        np.testing.assert_array_equal(found["weights"][name], value, err_msg=name)
    assert found["metrics"] == calm["metrics"]
