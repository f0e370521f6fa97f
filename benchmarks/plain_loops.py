"""The same training by hand, as people write it: torchrun with DDP, and plain Ray Train. Used by overhead.py.

Both use the 28x28 CNN, the same rows, batch, optimiser, schedule, augmentation and threads as the framework, with a
shuffled DistributedSampler-like order, and print the time at which each step ended.
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from lepton_ray.settings import OptimizerSettings
from lepton_ray.tasks import find_task
from lepton_ray.training.schedule import learning_rate
from lepton_ray.training.state import make_optimizer


def train_by_hand(config: dict[str, Any]) -> list[float]:
    """A plain DDP loop on an initialised process group; returns the clock time at the end of every step."""
    rows = np.load(config["data"])
    rank, world_size = dist.get_rank(), dist.get_world_size()
    torch.set_num_threads(config["threads"])
    task = find_task("image_classification", {})
    images, labels = torch.from_numpy(rows["images"]), torch.from_numpy(rows["labels"])
    torch.manual_seed(0)
    model = DistributedDataParallel(task.build(config["transforms"]), gradient_as_bucket_view=True)
    settings = OptimizerSettings()
    optimizer = make_optimizer(model, settings)
    local = config["batch"] // world_size
    ends: list[float] = []
    epoch = 0
    while len(ends) < config["steps"]:
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(epoch))[rank::world_size]
        for at in range(0, len(order) - local + 1, local):
            ids = order[at : at + local]
            seeds = np.random.default_rng(len(ends)).integers(0, 2**63, local).astype(np.uint64)
            inputs = task.augment(images[ids], seeds)
            optimizer.zero_grad(set_to_none=True)
            loss = torch.nn.functional.cross_entropy(model(inputs), labels[ids])
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(settings, len(ends), config["steps"])
            optimizer.step()
            ends.append(time.time())
            if len(ends) == config["steps"]:
                break
        epoch += 1
    return ends


def torchrun_main() -> None:
    """Entry point under torchrun: rank 0 writes its step times."""
    config = json.loads(sys.argv[1])
    dist.init_process_group("gloo")
    ends = train_by_hand(config)
    if dist.get_rank() == 0:
        with open(config["out"], "w", encoding="utf-8") as file:  # noqa: PTH123 - three words of a benchmark
            json.dump(ends, file)
    dist.destroy_process_group()


def ray_train_main() -> None:
    """Entry point of the plain Ray Train driver: a local Ray, a TorchTrainer, the loop by hand."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray
    from ray.train import RunConfig, ScalingConfig  # noqa: TID251 - the plain Ray Train that is compared with
    from ray.train.torch import TorchTrainer  # noqa: TID251

    config = json.loads(sys.argv[1])
    ray.init(num_cpus=config["workers"], include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    trainer = TorchTrainer(
        train_by_hand,
        train_loop_config=config,
        scaling_config=ScalingConfig(num_workers=config["workers"], resources_per_worker={"CPU": 1}),
        run_config=RunConfig(storage_path=config["scratch"], name=f"plain-{time.time_ns()}"),
    )
    ends = trainer.fit().return_value
    with open(config["out"], "w", encoding="utf-8") as file:  # noqa: PTH123
        json.dump(ends, file)
    ray.shutdown()


if __name__ == "__main__":
    if os.environ.get("PLAIN_LOOP") == "ray":
        ray_train_main()
    else:
        torchrun_main()
