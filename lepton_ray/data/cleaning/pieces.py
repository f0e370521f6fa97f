"""The work on one piece of a table, wherever it is done: read what is needed, carry steps out, say what came of it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from lepton_ray.data.cleaning.group_steps import GroupStep
from lepton_ray.data.cleaning.steps import Fitting, Mask, Pieces, Step
from lepton_ray.data.evolution import fitted
from lepton_ray.data.partitions import Values, split
from lepton_ray.data.parts import Part, PartEncoder, decode_part, decode_slices, put_part, read_part
from lepton_ray.storage import Store

SLICE_ROWS = 16_384
"""Rows worked on at a time: what a piece needs beside itself and the file that is made of it."""
FILE, ROW, RULE, REASON, FROM = (
    "quarantine_file", "quarantine_row", "quarantine_rule", "quarantine_reason", "quarantine_from",
)  # fmt: skip
"""The columns that a quarantine table has beside those of its table."""


@dataclass
class Target:
    """Where the final pass writes."""

    folder: str
    version: int
    quarantine_folder: str
    quarantine_version: int
    token: str
    ref: str
    """The version cleaned, `name@version`."""
    schema: pa.Schema
    """Of the cleaned table."""
    partition_by: tuple[str, ...] = ()
    """Of the cleaned table: rows of one partition go to one file of each piece."""


@dataclass
class Job:
    """A table, the steps, and what was learnt so far; sent to whoever works on a piece."""

    store: Store
    folder: str
    parts: list[Part]
    schema: pa.Schema
    steps: list[Step[Any]]
    learnt: dict[int, Any] = field(default_factory=dict)
    """By the index of the step."""
    first: int = 0
    """The step from which rows are judged; what earlier ones decided is in the payload."""
    last: int = 0
    """The step before which work ends."""

    def look(self, fittings: dict[int, Fitting], index: int, payload: bytes) -> Pieces:
        """Judge the piece, then what the fittings see in it."""
        reads = {name for at in fittings for name in self.steps[at].reads(self.schema_before(at))}
        rows, alive, failed = self.carried_out(index, payload, reads)
        rows = rows.filter(pa.array(alive)) if not alive.all() else rows
        said = {"failed": failed}
        for at, fitting in fittings.items():
            said |= {f"{at}/{name}": table for name, table in fitting.look(rows).items()}
        return said

    def entries(self, step: GroupStep[Any], buckets: int, index: int, payload: bytes) -> Pieces:
        """What of the piece must meet what of others."""
        said = [
            step.entries(
                rows.filter(pa.array(alive)) if not alive.all() else rows, start + np.flatnonzero(alive), index, buckets
            )
            for start, rows, alive in self._slices(step, index, payload)
        ]
        return {"entries": pa.concat_tables(said).combine_chunks()}

    def compared(self, step: GroupStep[Any], index: int, payload: bytes) -> Pieces:
        """What the rows of the payload (those not dropped) tell about themselves."""
        if payload and not (~unpacked(payload, self.parts[index].rows)).any():
            return {}
        said: dict[str, list[pa.Table]] = {}
        for start, rows, alive in self._slices(step, index, payload):
            for name, table in (
                step.compared(rows.filter(pa.array(alive)), start + np.flatnonzero(alive)) or {}
            ).items():
                said.setdefault(name, []).append(table)
        return {name: pa.concat_tables(tables).combine_chunks() for name, tables in said.items()}

    def judged(self, index: int, payload: bytes) -> Pieces:
        """Judge the piece and no more."""
        return {"failed": self.carried_out(index, payload, set())[2]}

    def written(
        self, target: Target | None, reasons: dict[int, list[tuple[int, str, str]]], index: int, payload: bytes
    ) -> Pieces:
        """The final pass: judge what is left to judge, write what stays and what goes to quarantine, count changes."""
        dropped = unpacked(payload, self.parts[index].rows)
        kept: dict[Values, PartEncoder] = {}
        failed, gone = [_failed([])], sorted(reasons.get(index, []))
        changed = dict.fromkeys(range(len(self.steps)), 0)
        nulls = {name: [0, 0] for name in self.schema.names}
        quarantined: list[pa.Table] = []
        start = 0
        for before in self._whole(index):
            rows, alive, found, masks = self._run(before, dropped[start : start + before.num_rows], None)
            failed.append(_moved(found, start))
            rows = rows.filter(pa.array(alive)) if not alive.all() else rows
            for at, mask in masks.items():
                changed[at] += int((mask & alive).sum())
            for name, counts in nulls.items():
                counts[0] += before[name].null_count
                counts[1] += rows[name].null_count
            if target is not None:
                for values, some in split(rows.cast(target.schema), target.partition_by) if rows.num_rows else ():
                    if values not in kept:
                        kept[values] = PartEncoder(target.schema)
                    kept[values].add(some)
                here = [each for each in gone if start <= each[0] < start + before.num_rows]
                if out := self._gone(here, failed[-1]):
                    quarantined.append(self._quarantined(target, index, before, start, out))
            start += before.num_rows
        said = {
            "failed": pa.concat_tables(failed),
            "changed": pa.table({"step": list(changed), "rows": list(changed.values())}),
            "missing": pa.table(
                {
                    "column": list(nulls),
                    "before": [counts[0] for counts in nulls.values()],
                    "after": [counts[1] for counts in nulls.values()],
                }
            ),
        }
        if target is not None:
            said["files"] = self._write(target, index, kept, quarantined)
        return said

    def _gone(self, before: list[tuple[int, str, str]], failed: pa.Table) -> list[tuple[int, str, str]]:
        """The rows of a piece that go to quarantine: row, rule and reason."""
        lines = zip(*(failed[name].to_pylist() for name in ("row", "step", "reason")), strict=True)
        return before + [
            (row, self.steps[at].rule, reason) for row, at, reason in lines if not self.steps[at].leaves_out
        ]

    def _write(
        self, target: Target, index: int, kept: dict[Values, PartEncoder], quarantined: list[pa.Table]
    ) -> pa.Table:
        files = []
        for values, encoder in kept.items():
            part = put_part(self.store, target.folder, target.version, index, target.token, encoder, values)
            files.append(("kept", part))
        if quarantined:
            encoder = PartEncoder(quarantined[0].schema)
            encoder.add(pa.concat_tables(quarantined))
            folder, version = target.quarantine_folder, target.quarantine_version
            files.append(("gone", put_part(self.store, folder, version, index, target.token, encoder, ())))
        return pa.table(
            {"kind": [kind for kind, _ in files], "part": [json.dumps(asdict(part)) for _, part in files]}, FILES
        )

    def _quarantined(
        self, target: Target, index: int, before: pa.Table, start: int, gone: list[tuple[int, str, str]]
    ) -> pa.Table:
        gone = sorted(gone)
        rows = before.take(pa.array([row - start for row, _, _ in gone], pa.int64()))
        more = {
            FILE: [self.parts[index].name] * len(gone), ROW: [row for row, _, _ in gone],
            RULE: [rule for _, rule, _ in gone], REASON: [reason for _, _, reason in gone],
            FROM: [target.ref] * len(gone),
        }  # fmt: skip
        for name, values in more.items():
            rows = rows.append_column(name, pa.array(values, pa.int64() if name == ROW else pa.string()))
        return rows

    def __post_init__(self) -> None:
        self._schemas = [self.schema]
        for step in self.steps:
            self._schemas.append(step.check(self._schemas[-1]))

    def schema_before(self, index: int) -> pa.Schema:
        """The schema that a step finds."""
        return self._schemas[index]

    def carried_out(self, index: int, payload: bytes, reads: set[str]) -> tuple[pa.Table, Mask, pa.Table]:
        """The columns of a piece after the steps, which rows are left, and those that failed by the steps judged."""
        needed = self._needed(reads)
        rows = self.read(index, sorted(needed)) if needed else pa.table({})
        count = self.parts[index].rows
        if not needed:
            return rows, ~unpacked(payload, count), _failed([])
        rows, alive, failed, _ = self._run(rows, unpacked(payload, count), needed)
        return rows, alive, failed

    def _needed(self, reads: set[str]) -> set[str]:
        """The columns to read so that `reads` can be seen after the steps and rows can be judged."""
        needed = set(reads)
        for at in range(self.last - 1, -1, -1):
            step = self.steps[at]
            judged = at >= self.first and step.judges and not isinstance(step, GroupStep)
            if judged:
                needed |= step.reads(self.schema_before(at))
            elif step.writes() & needed:  # what it would write for nobody need not be read
                needed |= step.reads(self.schema_before(at)) - (step.writes() - needed)
        return needed

    def _slices(self, step: GroupStep[Any], index: int, payload: bytes) -> Iterator[tuple[int, pa.Table, Mask]]:
        """Some rows at a time what a step sees of a piece: where they begin, the rows, and which are left."""
        reads = self._needed(step.reads(self.schema_before(self.last)))
        before = self.read(index, sorted(reads))
        dropped = unpacked(payload, before.num_rows)
        for start in range(0, max(1, before.num_rows), SLICE_ROWS):
            some = before.slice(start, SLICE_ROWS)
            rows, alive, _, _ = self._run(some, dropped[start : start + SLICE_ROWS], reads)
            yield start, rows, alive

    def _whole(self, index: int) -> Iterator[pa.Table]:
        """All columns of a piece, some rows at a time; its bytes are checked first."""
        part = self.parts[index]
        data, _ = read_part(self.store, self.folder, part.name)
        for rows in decode_slices(data, f"data file {part.name}", SLICE_ROWS):
            yield fitted(rows, self.schema, part.partition)

    def read(self, index: int, columns: list[str] | None) -> pa.Table:
        """The rows of a piece, with the columns asked for (all where None)."""
        part = self.parts[index]
        if columns is None:
            data, _ = read_part(self.store, self.folder, part.name)
        else:  # the last pass checks every byte before anything is published, so the others need not
            data = self.store.get(f"{self.folder}/{part.name}")
        names = self.schema.names if columns is None else [name for name in self.schema.names if name in columns]
        rows = decode_part(data, f"data file {part.name}", names)
        return fitted(rows, pa.schema([self.schema.field(name) for name in names]), part.partition)

    def _run(
        self, rows: pa.Table, dropped: Mask, needed: set[str] | None
    ) -> tuple[pa.Table, Mask, pa.Table, dict[int, Mask]]:
        """Carry out the steps up to `last` on a piece; judge from `first`."""
        alive, failed = ~dropped, []
        changed: dict[int, Mask] = {}
        for at in range(self.last):
            step = self.steps[at]
            judged = at >= self.first and step.judges
            if isinstance(step, GroupStep) or not (judged or needed is None or step.writes() & needed):
                continue
            done = step.apply(rows, self.learnt.get(at))
            rows = done.rows
            if judged:
                for failure in done.failures:
                    here = np.flatnonzero(failure.mask & alive)
                    failed += [(row, at, failure.reason(row)) for row in here.tolist()]
                    alive[here] = False
            if done.changed is not None:
                changed[at] = done.changed
        return rows, alive, _failed(failed), changed


FILES = pa.schema([("kind", pa.string()), ("part", pa.string())])
"""What the last pass says of the files that it wrote: `kept` or `gone`, and the part as JSON."""


def _failed(failed: Sequence[tuple[int, int, str]]) -> pa.Table:
    rows, steps, reasons = zip(*failed, strict=True) if failed else ((), (), ())
    return pa.table(
        {
            "row": pa.array(rows, pa.int64()),
            "step": pa.array(steps, pa.int32()),
            "reason": pa.array(reasons, pa.string()),
        }
    )


def packed(dropped: Mask) -> bytes:
    """Which rows of a piece are out, a bit for each; empty where none is."""
    return np.packbits(dropped).tobytes() if dropped.any() else b""


def unpacked(payload: bytes, rows: int) -> Mask:
    """The inverse of `packed`."""
    if not payload:
        return np.zeros(rows, bool)
    return np.unpackbits(np.frombuffer(payload, np.uint8), count=rows).astype(bool)


def _moved(failed: pa.Table, start: int) -> pa.Table:
    """Failures of a slice with their row numbers in the piece."""
    return failed.set_column(0, "row", pa.array(failed["row"].to_numpy() + start, pa.int64()))
