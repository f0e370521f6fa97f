"""The order of the passes over a table: judge what can be judged, learn what must be learnt, and write at the end."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from lepton_ray.data.cleaning.group_steps import COMPARED_AT_ONCE, GroupStep, NearDuplicates, Place
from lepton_ray.data.cleaning.outcome import EXAMPLES, CleaningOutcome, StepOutcome
from lepton_ray.data.cleaning.passes import BUCKETS, Passes, Pieces
from lepton_ray.data.cleaning.pieces import Job, Target, packed
from lepton_ray.data.cleaning.publishing import Found
from lepton_ray.data.cleaning.steps import Fitting, Mask
from lepton_ray.data.parts import Part
from lepton_ray.errors import RefusedError, UsageError

Int64Array = npt.NDArray[np.int64]


class Rounds:
    """One run of a plan over a table, and the account of it."""

    def __init__(self, job: Job, passes: Passes, limit: float, ref: str, progress: Callable[[str], None]) -> None:
        self._job, self._passes, self._limit, self._ref, self._progress = job, passes, limit, ref, progress
        self._dropped: list[Mask] = [np.zeros(part.rows, bool) for part in job.parts]
        self._reasons: dict[int, list[tuple[int, str, str]]] = {}
        self._outcomes = [StepOutcome(step.index, step.rule, step.columns) for step in job.steps]
        self._missing: dict[str, tuple[int, int]] = {}
        self._judged = 0
        self._rows = sum(part.rows for part in job.parts)

    def carry_out(self, target: Target | None) -> Found:
        """All passes; with a target the last one writes. Raises RefusedError where too many rows fail."""
        at, steps = 0, self._job.steps
        while at < len(steps):
            step = steps[at]
            fitting = step.fitting(self._job.schema_before(at))
            if isinstance(step, GroupStep):
                self._judge_until(at)
                self._bring_together(at, step)
                self._judged = at = at + 1
            elif fitting is not None:
                fittings = self._with_followers(at, fitting)
                self._learn(fittings)
                at = max(fittings) + 1
            else:
                at += 1
        return self._finish(target)

    def outcome(self, table: str, version: int, digest: str) -> CleaningOutcome:
        """The account of a run over this version. Raises UsageError where no row is left."""
        for at, step in enumerate(self._job.steps):
            if at in self._job.learnt:
                self._outcomes[at].learnt = step.told(self._job.learnt[at])
        kept = self._rows - sum(int(mask.sum()) for mask in self._dropped)
        if kept == 0:
            raise UsageError(f"table {self._ref}: no row is left by the plan; {self._worst()}")
        told = sorted((part, *each) for part, reasons in self._reasons.items() for each in reasons)[:EXAMPLES]
        return CleaningOutcome(
            table=table, from_version=version, version=version, plan_sha256=digest, rows_read=self._rows,
            rows_written=kept, steps=self._outcomes, missing=self._missing,
            examples=[f"{rule}: {reason} (row {row} of data file {part})" for part, row, rule, reason in told],
        )  # fmt: skip

    def _worst(self) -> str:
        """Which rules took most rows."""
        most = sorted(self._outcomes, key=lambda each: -(each.dropped + each.quarantined))[:3]
        return ", ".join(f"{each.rule} {each.dropped + each.quarantined:,}" for each in most)

    def _payloads(self) -> list[bytes]:
        return [packed(mask) for mask in self._dropped]

    def _with_followers(self, at: int, fitting: Fitting) -> dict[int, Fitting]:
        """Steps that learn and can do so in the same looks: none drops rows, none sees what another one changed."""
        steps, found, written = self._job.steps, {at: fitting}, set(self._job.steps[at].writes())
        for place in range(at + 1, len(steps)):
            schema = self._job.schema_before(place)
            more = steps[place].fitting(schema)
            if more is None or steps[place - 1].judges or steps[place].reads(schema) & written:
                break
            found[place] = more
            written |= steps[place].writes()
        return found

    def _learn(self, fittings: dict[int, Fitting]) -> None:
        first = min(fittings)
        self._job.first, self._job.last = self._judged, first
        while waiting := {at: each for at, each in fittings.items() if not each.done}:
            self._progress(f"{self._job.steps[first].where()}: learning")
            answers: dict[int, list[Pieces]] = {at: [] for at in waiting}
            for part, said in enumerate(self._passes.each(partial(self._job.look, waiting), self._payloads())):
                self._take_in(part, said["failed"])
                for at in waiting:
                    mark = f"{at}/"
                    answers[at].append(
                        {name.removeprefix(mark): table for name, table in said.items() if name.startswith(mark)}
                    )
            self._check_share()
            self._judged = self._job.first = first
            for at, each in waiting.items():
                each.narrow(answers[at])
        for at, each in fittings.items():
            self._job.learnt[at] = each.result()

    def _judge_until(self, at: int) -> None:
        """Judge by the steps before `at` that have not judged yet."""
        waiting = [
            step for step in self._job.steps[self._judged : at] if step.judges and not isinstance(step, GroupStep)
        ]
        self._job.first, self._job.last = self._judged, at
        if waiting:
            self._progress(f"{waiting[0].where()}: judging")
            for part, said in enumerate(self._passes.each(self._job.judged, self._payloads())):
                self._take_in(part, said["failed"])
            self._check_share()
        self._judged = self._job.first = at

    def _bring_together(self, at: int, step: GroupStep[Any]) -> None:
        """Compare rows with each other."""
        self._progress(f"{step.where()}: comparing rows")
        work = partial(self._job.entries, step, BUCKETS)
        tables = list(self._passes.grouped(work, self._payloads(), BUCKETS, step.reduce))
        columns = ("part", "row", "of_part", "of_row")
        pairs = np.concatenate(
            [np.empty((0, 4), np.int64), *(np.stack([each[name].to_numpy() for name in columns], 1) for each in tables)]
        ).astype(np.int64)
        pairs = pairs[np.lexsort(pairs.T[::-1])]
        if isinstance(step, NearDuplicates) and len(pairs):
            pairs = _each_once(pairs)
        if isinstance(step, NearDuplicates) and len(pairs) and step.settings.kind == "text":
            pairs = np.array([pair for some in self._near(step, pairs) for pair in some], np.int64).reshape(-1, 4)
        failing = step.failing(pairs)
        for part in np.unique(failing[:, 0]).tolist():
            self._dropped[part][failing[failing[:, 0] == part, 1]] = True
        if step.leaves_out:
            self._outcomes[at].dropped += len(failing)
            return
        for part, row, of_part, of_row in failing.tolist():
            self._enter(at, part, row, step.said(f"row {of_row} of {self._job.parts[of_part].name[:24]}"))
        self._check_share()

    def _near(self, step: NearDuplicates, pairs: Int64Array) -> Iterator[list[list[int]]]:
        """The pairs that are near, some rows at a time."""
        for start in range(0, len(pairs), COMPARED_AT_ONCE // 2):
            some = pairs[start : start + COMPARED_AT_ONCE // 2]
            wanted = [np.zeros(len(mask), bool) for mask in self._dropped]
            for part, row in np.concatenate([some[:, :2], some[:, 2:]]).tolist():
                wanted[part][row] = True
            payloads = [packed(~mask) for mask in wanted]
            told: dict[Place, Any] = {}
            for part, said in enumerate(self._passes.each(partial(self._job.compared, step), payloads)):
                if "pieces" in said:
                    lists = said["pieces"]["pieces"].combine_chunks()
                    lists = lists if not hasattr(lists, "chunks") else lists.chunk(0)
                    values, ends = lists.values.to_numpy(), lists.offsets.to_numpy()
                    for index, row in enumerate(said["pieces"]["row"].to_pylist()):
                        told[part, row] = values[ends[index] : ends[index + 1]]
            yield list(step.near_pairs(some, told))

    def _finish(self, target: Target | None) -> Found:
        self._progress("writing" if target else "judging")
        self._job.first, self._job.last = self._judged, len(self._job.steps)
        found = Found([], [])
        reasons = {part: list(each) for part, each in self._reasons.items()}
        work = partial(self._job.written, target, reasons)
        for part, said in enumerate(self._passes.each(work, self._payloads())):
            self._take_in(part, said["failed"])
            for at, rows in zip(*(said["changed"][name].to_pylist() for name in ("step", "rows")), strict=True):
                self._outcomes[at].changed += rows
            for name, before, after in zip(*(each.to_pylist() for each in said["missing"].columns), strict=True):
                old = self._missing.get(name, (0, 0))
                self._missing[name] = (old[0] + before, old[1] + after)
            if "files" in said:
                for line in said["files"].to_pylist():
                    (found.kept if line["kind"] == "kept" else found.gone).append(_part(line["part"]))
        self._check_share()
        return found

    def _take_in(self, part: int, failed: Any) -> None:
        """Enter the rows of a piece that failed."""
        for row, at, reason in zip(*(failed[name].to_pylist() for name in ("row", "step", "reason")), strict=True):
            self._dropped[part][row] = True
            self._enter(at, part, row, reason)

    def _enter(self, at: int, part: int, row: int, reason: str) -> None:
        step = self._job.steps[at]
        if step.leaves_out:
            self._outcomes[at].dropped += 1
            return
        self._outcomes[at].quarantined += 1
        self._reasons.setdefault(part, []).append((row, step.rule, reason))

    def _check_share(self) -> None:
        failed = sum(each.quarantined for each in self._outcomes)
        if failed <= self._limit * self._rows:
            return
        first = min((part, *each) for part, reasons in self._reasons.items() for each in reasons)
        rules = sorted((each for each in self._outcomes if each.quarantined), key=lambda each: -each.quarantined)
        counts = ", ".join(f"steps.{each.step}.{each.rule} {each.quarantined:,}" for each in rules[:5])
        raise RefusedError(
            f"table {self._ref}: {failed:,} of {self._rows:,} rows ({failed / self._rows:.2%}) fail, above the plan's "
            f"max_quarantine of {self._limit:.2%}: {counts}; e.g. {first[3]} (row {first[1]}); nothing is written: "
            "correct the rows or the rule, or allow more"
        )


def _part(text: str) -> Part:
    """A data file as a piece told it."""
    told = json.loads(text)
    return Part(**{**told, "partition": tuple((name, value) for name, value in told["partition"])})


def _each_once(pairs: Int64Array) -> Int64Array:
    """Sorted pairs without repeats: two rows may meet in several buckets."""
    new = np.ones(len(pairs), bool)
    new[1:] = (pairs[1:] != pairs[:-1]).any(axis=1)
    return pairs[new]
