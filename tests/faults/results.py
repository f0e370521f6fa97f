"""How much is tried, and the table of what came out."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

SEEDS = "LEPTON_FAULT_SEEDS"
"""`all`: what `make faults` runs; a number: that many of each; unset: the slice of `make test`."""
TABLE = "LEPTON_FAULT_TABLE"
"""File that the table of results is written to."""
HEAD = """# What was injected, and what came of it

Written by `make faults`; tests/faults/README.md says how each figure is made.

"""


def repeats(few: int, many: int) -> int:
    """How often something is tried: `few` in `make test`, `many` in `make faults`."""
    wanted = os.environ.get(SEEDS, "")
    return many if wanted == "all" else int(wanted) if wanted else few


@dataclass
class Table:
    """One row per fault: id of the fault list, fault, how it was injected, repeats, outcome."""

    rows: list[tuple[str, str, str, str, str]] = field(default_factory=list)

    def add(self, fault_id: str, fault: str, injected: str, count: int | str, outcome: str) -> None:
        """Enter a result; a row per fault and way of injection."""
        self.rows.append((fault_id, fault, injected, str(count), outcome))

    def markdown(self) -> str:
        """The table, by id."""
        head = "| id | fault | injected | repeats | outcome |\n|---|---|---|---|---|\n"
        return head + "".join(f"| {' | '.join(row)} |\n" for row in sorted(self.rows))

    def write(self) -> None:
        """Write the page to the file that the environment names, if it names one."""
        if os.environ.get(TABLE) and self.rows:
            Path(os.environ[TABLE]).write_text(HEAD + self.markdown(), encoding="utf-8")
