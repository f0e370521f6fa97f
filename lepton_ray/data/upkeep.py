"""What keeps a table in shape: `restore` an older version, `compact` many small data files into few."""

from __future__ import annotations

from collections.abc import Iterator

import pyarrow as pa

from lepton_ray.data import parts
from lepton_ray.data.commits import retried
from lepton_ray.data.edits import Change, Draft, carried_out, committed, part_rows
from lepton_ray.data.parts import Part
from lepton_ray.data.versions import open_table
from lepton_ray.errors import IntegrityError, UsageError, shown
from lepton_ray.storage import Store

SMALL = 2
"""A data file is joined with others where so many of its size would fit into one."""


def restore(store: Store, ref: str, *, dry_run: bool = False) -> Change:
    """Make a version that holds what an older one holds: same rows, columns and fingerprint.

    Args:
        store: where the table is.
        ref: `name@version` or `name@time` of what is wanted back.
        dry_run: look, and write nothing.

    Raises UsageError where no version is named, NotFoundError where it does not exist, IntegrityError where data files
    of it are gone, ConflictError when somebody else wrote to the table meanwhile.
    """
    if "@" not in ref:
        raise UsageError(f"table {shown(ref)}: name what is wanted back, e.g. {shown(ref)[1:-1]}@3")
    target = open_table(store, ref)
    draft = Draft.on(store, target.name, dry_run=dry_run)
    there = {entry.key.rpartition("/")[2] for entry in store.list(f"datasets/{target.name}")}
    gone = [part.name for part in target.log.parts if part.name.rpartition("/")[2] not in there]
    if gone:
        raise IntegrityError(
            f"table {target.ref}: {len(gone)} of its {len(target.log.parts)} data files are gone, by a vacuum or by "
            "accident; restore a version that lepton-ray data history shows as readable"
        )
    now, then = ({part.name: part for part in table.log.parts} for table in (draft.base, target))
    draft.removes = [part for name, part in now.items() if name not in then]
    adds = [part for name, part in then.items() if name not in now]
    draft.count("inserted", sum(part.rows for part in adds))
    draft.count("deleted", sum(part.rows for part in draft.removes))
    detail = f"version {target.version}"
    return committed(store, draft, "restore", detail, adds, target.schema, target.log.partition_by)


def compact(store: Store, name: str, *, dry_run: bool = False) -> Change:
    """Join small data files; the rows stay what they are, and in their order unless the table has partitions.

    Args:
        store: where the table is.
        name: of the table.
        dry_run: say how many files would be joined, and write nothing.

    Raises ConflictError where others wrote meanwhile in each of 20 tries. Nothing is written then.
    """

    def once() -> Change:
        draft = Draft.on(store, name, dry_run=dry_run)
        return carried_out(store, draft, "compact", "", lambda: _join(store, draft))

    return retried(once)


def _join(store: Store, draft: Draft) -> None:
    for group in _neighbours(draft.base.log.parts):
        waiting: list[tuple[Part, pa.Table]] = []
        for part in group:
            rows = part_rows(store, draft.base, part)
            if sum(piece.nbytes for _, piece in waiting) + rows.nbytes > parts.PART_BYTES:
                _write_joined(draft, waiting)
                waiting = []
            waiting.append((part, rows))
        _write_joined(draft, waiting)


def _write_joined(draft: Draft, waiting: list[tuple[Part, pa.Table]]) -> None:
    """Write the rows of some files as one file in the place of the first."""
    if len(waiting) > 1:
        draft.removes += [part for part, _ in waiting]
        draft.writer.replace(waiting[0][0], pa.concat_tables([rows for _, rows in waiting]))


def _neighbours(files: list[Part]) -> Iterator[list[Part]]:
    """Runs of small files that may become one: of one partition, with no large one between them."""
    groups: dict[object, list[Part]] = {}
    for part in files:
        if part.size * SMALL > parts.PART_BYTES:
            yield groups.pop(part.partition, [])
        else:
            groups.setdefault(part.partition, []).append(part)
    yield from groups.values()
