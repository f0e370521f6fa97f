"""Rows and files that a source could not give: which, and why. Bounded, however many there are."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from lepton_ray.errors import shown

MAX_KEPT = 10_000
"""Rejected rows kept one by one; further ones are only counted."""


@dataclass(frozen=True)
class Rejected:
    """One row or file that stays out of the table."""

    file: str
    """Path or URI of the file, or what the source is called."""
    row: int | None
    """The row of that file, counted from 1; None where the file is one row."""
    rule: str
    """Which rule it breaks, e.g. `image cannot be decoded`."""
    reason: str
    """The value seen and what was expected."""


@dataclass
class Rejects:
    """All that a source rejected."""

    counts: Counter[str] = field(default_factory=Counter)
    """Rows by rule."""
    rows: list[Rejected] = field(default_factory=list)
    """The first 10,000 of them."""

    @property
    def total(self) -> int:
        """Rows rejected."""
        return self.counts.total()

    def add(self, file: str, row: int | None, rule: str, reason: str) -> None:
        """Enter a row."""
        self.counts[rule] += 1
        if len(self.rows) < MAX_KEPT:
            self.rows.append(Rejected(file, row, rule, reason))

    def first(self) -> str:
        """The first of them in one line, for messages."""
        row = self.rows[0]
        where = shown(row.file, 200) + ("" if row.row is None else f" row {row.row}")
        return f"{where}: {row.rule}, {row.reason}"


class Unreadable(Exception):  # noqa: N818 - no error of the program: a finding about one file
    """A file that cannot become a row: the rule it breaks and why."""

    def __init__(self, rule: str, reason: str) -> None:
        super().__init__(f"{rule}: {reason}")
        self.rule, self.reason = rule, reason
