"""What a cleaning found and did, step by step; plain data, kept beside the table as Parquet and as a page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import pyarrow as pa

EXAMPLES = 20
"""Reasons that a report tells in full."""


@dataclass
class StepOutcome:
    """What one step did."""

    step: int
    """Its place in the plan, from 0."""
    rule: str
    columns: list[str]
    dropped: int = 0
    """Rows left out by the plan's own wish (duplicates, `missing: {fill: drop}`)."""
    quarantined: int = 0
    """Rows that failed."""
    changed: int = 0
    """Rows that stay and of which it changed a value."""
    learnt: dict[str, Any] = field(default_factory=dict)
    """The figures that it learnt from the table: fill values, bounds."""


@dataclass
class CleaningOutcome:
    """What a cleaning found and did."""

    table: str
    from_version: int
    version: int
    """The version that holds the cleaned rows; `from_version` where there was nothing to do."""
    plan_sha256: str
    rows_read: int
    rows_written: int
    """Rows of the cleaned table."""
    quarantine: str | None = None
    """The quarantine table with the rows that failed, `name@version`; None where none did."""
    steps: list[StepOutcome] = field(default_factory=list)
    missing: dict[str, tuple[int, int]] = field(default_factory=dict)
    """By column: nulls before, among the rows read, and after, among those kept."""
    examples: list[str] = field(default_factory=list)
    """The first 20 reasons for which rows failed."""
    state: str = "cleaned"
    """`cleaned`, `unchanged` (the plan found nothing to do), `already clean` (this plan made this very version), or
    `dry run`."""
    page: str | None = None
    """Key of the HTML page of this report in the store."""
    seconds: float = 0.0

    @property
    def rows_dropped(self) -> int:
        """Rows left out by the plan's own wish."""
        return sum(step.dropped for step in self.steps)

    @property
    def rows_quarantined(self) -> int:
        """Rows that failed."""
        return sum(step.quarantined for step in self.steps)

    @property
    def did_nothing(self) -> bool:
        """Whether no row went and no value changed."""
        return not any(step.dropped or step.quarantined or step.changed for step in self.steps)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        return {**asdict(self), "rows_dropped": self.rows_dropped, "rows_quarantined": self.rows_quarantined}

    def to_arrow(self) -> pa.Table:
        """A line for each step, for the Parquet file of the report."""
        import json

        lines: dict[str, Sequence[Any]] = {
            "step": [each.step for each in self.steps],
            "rule": [each.rule for each in self.steps],
            "columns": [", ".join(each.columns) for each in self.steps],
            "dropped": [each.dropped for each in self.steps],
            "quarantined": [each.quarantined for each in self.steps],
            "changed": [each.changed for each in self.steps],
            "learnt": [json.dumps(each.learnt) for each in self.steps],
        }
        facts = {
            "table": self.table, "from_version": str(self.from_version), "version": str(self.version),
            "plan_sha256": self.plan_sha256, "rows_read": str(self.rows_read), "rows_written": str(self.rows_written),
        }  # fmt: skip
        return pa.table(lines).replace_schema_metadata(facts)
