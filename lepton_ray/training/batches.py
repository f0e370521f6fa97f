"""Which samples make up step n, and which of them this rank takes.

The position in the data is one integer: step n uses the global sample offsets n x global batch onwards of the endless
row of permuted epochs. World size, restarts and failures change nothing about it, only who takes which slice.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from lepton_ray.data.order import SampleLedger, SampleOrder, mix64
from lepton_ray.data.sampling import Sampling, expected_ledger

STEPS_PER_BLOCK = 64
"""Steps whose sample ids are computed together: one numpy pass instead of 64 small ones."""


@dataclass(frozen=True)
class Slice:
    """This rank's part of one global batch."""

    ids: npt.NDArray[np.int64]
    """Rows of the training split, shape `[n]`; at least one row, see `weight`."""
    seeds: npt.NDArray[np.uint64]
    """One seed per row for augmentation, shape `[n]`: a function of run seed and sample offset alone."""
    weight: float
    """1 where the rows count; 0 where the rank has no row of this batch and its one row only keeps step with others."""
    global_count: int
    """Rows of the whole global batch."""
    row_weights: npt.NDArray[np.float32] | None = None
    """Factor on the loss of each row, shape `[n]`; None where all count alike. The divisor stays `global_count`."""


class BatchPlan:
    """The batches of a run for one rank.

    Args:
        rows: rows of the training split.
        epochs: passes over them.
        global_batch: rows per step over all ranks.
        seed: decides the order.
        rank: this rank.
        world_size: number of ranks.
        sampling: order and weights of the rows; None takes each row once per epoch, all alike.
    """

    def __init__(
        self,
        rows: int,
        epochs: int,
        global_batch: int,
        seed: int,
        rank: int,
        world_size: int,
        sampling: Sampling | None = None,
    ) -> None:
        self.rows = rows
        self.global_batch = global_batch
        self.total_samples = rows * epochs
        self.total_steps = -(-self.total_samples // global_batch)
        sampling = sampling or Sampling(SampleOrder(rows, seed))
        self._order, self._row_weights = sampling.order, sampling.row_weights
        self._seed = np.uint64(mix64(np.array([seed], np.uint64))[0])
        self._rank, self._world_size = rank, world_size
        self._block_start = -1
        self._block: list[Slice] = []
        self._unaccounted: list[tuple[int, npt.NDArray[np.int64]]] = []
        self.ledger = SampleLedger()

    def take(self, step: int) -> Slice:
        """This rank's rows of step `step`, entered into the sample ledger."""
        start = step - step % STEPS_PER_BLOCK
        if start != self._block_start:
            self._fill(start)
        part = self._block[step - start]
        if part.weight:
            self._unaccounted.append((self._bounds(step)[0], part.ids))
        return part

    def epochs_of(self, step: int, count: int) -> npt.NDArray[np.int64]:
        """The epoch of each of the first `count` rows of this rank's slice of a step, shape `[count]`."""
        return self._order.epochs_of(self._bounds(step)[0], count)

    def epoch_after(self, step: int) -> int:
        """Epochs that are complete once `step` steps are done."""
        return self.samples_after(step) // self.rows

    def samples_after(self, step: int) -> int:
        """The global sample offset once `step` steps are done."""
        return min(step * self.global_batch, self.total_samples)

    def account(self) -> SampleLedger:
        """The ledger of the samples this rank has used so far."""
        if self._unaccounted:
            epochs = [self._order.epochs_of(offset, len(ids)) for offset, ids in self._unaccounted]
            self.ledger.add(np.concatenate(epochs), np.concatenate([ids for _, ids in self._unaccounted]))
            self._unaccounted = []
        return self.ledger

    def _bounds(self, step: int) -> tuple[int, int, int]:
        """First and last global offset of this rank's slice of a step, and the size of the global batch."""
        offset = step * self.global_batch
        count = min(self.global_batch, self.total_samples - offset)
        first = offset + count * self._rank // self._world_size
        last = offset + count * (self._rank + 1) // self._world_size
        return first, last, count

    def _fill(self, start: int) -> None:
        stop = min(start + STEPS_PER_BLOCK, self.total_steps)
        bounds = [self._bounds(step) for step in range(start, stop)]
        offsets = np.concatenate([np.arange(first, last) for first, last, _ in bounds]).astype(np.uint64)
        # slices of one rank lie apart, so the ids of the whole block are asked for at once and picked from
        base = start * self.global_batch
        whole = self._order.sample_ids(base, self.samples_after(stop) - base)
        ids = whole[(offsets - np.uint64(base)).astype(np.int64)]
        with np.errstate(over="ignore"):
            seeds = mix64(offsets + self._seed)
        self._block, at = [], 0
        for first, last, count in bounds:
            size = last - first
            if size:
                self._block.append(self._slice(ids[at : at + size], seeds[at : at + size], 1.0, count))
            else:
                self._block.append(self._slice(whole[:1], mix64(np.array([base], np.uint64)), 0.0, count))
            at += size
        self._block_start = start

    def _slice(self, ids: npt.NDArray[np.int64], seeds: npt.NDArray[np.uint64], weight: float, count: int) -> Slice:
        return Slice(ids, seeds, weight, count, None if self._row_weights is None else self._row_weights[ids])


def samples_as_planned(
    samples: Any, sampling: Sampling, *, epochs: int, global_batch: int, steps: int, left_out: Collection[int] = ()
) -> bool:
    """Whether a run used the samples of its plan, each once, and no others.

    Args:
        samples: the merged sample ledger of all ranks, as JSON.
        sampling: order and weights of the rows.
        epochs: passes over them that were planned.
        global_batch: rows per step over all ranks.
        steps: where the run ended; early, or after all epochs.
        left_out: steps whose batches were left out after the run went back (see `max_nonfinite`). A step that was
            skipped for its gradient used its batch.

    Raises UsageError where `samples` is no ledger.
    """
    total = min(steps * global_batch, sampling.order.rows * epochs)
    gaps = [(step * global_batch, (step + 1) * global_batch) for step in left_out]
    return SampleLedger.from_json(samples) == expected_ledger(sampling.order, total, gaps)
