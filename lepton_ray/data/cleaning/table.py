"""Carry out a cleaning plan on a table: a new version, a quarantine table and a report, or nothing at all.

The rows are never in one place. Each pass looks at the columns it needs, piece by piece; between the passes only what
was learnt and one bit for each row is kept. The last pass judges, changes and writes in one go, and its files belong to
no version until both commits are made.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from typing import Literal

from lepton_ray.data.cleaning.outcome import CleaningOutcome
from lepton_ray.data.cleaning.passes import Here, OnRay, Passes
from lepton_ray.data.cleaning.pieces import Job
from lepton_ray.data.cleaning.publishing import Found, Publication, check_quarantine_name
from lepton_ray.data.cleaning.reading_plans import digest_of, schema_after, steps_of
from lepton_ray.data.cleaning.report import write_report
from lepton_ray.data.cleaning.rounds import Rounds
from lepton_ray.data.delta import commit_info
from lepton_ray.data.partitions import check_partition_columns
from lepton_ray.data.tables import open_table
from lepton_ray.errors import LeptonError, UnavailableError, UsageError, shown
from lepton_ray.settings.cleaning import CleaningPlan
from lepton_ray.storage import Store

RAY_BYTES = 2**30
"""Tables larger than this (compressed) are cleaned on Ray Data unless told otherwise."""
On = Literal["auto", "here", "ray"]


def clean(
    store: Store,
    name: str,
    plan: CleaningPlan,
    *,
    dry_run: bool = False,
    on: On = "auto",
    progress: Callable[[str], None] | None = None,
) -> CleaningOutcome:
    """Make a version of a table that keeps to a plan, from its newest version.

    Args:
        store: where the table is.
        name: of the table.
        plan: what must hold; see `lepton_ray.settings.cleaning`.
        dry_run: find out, and write nothing.
        on: `here` in this process, `ray` on Ray Data; `auto` takes Ray where the table has more than 1 GiB or
            RAY_ADDRESS is set. The result is the same to the last byte of each row.
        progress: called with what is being done.

    Returns:
        What was found. Where the newest version was made by this very plan, or where there is nothing to do, no
        version is written.

    Raises UsageError for a plan that does not fit the table or leaves no row, RefusedError where more rows fail than
    the plan allows, ConflictError when somebody else wrote to the table meanwhile. Nothing is written then.
    """
    started = time.monotonic()
    if "@" in name:
        raise UsageError(f"table {shown(name)}: a cleaning starts from the newest version; leave out the @")
    table = open_table(store, name)
    log = table.log
    steps = steps_of(plan, table.schema, table.ref)
    check_quarantine_name(name)
    digest = digest_of(plan)
    if table.num_rows == 0:
        raise UsageError(f"table {table.ref}: no rows in it; ingest some first")
    if (commit_info(store, name, table.version) or {}).get("lepton_plan") == digest:
        return CleaningOutcome(
            table=name, from_version=table.version, version=table.version, plan_sha256=digest,
            rows_read=table.num_rows, rows_written=table.num_rows, state="already clean",
        )  # fmt: skip
    schema = schema_after(steps, table.schema)
    check_partition_columns(schema, log.partition_by, f"table {table.ref} after the plan")
    publication = None
    if not dry_run:
        store.check_writable()
        publication = Publication(store, name, log, schema, digest)
    try:
        with _passes(on, sum(part.size for part in log.parts)) as passes:
            job = Job(store, f"datasets/{name}", log.parts, table.schema, steps)
            rounds = Rounds(job, passes, plan.max_quarantine, table.ref, progress or (lambda _: None))
            found = rounds.carry_out(publication.target if publication else None)
        outcome = rounds.outcome(name, table.version, digest)
    except BaseException:
        if publication is not None:
            with contextlib.suppress(LeptonError):  # the first error is the one to tell
                publication.discard_all()
        raise
    if publication is None:
        outcome.state = "dry run"
    elif outcome.did_nothing and schema.equals(table.schema):
        publication.discard(found)
        outcome.state = "unchanged"
    else:
        outcome.version, outcome.quarantine = _committed(publication, found, outcome.rows_written)
    outcome.seconds = time.monotonic() - started
    if outcome.state == "cleaned":
        outcome.page = write_report(store, outcome)
    return outcome


def _committed(publication: Publication, found: Found, rows: int) -> tuple[int, str | None]:
    """Make the versions; where that fails for sure, their files go."""
    try:
        return publication.commit(found, rows)
    except UnavailableError:
        raise  # the version may have been written after all: then its files must stay
    except LeptonError:
        publication.discard(found)
        raise


@contextlib.contextmanager
def _passes(on: On, size: int) -> Iterator[Passes]:
    """Where the work is done."""
    if on == "here" or (on == "auto" and size <= RAY_BYTES and not os.environ.get("RAY_ADDRESS")):
        yield Here()
        return
    from lepton_ray.cluster import connect

    with connect():
        yield OnRay()
