"""Seeds of random numbers that need neither be saved nor restored: functions of the run's seed and the position."""

from __future__ import annotations

import numpy as np

from lepton_ray.data.order import mix64


def step_seed(seed: int, step: int, rank: int, part: int = 0) -> int:
    """The seed of a rank's random numbers (dropout) in one part of one step: 0 <= seed < 2**63."""
    mixed = mix64(mix64(np.array([seed], np.uint64)) ^ np.uint64((step << 20) ^ rank))
    return int(mixed[0] >> np.uint64(1)) ^ part
