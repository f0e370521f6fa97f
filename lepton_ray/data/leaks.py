"""What the sides of a split share: the same key, the same content, or nearly the same text.

A row that a model has learnt from says nothing about how well it does. A split by keys cannot see that a text stands in
the table twice, once with other white space; this looks.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from lepton_ray.data.cleaning import near
from lepton_ray.data.cleaning.rules import missing
from lepton_ray.data.cleaning.steps import array_of
from lepton_ray.data.row_hash import hash_rows
from lepton_ray.data.split import Split
from lepton_ray.errors import UsageError, shown

EXAMPLES = 5
"""Pairs that are told of each kind."""
Int64Array = npt.NDArray[np.int64]


@dataclass
class Leaks:
    """Rows of the held-out or test side that have a counterpart on the training side, by what they share."""

    same_key: int = 0
    same_content: int = 0
    """Equal in every column that was compared."""
    near: int | None = None
    """Texts that are nearly the same; None where no column was asked for."""
    examples: dict[str, list[tuple[str, str]]] = field(default_factory=dict)
    """By kind: keys (row numbers where there are none) of a row and of its counterpart."""

    @property
    def found(self) -> bool:
        """Whether there is any."""
        return bool(self.same_key or self.same_content or self.near)

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        return asdict(self)


def find_leaks(
    rows: pa.Table, split: Split, *, key: str = "key", ignore: tuple[str, ...] = (), near_column: str | None = None,
    threshold: float = 0.8,
) -> Leaks:  # fmt: skip
    """Compare the sides of a split.

    Args:
        rows: all rows of the table. Memory: 16 bytes for each, about 1 KiB more where texts are compared.
        split: of these rows.
        key: the column that names a row; not looked at where the table has none.
        ignore: columns that say nothing about what a row is, e.g. the one that the table was split by.
        near_column: a column of text whose near duplicates count.
        threshold: share of common pieces from which two texts are near (see `settings.cleaning.NearDuplicates`).

    Raises UsageError for a column that is not there or holds no text.
    """
    side = np.zeros(rows.num_rows, bool)
    side[np.concatenate([split.held_out, split.test])] = True
    names = (
        rows[key].cast(pa.string()).to_pylist() if key in rows.column_names else [str(n) for n in range(rows.num_rows)]
    )
    found = Leaks()

    def tell(kind: str, pairs: Mapping[int, int]) -> int:
        told = [(names[one], names[other]) for one, other in sorted(pairs.items())[:EXAMPLES]]
        if told:
            found.examples[kind] = told
        return len(pairs)

    if key in rows.column_names:
        found.same_key = tell("same_key", _equal(rows.select([key]), side))
    content = [name for name in rows.column_names if name != key and name not in ignore]
    if content:
        found.same_content = tell("same_content", _equal(rows.select(content), side))
    if near_column is not None:
        found.near = tell("near", _near(rows, near_column, side, threshold))
    return found


def _equal(rows: pa.Table, side: npt.NDArray[np.bool_]) -> dict[int, int]:
    """For each row that is not learnt from one that is and equals it, where there is one."""
    hashes = hash_rows(rows)
    order = np.lexsort((side, hashes[:, 1], hashes[:, 0]))  # of equal rows those that are learnt from come first
    ordered, learnt = hashes[order], ~side[order]
    begins = np.ones(len(order), bool)
    begins[1:] = (ordered[1:] != ordered[:-1]).any(1)
    heads = np.flatnonzero(begins)
    head = heads[np.cumsum(begins) - 1] if len(order) else heads
    leak = np.flatnonzero(~learnt & learnt[head]) if len(order) else head
    return {int(order[at]): int(order[head[at]]) for at in leak}


def _near(rows: pa.Table, column: str, side: npt.NDArray[np.bool_], threshold: float) -> dict[int, int]:
    """The same for texts that are near each other, compared exactly."""
    if column not in rows.column_names:
        raise UsageError(f"no column {shown(column)}; the table has {shown(', '.join(rows.column_names), 200)}")
    texts = array_of(rows.select([column]).combine_chunks(), column)
    if not (pa.types.is_string(texts.type) or pa.types.is_large_string(texts.type)):
        raise UsageError(f"column {shown(column)} holds {texts.type}; expected text")
    places = np.flatnonzero(~missing(texts))
    texts = texts.take(pa.array(places))
    bands = np.empty((len(texts), near.banding(threshold)[0]), np.uint64)
    for low, high in near.slices(texts):
        bands[low:high] = near.band_hashes(*near.pieces_of(texts[low:high]), threshold)
    pairs = near.proposed(near.entries(bands, np.zeros(len(texts), np.uint64), np.arange(len(texts)), 0, 1))
    one, other = (pairs[name].to_numpy() for name in ("row", "of_row"))
    crosses = side[places[one]] != side[places[other]]
    one, other = one[crosses], other[crosses]
    needed = np.unique(np.concatenate([one, other]))
    told: dict[int, npt.NDArray[np.uint64]] = {}
    chosen = texts.take(pa.array(needed))
    for low, high in near.slices(chosen):
        pieces, starts = near.pieces_of(chosen[low:high])
        for place, (begin, end) in zip(needed[low:high].tolist(), itertools.pairwise(starts.tolist()), strict=True):
            told[place] = np.unique(pieces[begin:end])
    found: dict[int, int] = {}
    for first, second in zip(one.tolist(), other.tolist(), strict=True):
        outside, learnt = (first, second) if side[places[first]] else (second, first)
        if int(places[outside]) not in found and near.similarity(told[first], told[second]) >= threshold:
            found[int(places[outside])] = int(places[learnt])
    return found
