"""A lost node and the shards that only its rank had: the other node kept a copy."""

from __future__ import annotations

import os
import shutil
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from engine_runs import run_here
from ranks import exit_codes, run_ranks

RANKS = 2
TRAINING = {
    "epochs": 2, "global_batch": 12, "seed": 3, "checkpoint": {"every_steps": 1000}, "parallel": {"strategy": "fsdp"},
}  # fmt: skip
DOOM = "1:8:backward"


def on_node(folder: str, node: int) -> None:
    """Give this process the shared memory of a node of its own."""
    from lepton_ray.training import hot_buddy, hot_copies, hot_folder

    memory = Path(folder) / f"memory-of-node-{node}"
    memory.mkdir(exist_ok=True)
    os.environ["LOCAL_RANK"] = "0"
    for module in (hot_buddy, hot_copies, hot_folder):
        module.SHARED_MEMORY = memory  # type: ignore[attr-defined]
    hot_copies.OVERHEAD = 1e9  # a copy after each step


def doomed(rank: int, port: int, folder: str) -> None:
    """One rank of a group on two nodes that loses one."""
    import torch.distributed as dist

    os.environ["DOOMED"] = DOOM
    on_node(folder, rank)
    store = dist.TCPStore("127.0.0.1", port, is_master=False)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=RANKS, timeout=timedelta(seconds=60))
    try:
        run_here(folder, "lost", TRAINING, task="doomed", local_rank=0)
    except RuntimeError as error:
        print(f"rank {rank}: {error}")  # noqa: T201 - told where the test fails


def again(folder: str) -> Any:
    """The run once more, to its end, both ranks on the node that is left."""
    import torch.distributed as dist

    on_node(folder, 0)
    return run_here(folder, "lost", TRAINING, task="doomed", local_rank=dist.get_rank())


def undisturbed(folder: str) -> Any:
    """The same run without a fault."""
    return run_here(folder, "calm", TRAINING, task="doomed")


@pytest.mark.parametrize("lost", [1])
def test_a_lost_nodes_shards_are_on_the_other_node(tmp_path: Path, lost: int) -> None:
    """No checkpoint was written: the run goes on from the newest copy, and ends as if nothing had happened."""
    assert exit_codes(doomed, RANKS, str(tmp_path), limit_s=240) == [-9 if rank == lost else 0 for rank in range(RANKS)]
    shutil.rmtree(tmp_path / f"memory-of-node-{lost}")
    found = run_ranks(again, RANKS, str(tmp_path))[0]
    calm = run_ranks(undisturbed, RANKS, str(tmp_path))[0]
    assert found["start"] == 7
    assert found["samples"] == calm["samples"]
    for name, value in calm["weights"].items():
        np.testing.assert_array_equal(found["weights"][name], value, err_msg=name)
