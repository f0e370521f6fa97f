"""Whether what a source rejected, and what cleaning left out of it, is little enough to go on."""

from __future__ import annotations

from lepton_ray.data.cleaning import CleaningReport
from lepton_ray.data.sources import Source
from lepton_ray.errors import UsageError, shown

EARLY_ROWS = 10_000
"""From this many rows on, too large a share of rejected ones ends an ingest at once and not only at its end."""


def check_share(opened: Source, rows_read: int, most: float, *, at_end: bool) -> None:
    """Raise UsageError, naming the first rejected row, where more than a share `most` of all rows was rejected.

    Args:
        opened: the source, with what it rejected so far.
        rows_read: rows that it gave so far.
        most: 0 to 1.
        at_end: all rows were read; before, few of them decide nothing.
    """
    rejected, total = opened.rejects.total, rows_read + opened.rejects.total
    if rejected > most * total and (at_end or total >= EARLY_ROWS):
        raise UsageError(
            f"source {shown(opened.name)}: {rejected} of {total} rows rejected, more than {most:.4g} of them; the "
            f"first: {opened.rejects.first()}; mend them or raise the limit max_rejected_share"
        )


def check_strict(opened: Source, found: CleaningReport) -> None:
    """Raise UsageError where a row was left out or a warning given."""
    faults = {**opened.rejects.counts, **found.reasons}
    told = [f"{count} {reason}" for reason, count in faults.items()] + opened.warnings
    if told:
        raise UsageError(
            f"source {shown(opened.name)}: strict, and not all of it is good: {shown('; '.join(told), 300)}"
        )
