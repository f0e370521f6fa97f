"""Rows weighed by class: weights of their losses, and an order in which every class comes equally often.

Both keep what the plain order promises: which row stands at a global sample offset is a pure function of the rows, the
settings, the seed and the offset. So the position stays one integer, a changed number of ranks changes nothing, and
what a run should have used by now can be computed and compared with what it did use.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from lepton_ray.data.order import Int64Array, SampleLedger, SampleOrder, mix64
from lepton_ray.errors import UsageError, shown
from lepton_ray.settings.training import SamplingSettings

CHUNK = 2**18
"""Samples of which the expected account is computed at a time: some megabytes."""
_DRAW = 0xD1B54A32D192ED03  # odd; keeps the draws of a sample apart from its augmentation


class Order(Protocol):
    """Which row stands at which global sample offset."""

    rows: int
    """Samples per epoch."""

    def sample_ids(self, offset: int, count: int) -> Int64Array:
        """The rows at global offsets `offset` to `offset + count - 1`, int64 `[count]`."""

    def epochs_of(self, offset: int, count: int) -> Int64Array:
        """The epoch of each of these offsets, int64 `[count]`."""


@dataclass(frozen=True)
class Sampling:
    """In which order the training rows are used, and how much the loss of each counts."""

    order: Order
    row_weights: npt.NDArray[np.float32] | None = None
    """Factor on the loss of each row, shape `[rows]`; None where all count alike."""


def plan_sampling(
    settings: SamplingSettings, rows: int, seed: int, labels: pa.ChunkedArray | pa.Array | None = None
) -> Sampling:
    """What the settings mean for these rows.

    Args:
        settings: how rows are weighed.
        rows: number of training rows.
        seed: decides the order.
        labels: the class of each training row; not needed where the settings weigh nothing.

    Raises UsageError where labels are missing or no classes, or where the settings name a class that no row has.
    """
    if settings.class_weights == "none" and settings.weighted == "none":
        return Sampling(SampleOrder(rows, seed))
    names, codes = _classes(labels, rows)
    weights = None
    if settings.class_weights != "none":
        weights = _class_weights(settings.class_weights, names, codes)[codes]
    order = BalancedOrder(codes, seed) if settings.weighted == "balanced" else SampleOrder(rows, seed)
    return Sampling(order, weights)


class BalancedOrder:
    """Epochs of as many samples as there are rows, drawn with replacement, every class equally often.

    The sample at position p of an epoch belongs to class (q + epoch) mod classes, where q is what the plain order has
    at p: each class comes rows / classes times, up or down to a whole number, in shuffled places. The row is any one of
    the class, by a hash of seed and offset (64 bits modulo the n rows of the class: even but for n / 2**64).

    Args:
        codes: the class of each row, int64 `[rows]`, 0 to classes - 1, every class with a row.
        seed: another seed gives other draws.
    """

    def __init__(self, codes: Int64Array, seed: int) -> None:
        self._plain = SampleOrder(len(codes), seed)
        self.rows = len(codes)
        self._key = mix64(np.array([seed], np.uint64) ^ np.uint64(_DRAW))
        self._by_class = np.argsort(codes, kind="stable").astype(np.int64)
        self._counts = np.bincount(codes).astype(np.uint64)
        self._starts = (np.cumsum(self._counts) - self._counts).astype(np.int64)

    def sample_ids(self, offset: int, count: int) -> Int64Array:
        """The rows at global offsets `offset` to `offset + count - 1`, int64 `[count]`."""
        places, epochs = self._plain.sample_ids(offset, count), self.epochs_of(offset, count)
        classes = (places + epochs) % len(self._counts)
        with np.errstate(over="ignore"):  # the counter wraps modulo 2**64 on purpose
            counters = np.arange(offset, offset + count, dtype=np.uint64) * np.uint64(_DRAW) + self._key
        within = mix64(counters) % self._counts[classes]
        rows: Int64Array = self._by_class[self._starts[classes] + within.astype(np.int64)]
        return rows

    def epochs_of(self, offset: int, count: int) -> Int64Array:
        """The epoch of each of these offsets, int64 `[count]`."""
        return self._plain.epochs_of(offset, count)


def expected_ledger(order: Order, samples: int, left_out: Iterable[tuple[int, int]] = ()) -> SampleLedger:
    """The ledger of a run that used the samples at offsets 0 to `samples` - 1, each once.

    Args:
        order: says which rows those are.
        samples: the global sample offset that was reached.
        left_out: (first, last + 1) offsets that were never used, not overlapping.

    Takes about 30 ns per row for plain full epochs, 150 ns per sample otherwise.
    """
    gaps = sorted((max(0, first), min(last, samples)) for first, last in left_out if first < samples)
    ledger = SampleLedger()
    for epoch, start in enumerate(range(0, samples, order.rows)):
        stop = min(start + order.rows, samples)
        within = [(max(first, start), min(last, stop)) for first, last in gaps if first < stop and last > start]
        if isinstance(order, SampleOrder) and stop - start == order.rows and not within:
            ledger.add_full(epoch, order.rows)
            continue
        edges = [start, *(edge for gap in within for edge in gap), stop]
        for first, last in zip(edges[::2], edges[1::2], strict=True):
            for at in range(first, last, CHUNK):
                ledger.add(epoch, order.sample_ids(at, min(CHUNK, last - at)))
    return ledger


def _classes(labels: pa.ChunkedArray | pa.Array | None, rows: int) -> tuple[list[str], Int64Array]:
    """The names of the classes in the order of their values, and the class of each row."""
    if labels is None or len(labels) != rows:
        raise UsageError("training.sampling weighs rows by class: the rows have no labels; set it to none")
    kind = labels.type
    if not (pa.types.is_integer(kind) or pa.types.is_string(kind) or pa.types.is_large_string(kind)):
        raise UsageError(f"training.sampling weighs rows by class: the labels are {kind}; set it to none")
    if labels.null_count:
        raise UsageError("training.sampling weighs rows by class: a row has no label; ingest with missing dropped")
    values = pc.unique(labels)
    values = values.take(pc.sort_indices(values))
    codes = pc.index_in(labels, value_set=values).to_numpy(zero_copy_only=False).astype(np.int64)
    return [str(value) for value in values.to_pylist()], codes


def _class_weights(wanted: str | Mapping[str, float], names: list[str], codes: Int64Array) -> npt.NDArray[np.float32]:
    """The weight of each class, shape `[classes]`."""
    if isinstance(wanted, str):
        counts = np.bincount(codes, minlength=len(names))
        return (len(codes) / (len(names) * counts)).astype(np.float32)
    for name, weight in wanted.items():
        if name not in names:
            near = difflib.get_close_matches(name, names, n=1)
            hint = f"did you mean {shown(near[0])}?" if near else f"classes there: {shown(', '.join(names))}"
            raise UsageError(f"training.sampling.class_weights.{name}: no training row has this label; {hint}")
        if not 0.0 <= weight < np.inf:
            raise UsageError(f"training.sampling.class_weights.{name} is {weight}: expected 0 or more, finite")
    weights = np.array([wanted.get(name, 1.0) for name in names], np.float32)
    if not weights[codes].any():
        raise UsageError("training.sampling.class_weights: every training row has weight 0; raise one")
    return weights
