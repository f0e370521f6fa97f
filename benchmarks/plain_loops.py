"""The same training by hand, as people write it: torchrun with DDP, and plain Ray Train. Started by training.py.

Both train the task's model on the same rows with the same batch, optimiser, schedule, augmentation and threads as the
framework, in a shuffled DistributedSampler-like order. What comes out: the clock time at which each step of rank 0
ended (also, as it goes, a line each in the file `progress`), and the peak resident memory of each rank in bytes.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from lepton_ray.settings import OptimizerSettings
from lepton_ray.tasks import find_task
from lepton_ray.training.optimisation import make_optimizer
from lepton_ray.training.schedule import learning_rate


def train_by_hand(config: dict[str, Any]) -> dict[str, Any]:
    """A plain DDP loop on an initialised process group."""
    rows = np.load(config["data"])
    rank, world_size = dist.get_rank(), dist.get_world_size()
    torch.set_num_threads(config["threads"])
    task = find_task(config["task"]["name"], config["task"]["options"])
    inputs, targets = torch.from_numpy(rows["inputs"]), torch.from_numpy(rows["targets"])
    torch.manual_seed(0)
    model = DistributedDataParallel(task.build(config["transforms"]), gradient_as_bucket_view=True)
    settings = OptimizerSettings()
    optimizer = make_optimizer(model, settings)
    local = config["batch"] // world_size
    ends: list[float] = []
    epoch = 0
    progress = Path(config["progress"]).open("w", buffering=1) if "progress" in config and rank == 0 else None  # noqa: SIM115
    while len(ends) < config["steps"]:
        order = torch.randperm(len(inputs), generator=torch.Generator().manual_seed(epoch))[rank::world_size]
        for at in range(0, len(order) - local + 1, local):
            ids = order[at : at + local]
            seeds = np.random.default_rng(len(ends)).integers(0, 2**63, local).astype(np.uint64)
            optimizer.zero_grad(set_to_none=True)
            outputs = model(task.augment(inputs[ids], seeds))
            loss = task.losses(outputs, targets[ids], label_smoothing=0.0).mean()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0, foreach=True)
            rate = learning_rate(settings, len(ends), config["steps"], len(inputs) / config["batch"])
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()
            ends.append(time.time())
            if progress is not None:
                progress.write(f"{ends[-1]}\n")
            if config["checkpoint_every"] and len(ends) % config["checkpoint_every"] == 0:
                report(model, optimizer, float(loss.detach()))
            if len(ends) == config["steps"]:
                break
        epoch += 1
    peaks: list[int] = [0] * world_size
    dist.all_gather_object(peaks, peak_memory())
    return {"ends": ends, "peaks": peaks}


def report(model: torch.nn.Module, optimizer: torch.optim.Optimizer, loss: float) -> None:
    """A checkpoint as Ray Train's guide has it: rank 0 saves, all ranks report."""
    from ray.train import Checkpoint, report  # noqa: TID251 - the plain Ray Train that is compared with

    if dist.get_rank():
        report({"loss": loss})
        return
    with tempfile.TemporaryDirectory() as folder:
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, Path(folder) / "state.pt")
        report({"loss": loss}, checkpoint=Checkpoint.from_directory(folder))


def peak_memory() -> int:
    """Peak resident memory of this process in bytes."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def torchrun_main(config: dict[str, Any]) -> None:
    """Entry point under torchrun: rank 0 writes what came out."""
    dist.init_process_group("gloo")
    found = train_by_hand(config)
    if dist.get_rank() == 0:
        Path(config["out"]).write_text(json.dumps(found), encoding="utf-8")
    dist.barrier()  # a rank that ends first may abort in gloo's threads, and torchrun then ends the others
    dist.destroy_process_group()


def ray_train_main(config: dict[str, Any]) -> None:
    """Entry point of the plain Ray Train driver: a TorchTrainer on the cluster of RAY_ADDRESS, else on a local one."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray
    from ray.train import RunConfig, ScalingConfig  # noqa: TID251
    from ray.train.torch import TorchTrainer  # noqa: TID251

    here = {} if "RAY_ADDRESS" in os.environ else {"num_cpus": config["workers"], "include_dashboard": False}
    ray.init(log_to_driver=False, logging_level="ERROR", **here)
    trainer = TorchTrainer(
        train_by_hand,
        train_loop_config=config,
        scaling_config=ScalingConfig(num_workers=config["workers"], resources_per_worker={"CPU": 1}),
        run_config=RunConfig(storage_path=config["scratch"], name=f"plain-{time.time_ns()}"),
    )
    Path(config["out"]).write_text(json.dumps(trainer.fit().return_value), encoding="utf-8")
    ray.shutdown()


if __name__ == "__main__":
    (ray_train_main if os.environ.get("PLAIN_LOOP") == "ray" else torchrun_main)(
        json.loads(Path(sys.argv[1]).read_text())
    )
