"""Exact order statistics (median, quartiles) of columns that are never in one place.

The bits of a number are turned into a whole number of the same order. A first look counts the numbers by their highest
16 bits, and so finds in which of 65,536 drawers the wanted one lies; the next look counts only that drawer by the next
16 bits; once few numbers are left in the drawers they are gathered and sorted. Two or three looks at the rows, half a
megabyte of counts, and the same answer on one machine as on a thousand: t-digests and samples give neither.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

UInt64Array = npt.NDArray[np.uint64]
Int64Array = npt.NDArray[np.int64]
Float64Array = npt.NDArray[np.float64]

FEW = 65_536
"""Numbers that are gathered rather than counted once more."""
_SIGN = np.uint64(1 << 63)


def ordered_bits(numbers: Float64Array) -> UInt64Array:
    """Finite numbers as unsigned integers in the same order."""
    bits = (numbers + 0.0).view(np.uint64)  # -0.0 becomes 0.0
    return np.where(bits & _SIGN, ~bits, bits | _SIGN)


def numbers_of(bits: UInt64Array) -> Float64Array:
    """The inverse of `ordered_bits`."""
    return np.where(bits & _SIGN, bits & ~_SIGN, ~bits).astype(np.uint64).view(np.float64)


@dataclass
class Search:
    """The search for the numbers of some ranks in one column; each look narrows it."""

    shares: tuple[float, ...]
    """Quantiles wanted, 0 to 1."""
    ranks: list[int] = field(default_factory=list)
    """Places in the sorted column that are looked for, from 0."""
    drawers: list[int] = field(default_factory=list)
    """For each rank the highest bits of the number, as far as known."""
    before: list[int] = field(default_factory=list)
    """For each rank how many numbers are below its drawer."""
    level: int = 0
    """How many times 16 bits are known."""
    inside: int = 0
    """Numbers in the drawers that are left."""
    found: dict[int, float] = field(default_factory=dict)
    count: int = -1
    """Numbers in the column; -1 before the first look."""

    @property
    def done(self) -> bool:
        """Whether all numbers are known."""
        return self.count == 0 or (self.count > 0 and len(self.found) == len(set(self.ranks)))

    @property
    def gathers(self) -> bool:
        """Whether the next look gathers the numbers of the drawers; otherwise it counts them."""
        return self.level > 0 and self.inside <= FEW

    def look(self, numbers: Float64Array) -> Int64Array | Float64Array:
        """What a piece of the column has to say; finite numbers, in any order."""
        bits = ordered_bits(numbers)
        if self.gathers:
            high = bits >> np.uint64(64 - 16 * self.level)
            return numbers[np.isin(high, np.array(sorted(set(self.drawers)), np.uint64))]
        shift = np.uint64(48 - 16 * self.level)
        if self.level == 0:
            return np.bincount((bits >> shift).astype(np.int64), minlength=65_536)
        counts = []
        for drawer in sorted(set(self.drawers)):
            here = bits[(bits >> (shift + np.uint64(16))) == np.uint64(drawer)]
            low = (here >> shift) & np.uint64(0xFFFF)
            counts.append(np.bincount(low.astype(np.int64), minlength=65_536))
        return np.concatenate(counts)

    def narrow(self, answers: list[Int64Array] | list[Float64Array]) -> None:
        """Take in what all pieces said."""
        if self.gathers:
            self._finish(np.concatenate(answers) if answers else np.empty(0))
            return
        counts = np.sum(np.stack(answers), axis=0).reshape(-1, 65_536)
        if self.level == 0:
            self._begin(int(counts.sum()))
            if self.count == 0:
                return
        drawers = sorted(set(self.drawers))
        self.inside, seen = 0, set()
        for place, rank in enumerate(self.ranks):
            row = counts[drawers.index(self.drawers[place])] if self.level else counts[0]
            ends = np.cumsum(row)
            low = int(np.searchsorted(ends, rank - self.before[place], side="right"))
            self.before[place] += int(ends[low - 1]) if low else 0
            self.drawers[place] = (self.drawers[place] << 16) | low
            if self.drawers[place] not in seen:
                seen.add(self.drawers[place])
                self.inside += int(row[low])
        self.level += 1
        if self.level == 4:  # every bit is known
            for rank, drawer in zip(self.ranks, self.drawers, strict=True):
                self.found[rank] = float(numbers_of(np.array([drawer], np.uint64))[0])

    def quantiles(self) -> list[float] | None:
        """The quantiles, between two numbers by linear interpolation (numpy's default); None where there are none."""
        if self.count == 0:
            return None
        values = []
        for share in self.shares:
            place = share * (self.count - 1)
            low = int(np.floor(place))
            below, above = self.found[low], self.found[min(low + 1, self.count - 1)]
            # the middle of two, so that neither their sum nor their difference can overflow
            part = place - low
            values.append(below if part == 0 or below == above else below * (1 - part) + above * part)
        return values

    def _begin(self, count: int) -> None:
        self.count = count
        ranks = set()
        for share in self.shares:
            low = int(np.floor(share * (count - 1)))
            ranks |= {low, min(low + 1, count - 1)}
        self.ranks = sorted(ranks) if count else []
        self.drawers, self.before = [0] * len(self.ranks), [0] * len(self.ranks)

    def _finish(self, numbers: Float64Array) -> None:
        ordered = np.sort(numbers)
        high = ordered_bits(ordered) >> np.uint64(64 - 16 * self.level)
        for place, rank in enumerate(self.ranks):
            first = int(np.searchsorted(high, np.uint64(self.drawers[place]), side="left"))
            self.found[rank] = float(ordered[first + rank - self.before[place]])
