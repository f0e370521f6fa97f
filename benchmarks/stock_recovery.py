"""Stock Ray Train under the same faults: a TorchTrainer with checkpoints as its guide has them. Started by recovery.py.

    python benchmarks/stock_recovery.py CONFIG.json

The loop is that of plain_loops.py, written so that a restart can do well: the order of the samples, augmentation and
dropout depend on the step alone, and a group that starts goes on from Ray's newest checkpoint. Each rank keeps its
newest step in a small file of its own, which outlives it and which recovery.py reads while the run goes on.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import struct
import sys
import tempfile
import time
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

FORM = "<7qd"
"""Of a mark: seven whole numbers and a float. Text, since Ray pickles this module into the ranks."""


@dataclass(frozen=True)
class Mark:
    """How far a rank of one worker group is."""

    group: int
    """Number of the worker group; a later one has a larger number."""
    rank: int
    pid: int
    step: int
    """Steps that are done, over the whole run."""
    first: int
    """The first step that this rank did in this group; 0 before it is done."""
    done: int
    """Steps that this rank did in this group."""
    first_ns: int
    """When the first one was done, nanoseconds of the monotonic clock of this machine."""
    at: float
    """When `step` was done, seconds of the same clock."""


class MarkFile:
    """A rank's file of one group; writing costs a microsecond."""

    def __init__(self, folder: Path, group: int, rank: int, step: int) -> None:
        self._mark = Mark(group, rank, os.getpid(), step, 0, 0, 0, time.monotonic())
        path = folder / f"{group}-{rank}"
        path.write_bytes(struct.pack(FORM, *astuple(self._mark)))
        with path.open("r+b") as file:
            self._memory = mmap.mmap(file.fileno(), struct.calcsize(FORM))

    def step_done(self, step: int) -> None:
        """Note that `step` steps are done."""
        before, now = self._mark, time.monotonic_ns()
        first, first_ns = (before.first, before.first_ns) if before.done else (step, now)
        self._mark = Mark(
            before.group, before.rank, before.pid, step, first, before.done + 1, first_ns, now / 1e9
        )  # fmt: skip
        self._memory[:] = struct.pack(FORM, *astuple(self._mark))


def read_marks(folder: Path) -> list[Mark]:
    """The marks of all ranks of all groups; one that is being written is left out."""
    found = []
    for path in folder.iterdir():
        data = path.read_bytes()
        if len(data) == struct.calcsize(FORM):
            found.append(Mark(*struct.unpack(FORM, data)))
    return found


def train(config: dict[str, Any]) -> dict[str, Any]:
    """What Ray Train calls on each rank; the digest of the final weights."""
    import numpy as np
    import torch
    import torch.distributed as dist
    from ray.train import get_checkpoint  # noqa: TID251 - the stock Ray Train that is compared with
    from torch.nn.parallel import DistributedDataParallel

    from lepton_ray.settings import OptimizerSettings
    from lepton_ray.tasks import find_task
    from lepton_ray.training.optimisation import make_optimizer
    from lepton_ray.training.schedule import learning_rate

    rank, world_size = dist.get_rank(), dist.get_world_size()
    torch.set_num_threads(1)
    rows = np.load(config["data"])
    task = find_task(config["task"]["name"], config["task"]["options"])
    inputs, targets = torch.from_numpy(rows["inputs"]), torch.from_numpy(rows["targets"])
    torch.manual_seed(0)
    model = DistributedDataParallel(task.build(config["transforms"]), gradient_as_bucket_view=True)
    settings = OptimizerSettings()
    optimizer = make_optimizer(model, settings)
    step = 0
    if checkpoint := get_checkpoint():
        with checkpoint.as_directory() as folder:
            state = torch.load(Path(folder) / "state.pt", weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        step = state["step"]
    group = torch.tensor([time.monotonic_ns()])
    dist.broadcast(group, 0)
    mark = MarkFile(Path(config["marks"]), int(group), rank, step)
    local, per_epoch = config["batch"] // world_size, len(inputs) // config["batch"]
    while step < config["steps"]:
        epoch, at = divmod(step, per_epoch)
        order = torch.randperm(len(inputs), generator=torch.Generator().manual_seed(epoch))[rank::world_size]
        ids = order[at * local : (at + 1) * local]
        seeds = np.random.default_rng(step).integers(0, 2**63, local).astype(np.uint64)
        torch.manual_seed(step * world_size + rank)
        optimizer.zero_grad(set_to_none=True)
        loss = task.losses(model(task.augment(inputs[ids], seeds)), targets[ids], label_smoothing=0.0).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0, foreach=True)
        for parameters in optimizer.param_groups:
            parameters["lr"] = learning_rate(settings, step, config["steps"], per_epoch)
        optimizer.step()
        step += 1
        mark.step_done(step)
        if step % config["checkpoint_every"] == 0 or step == config["steps"]:
            report(model, optimizer, step, rank)
    return {"digest": digest(model)}


def report(model: Any, optimizer: Any, step: int, rank: int) -> None:
    """A checkpoint as Ray Train's guide has it: rank 0 saves, all ranks report."""
    import torch
    from ray.train import Checkpoint, report  # noqa: TID251 - as above

    if rank:
        report({"step": step})
        return
    with tempfile.TemporaryDirectory() as folder:
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step}
        torch.save(state, Path(folder) / "state.pt")
        report({"step": step}, checkpoint=Checkpoint.from_directory(folder))


def digest(model: Any) -> str:
    """SHA-256 of all tensors of the model."""
    whole = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        whole.update(name.encode() + value.detach().cpu().numpy().tobytes())
    return whole.hexdigest()


def main(config: dict[str, Any]) -> None:
    """Run to the end on a local Ray; print the digest as JSON."""
    import ray
    from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig  # noqa: TID251 - as above
    from ray.train.torch import TorchTrainer  # noqa: TID251 - as above

    ray.init(num_cpus=config["workers"], include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    trainer = TorchTrainer(
        train,
        train_loop_config=config,
        scaling_config=ScalingConfig(num_workers=config["workers"], resources_per_worker={"CPU": 1}),
        run_config=RunConfig(
            name="stock",
            storage_path=config["scratch"],
            failure_config=FailureConfig(max_failures=-1),
            checkpoint_config=CheckpointConfig(num_to_keep=2),
        ),
    )
    print(json.dumps(trainer.fit().return_value), flush=True)
    ray.shutdown()


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
