"""Scenarios: a load, the faults that hit it, and where, all drawn from one number.

A run is driven by one attempt after another. Each attempt but the last meets one fault while it works; damage to what
is stored comes between attempts. Places are counted, not timed: "at the fourth write after the first commit" is the
same place on a busy machine. A fault waits for a least load (`warm` commits of its attempt), as one that hits an idle
system proves nothing; the checkers refuse a history in which that was not so.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Literal

Kind = Literal[
    "calm", "kill", "kill_after", "away", "lost", "zombie", "zombie_after", "collect", "intruder", "rot", "renewal"
]
"""What happens to an attempt at its n-th write.

`calm`: nothing. `kill`: it dies before the write. `kill_after`: after it. `away`: storage is away for some calls.
`lost`: the write is done and its answer lost. `zombie`: it freezes before the write, another attempt takes over, and it
thaws later. `zombie_after`: the same a few calls, reads among them, after the write. `collect`: the orphans are
collected just then. `intruder`: another driver tries to take the run from it while it lives. `rot`: a committed
checkpoint loses bytes just then. `renewal`: the answer to a renewal of its lease is lost."""

Damage = Literal["flip", "flip_manifest", "truncate", "truncate_manifest", "delete", "empty"]
"""What happens to a stored checkpoint: one bit of a file or of the manifest; an end cut off; a file gone or empty."""

FAULTS: tuple[Kind, ...] = (
    *("kill", "kill", "kill_after", "away", "lost", "lost", "zombie", "zombie", "zombie_after"),
    *("collect", "rot", "rot", "renewal"),
)
DAMAGES: tuple[Damage, ...] = ("flip", "flip", "flip_manifest", "truncate", "truncate_manifest", "delete", "empty")


@dataclass(frozen=True)
class Chapter:
    """One attempt, and what is damaged after it."""

    fault: Kind
    warm: int
    """Commits of this attempt before the fault counts writes."""
    at: int
    """Writes (puts and deletes) that go through between then and the fault."""
    aimed: bool = False
    """Whether only writes to manifests are counted and hit: there a commit protocol is weakest."""
    calls: int = 1
    """For `away` and `lost`: calls in a row that it lasts; for `zombie_after`: calls until it freezes."""
    thaw: int = 1
    """For zombies: commits of the attempts after it until it goes on; 0 is as soon as the next one has resumed."""
    damages: tuple[tuple[Damage, int], ...] = ()
    """What is damaged when the attempt is over: how, and the how-manieth newest checkpoint (0 is the newest)."""


@dataclass(frozen=True)
class Scenario:
    """What is played."""

    seed: int
    total: int
    """Steps of the run."""
    every: int
    """Steps between two checkpoints."""
    keep: int
    batch: int
    rows: int
    chapters: tuple[Chapter, ...]

    @classmethod
    def draw(cls, seed: int, faults: tuple[Kind, ...] = FAULTS, chapters: int | None = None) -> Scenario:
        """The scenario of a seed: the same one each time, on every machine."""
        draw = random.Random(f"scenario {seed}")  # noqa: S311 - not a secret
        rows = draw.randint(20, 120)
        made = [_chapter(draw, faults) for _ in range(chapters or draw.randint(1, 4))]
        every = draw.randint(2, 5)
        return cls(
            seed, every * draw.randint(10, 14) + draw.randint(0, every - 1), every, draw.choice((2, 2, 3)),
            draw.randint(2, 9), rows, (*made, Chapter("calm", 0, 0)),
        )  # fmt: skip

    def describe(self) -> str:
        """One line for a person who looks at a failure."""
        parts = [
            f"{c.fault}@{c.warm}+{c.at}{'m' if c.aimed else ''}"
            + "".join(f"/{kind}#{which}" for kind, which in c.damages)
            for c in self.chapters
        ]
        return f"seed {self.seed}: {self.total} steps, every {self.every}, keep {self.keep}: {' '.join(parts)}"


def _chapter(draw: random.Random, faults: tuple[Kind, ...]) -> Chapter:
    newest = 0
    damages = []
    while draw.random() < 0.4 and newest < 3:
        damages.append((draw.choice(DAMAGES), newest))
        newest += 1
    aimed = draw.random() < 0.5
    return Chapter(
        draw.choice(faults), draw.randint(1, 3) if draw.random() < 0.75 else draw.randint(8, 13),
        draw.randint(0, 2 if aimed else 5), aimed, draw.randint(1, 4), draw.randint(0, 3), tuple(damages),
    )  # fmt: skip
