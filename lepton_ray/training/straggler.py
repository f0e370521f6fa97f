"""Whether a rank is persistently slower than the others in what it computes itself. Pure.

Compared is each rank's own compute of the same steps: forward, backward and optimiser without the wait for the gradient
exchange. Steps are joined to blocks of `BLOCK_S` at least, since a rank that is throttled (a CPU quota) computes some
short steps at full speed and then none for a while. A block is slow for a rank that takes `RATIO` times as long as the
median of the others, and `EXCESS_S` and a `SHARE` of the block's time longer. A rank is a straggler that was slow in
nearly all of the newest blocks, or in most of a longer row of them (`WINDOWS`), and so in all of these together. It is
told once, until it was slow in few of the newest (`CLEARED`).

The bounds: two ranks on a two-core machine with a busy third process are slow now and then for half a second or for
two, each in its turn; what they are not is slow twelve times in a row. Steps that last longer than a block, as a
straggler's do, name it after twelve of them.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from lepton_ray.training.beat_reading import StepTime

RATIO = 1.5
EXCESS_S = 0.02
SHARE = 0.1
BLOCK_S = 0.2
WINDOWS = ((13, 12), (60, 36))
"""Of so many of the newest blocks, so many were slow."""
CLEARED = (20, 4)
"""Of so many of the newest blocks, at most so many were slow."""


@dataclass(frozen=True)
class Straggler:
    """A rank that holds the others up."""

    rank: int
    ratio: float
    """Its own compute, as a multiple of the median of the others."""
    slow_blocks: int
    """Of `blocks`."""
    blocks: int
    first_step: int
    last_step: int
    """What was looked at."""
    own_s: Mapping[int, float]
    """Own compute per step, by rank."""

    @property
    def words(self) -> str:
        """One sentence with the figures."""
        others = statistics.median(each for rank, each in self.own_s.items() if rank != self.rank)
        return (
            f"rank {self.rank} computes {self.ratio:.1f} times as long as the others: {self.own_s[self.rank]:.3f} s a "
            f"step beside {others:.3f} s, in steps {self.first_step} to {self.last_step}"
        )


@dataclass
class _Block:
    """Some steps in a row."""

    first_step: int
    last_step: int
    steps: int = 0
    whole_s: float = 0.0
    own_s: dict[int, float] = field(default_factory=dict)

    def add(self, step: int, times: Mapping[int, StepTime]) -> None:
        self.last_step = step
        self.steps += 1
        self.whole_s += max(each.whole_s for each in times.values())
        for rank, each in times.items():
            self.own_s[rank] = self.own_s.get(rank, 0.0) + each.own_s

    def is_slow(self, rank: int) -> bool:
        excess = self.own_s[rank] - _others(self.own_s, rank)
        return _is_longer(self.own_s, rank) and excess > max(EXCESS_S, SHARE * self.whole_s)


class StragglerWatch:
    """Looks at the ranks of one worker group while they train."""

    def __init__(self) -> None:
        self._blocks: deque[_Block] = deque(maxlen=max(length for length, _ in WINDOWS))
        self._open: _Block | None = None
        self._last = 0
        self._told: set[int] = set()

    def see(self, times: Mapping[int, Sequence[StepTime]]) -> list[Straggler]:
        """Stragglers that were not told before.

        Args:
            times: by rank, each rank's newest steps, oldest first; those that were seen before are passed over. Steps
                that not all ranks have, and those whose own compute is not known, do not count.
        """
        if len(times) < 2:
            return []
        by_rank = {rank: {each.step: each for each in mine} for rank, mine in times.items()}
        steps = set.intersection(*(set(mine) for mine in by_rank.values()))
        found: list[Straggler] = []
        for step in sorted(step for step in steps if step > self._last):
            self._last = step
            here = {rank: mine[step] for rank, mine in by_rank.items()}
            if any(math.isnan(each.own_s) for each in here.values()):
                continue
            if self._open is None or self._open.own_s.keys() != here.keys():
                self._open = _Block(step, step)
            self._open.add(step, here)
            if self._open.whole_s >= BLOCK_S:
                if self._blocks and self._blocks[-1].own_s.keys() != here.keys():
                    self._blocks.clear()
                self._blocks.append(self._open)
                self._open = None
                found += self._judge()
        return found

    def _judge(self) -> list[Straggler]:
        """After each block: who has become a straggler."""
        blocks, found = list(self._blocks), []
        for rank in blocks[-1].own_s:
            slow = [block.is_slow(rank) for block in blocks]
            length, most = CLEARED
            if rank in self._told and len(slow) >= length and sum(slow[-length:]) <= most:
                self._told.remove(rank)
                blocks = blocks[-length:]  # what it was told for is over
                self._blocks = deque(blocks, self._blocks.maxlen)
                slow = slow[-length:]
            for length, least in WINDOWS:
                if rank not in self._told and sum(slow[-length:]) >= least:
                    straggler = _straggler(rank, blocks[-length:], sum(slow[-length:]))
                    if straggler.ratio > RATIO:
                        self._told.add(rank)
                        found.append(straggler)
        return found


def _straggler(rank: int, blocks: Sequence[_Block], slow: int) -> Straggler:
    steps = sum(block.steps for block in blocks)
    own_s = {each: sum(block.own_s[each] for block in blocks) / steps for each in blocks[-1].own_s}
    ratio = own_s[rank] / max(_others(own_s, rank), 1e-9)
    return Straggler(rank, ratio, slow, len(blocks), blocks[0].first_step, blocks[-1].last_step, own_s)


def _others(own_s: Mapping[int, float], rank: int) -> float:
    return statistics.median(each for other, each in own_s.items() if other != rank)


def _is_longer(own_s: Mapping[int, float], rank: int) -> bool:
    return own_s[rank] > RATIO * _others(own_s, rank)
