"""How often a checkpoint pays: the optimum of Young and Daly, from what one costs and how often the run fails.

A checkpoint costs the time for which training waits for it (delta); a failure costs the work since the newest one, half
an interval on average. The interval that wastes least follows from delta and the mean time between failures M. Pure:
the loop measures, and all ranks agree on the outcome (`training.step_end`).

J. W. Young, A first order approximation to the optimum checkpoint interval, CACM 17(9), 1974.
J. T. Daly, A higher order estimate of the optimum checkpoint interval for restart dumps, FGCS 22(3), 2006.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

WORKER_S_PER_FAILURE = 50_700 * 3600.0
"""Before a run has seen failures of its own: the Llama 3 paper (arXiv:2407.21783, section 3.3.4) reports 419 unexpected
interruptions of 16,384 GPUs in 54 days, one in 50,700 worker-hours."""
PRIOR_FAILURES = 0.001
"""What that is worth, in failures: so little that it stands only until the run has had one. What a worker lives to see
differs by a factor of thousands between a data centre and spot machines, so the run's own figure is the better one."""


def young(cost_s: float, between_failures_s: float) -> float:
    """The first-order optimum, sqrt(2 delta M) (Young 1974, equation 2), in seconds.

    Args:
        cost_s: delta, seconds for which training waits for a checkpoint.
        between_failures_s: M, mean seconds between two failures of the whole run.
    """
    return math.sqrt(2.0 * cost_s * between_failures_s)


def daly(cost_s: float, between_failures_s: float) -> float:
    """The higher-order optimum (Daly 2006, equation 37), in seconds of training from one checkpoint to the next.

    sqrt(2 delta M) (1 + (1/3) sqrt(delta / 2M) + (1/9) (delta / 2M)) - delta for delta < 2M, else M. Arguments as for
    `young`.
    """
    if cost_s >= 2.0 * between_failures_s:
        return between_failures_s
    part = cost_s / (2.0 * between_failures_s)
    return young(cost_s, between_failures_s) * (1.0 + math.sqrt(part) / 3.0 + part / 9.0) - cost_s


@dataclass(frozen=True)
class Failures:
    """What is known of how often a run fails."""

    count: int = 0
    """Worker groups that failed."""
    worker_s: float = 0.0
    """Seconds in which the run had workers, times their number."""

    @classmethod
    def of(cls, entries: Iterable[Mapping[str, Any]]) -> Failures:
        """From the ledger entries of rank 0 of all earlier worker groups.

        A group that finished, or that left because of a preemption, did not fail: neither loses a step.
        """
        count, worker_s = 0, 0.0
        for entry in entries:
            count += not (entry.get("finished") or entry.get("left"))
            worker_s += max(0.0, float(entry["updated_at"]) - float(entry["started_at"])) * int(entry["world_size"])
        return cls(count, worker_s)

    def and_then(self, worker_s: float) -> Failures:
        """With so many worker-seconds more, without a failure."""
        return Failures(self.count, self.worker_s + worker_s)

    def mean_time_between(self, workers: int) -> float:
        """Expected seconds between two failures of a group of so many workers.

        The rate is the mean of its Gamma posterior: the prior has PRIOR_FAILURES in PRIOR_FAILURES x
        WORKER_S_PER_FAILURE worker-seconds, to which the run's own failures and worker-seconds are added.
        """
        exposure = PRIOR_FAILURES * WORKER_S_PER_FAILURE + self.worker_s
        return exposure / (PRIOR_FAILURES + self.count) / workers


def best_interval(
    cost_s: float, between_failures_s: float, *, commit_s: float = 0.0, least_s: float = 0.0, most_s: float = math.inf
) -> float:
    """Seconds of training between two checkpoints: Daly's optimum within the bounds.

    Args:
        cost_s: seconds for which training waits for a checkpoint.
        between_failures_s: mean seconds between two failures of the whole run.
        commit_s: seconds from the start of a checkpoint to its commit; never shorter, since only one is under way at a
            time and training would wait for it. It is the stronger bound where `most_s` is less.
        least_s: lower bound of the settings.
        most_s: upper bound of the settings.
    """
    return max(min(max(daly(cost_s, between_failures_s), least_s), most_s), commit_s)


def in_steps(interval_s: float, step_s: float) -> int:
    """The interval in whole steps, one at least."""
    return max(1, round(interval_s / max(step_s, 1e-6)))
