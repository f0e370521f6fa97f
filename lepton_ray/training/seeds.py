"""Seeds of random numbers that need neither be saved nor restored: functions of the run's seed and the position."""

from __future__ import annotations

import numpy as np
import torch

from lepton_ray.data.order import mix64


def step_seed(seed: int, step: int, rank: int, part: int = 0) -> int:
    """The seed of a rank's random numbers (dropout) in one part of one step: 0 <= seed < 2**63."""
    mixed = mix64(mix64(np.array([seed], np.uint64)) ^ np.uint64((step << 20) ^ rank))
    return int(mixed[0] >> np.uint64(1)) ^ part


def seed_torch(seed: int, device: torch.device | None = None) -> None:
    """Seed torch's generators of the CPU and of `device`, as `torch.manual_seed` does.

    That one goes through every kind of device there may be, and notes a stack trace for each that is not in use: 0.7 ms
    in a rank, for each step and each row of a loop of the user's own.
    """
    torch.default_generator.manual_seed(seed)
    if device is not None and device.type == "cuda":
        torch.cuda.manual_seed(seed)
