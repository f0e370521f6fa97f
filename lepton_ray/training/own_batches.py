"""Batches of a dataset of one's own: by position, each rank its slice, the same after any restart."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import DataLoader, Dataset, Sampler, TensorDataset

from lepton_ray.data.order import SampleLedger, SampleOrder, mix64
from lepton_ray.errors import UsageError, shown
from lepton_ray.training.seeds import seed_torch

RECENT = 256
"""Slices that are remembered: a loader may be ahead of the loop by so many batches."""


class EpochPlan:
    """Which samples make up batch `index` of epoch `epoch`; unlike a task's batches these end with the epoch.

    Args:
        rows: samples of the dataset.
        global_batch: samples per step over all ranks.
        seed: decides the order.
        rank: this rank.
        world_size: number of ranks.
        drop_last: leave out the smaller last batch of each epoch.
    """

    def __init__(
        self, rows: int, global_batch: int, seed: int, rank: int, world_size: int, *, drop_last: bool = False
    ) -> None:
        if global_batch < world_size:
            raise UsageError(f"batches: batch_size is {global_batch}, less than the {world_size} ranks; raise it")
        used = rows - rows % global_batch if drop_last else rows
        if used == 0:
            raise UsageError(f"batches: {rows} samples make no batch of {global_batch}; lower batch_size")
        self.rows, self.used, self.global_batch = rows, used, global_batch
        self.steps = -(-used // global_batch)
        """Steps of one epoch."""
        self._order = SampleOrder(rows, seed)
        self._seed = np.uint64(mix64(np.array([seed], np.uint64))[0])
        self._rank, self._world_size = rank, world_size
        self._recent: dict[tuple[int, int], tuple[list[tuple[int, int]], float]] = {}

    @property
    def even(self) -> bool:
        """Whether every rank has the same number of samples in every step."""
        smallest = self.used % self.global_batch or self.global_batch
        return self.global_batch % self._world_size == 0 and smallest % self._world_size == 0

    def slice(self, epoch: int, index: int) -> tuple[list[tuple[int, int]], float]:
        """This rank's samples of a batch, each an id and a seed, and the weight of their mean loss.

        The weight is rank's samples x world size / samples of the batch: with it the mean over the ranks is the mean
        over the samples. A rank without a sample gets one of weight 0, to keep step with the others.
        """
        if (epoch, index) not in self._recent:  # asked for by the loader, for the weight and for the account
            while len(self._recent) >= RECENT:
                self._recent.pop(next(iter(self._recent)))
            self._recent[epoch, index] = self._slice(epoch, index)
        return self._recent[epoch, index]

    def _slice(self, epoch: int, index: int) -> tuple[list[tuple[int, int]], float]:
        start = index * self.global_batch
        count = min(self.global_batch, self.used - start)
        first, last = (count * number // self._world_size for number in (self._rank, self._rank + 1))
        base = epoch * self.rows + start
        ids = self._order.sample_ids(base, count)
        mine = ids[first:last] if last > first else ids[:1]
        with np.errstate(over="ignore"):
            offsets = np.arange(base + first, base + first + len(mine), dtype=np.uint64)
            seeds = mix64(offsets + self._seed) >> np.uint64(33)
        return list(zip(mine.tolist(), seeds.tolist(), strict=True)), (last - first) * self._world_size / count

    @property
    def largest(self) -> int:
        """Samples of one batch of a rank at most."""
        return -(-self.global_batch // self._world_size)

    def ids(self, epoch: int, index: int) -> npt.NDArray[np.int64]:
        """This rank's samples of a batch, shape `[n]`; none where it has no share."""
        pairs, weight = self.slice(epoch, index)
        return np.array([identity for identity, _ in pairs] if weight else [], np.int64)

    def account(self, ledger: SampleLedger, epoch: int, first: int, last: int) -> None:
        """Enter this rank's samples of batches `first` to `last - 1` of an epoch into a ledger."""
        for index in range(first, last):
            ledger.add(epoch, self.ids(epoch, index))


class _Positions(Sampler[list[tuple[int, int]]]):
    """The batches of one epoch from `start` on, as a DataLoader takes them."""

    def __init__(self, plan: EpochPlan, epoch: int, start: int) -> None:
        self._plan, self._epoch, self._start = plan, epoch, start

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for index in range(self._start, self._plan.steps):
            yield self._plan.slice(self._epoch, index)[0]

    def __len__(self) -> int:
        return self._plan.steps - self._start


class _Seeded(Dataset[Any]):
    """A dataset whose random changes of a sample depend on the sample's position alone."""

    def __init__(self, dataset: Any) -> None:
        self._dataset = dataset

    def __getitem__(self, at: tuple[int, int]) -> Any:
        identity, seed = at
        random.seed(seed)
        np.random.seed(seed)  # noqa: NPY002 - what datasets in the field use
        seed_torch(seed)  # datasets draw on the CPU
        return self._dataset[identity]


def load(
    dataset: Any, plan: EpochPlan, epoch: int, start: int, *, collate: Callable[[list[Any]], Any] | None, workers: int
) -> Iterator[Any]:
    """The rank's batches of an epoch from batch `start` on, as torch's DataLoader collates them.

    Args:
        dataset: has `len` and gives a sample by number.
        plan: which samples.
        epoch: the epoch, from 0.
        start: first batch.
        collate: joins samples to a batch; None is torch's own.
        workers: processes that load ahead; 0 loads in the rank.
    """
    if type(dataset) is TensorDataset and collate is None and workers == 0:
        return _taken(dataset, plan, epoch, start)
    loader: DataLoader[Any] = DataLoader(
        _Seeded(dataset),
        batch_sampler=_Positions(plan, epoch, start),
        collate_fn=collate,
        num_workers=workers,
        pin_memory=torch.cuda.is_available(),
    )
    return iter(loader)


def _taken(dataset: TensorDataset, plan: EpochPlan, epoch: int, start: int) -> Iterator[list[torch.Tensor]]:
    """What the loader gives of tensors, taken from them at once and not sample by sample."""
    for index in range(start, plan.steps):
        ids = torch.tensor([identity for identity, _ in plan.slice(epoch, index)[0]])
        yield [tensor[ids] for tensor in dataset.tensors]


def length_of(dataset: Any) -> int:
    """Samples of a dataset. Raises UsageError for one without a length (an iterable one has no positions)."""
    try:
        rows = len(dataset)
    except TypeError as error:
        raise UsageError(
            f"batches: {shown(type(dataset).__name__)} has no length; exact resume needs samples by number "
            "(__len__ and __getitem__)"
        ) from error
    if rows == 0:
        raise UsageError("batches: the dataset is empty; give one with samples")
    return rows
