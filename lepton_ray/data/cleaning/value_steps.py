"""The steps that need nothing but the row itself: text, markers, types, ranges, patterns, sets, rules, media."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from lepton_ray.data.cleaning import media, rules
from lepton_ray.data.cleaning.expressions import Rule
from lepton_ray.data.cleaning.ingesting import KEY
from lepton_ray.data.cleaning.steps import Applied, Failure, Mask, Step, array_of, check_kind, with_column
from lepton_ray.data.cleaning.text import normalise
from lepton_ray.data.images import SHAPE_COLUMNS, is_image_table
from lepton_ray.errors import UsageError, shown
from lepton_ray.settings import cleaning as settings


class Normalise(Step[settings.Normalise]):
    """Text in one form."""

    @property
    def judges(self) -> bool:
        """See Step."""
        return False

    def writes(self) -> set[str]:
        """See Step."""
        return set(self.columns)

    def check(self, schema: pa.Schema) -> pa.Schema:
        """See Step."""
        super().check(schema)
        refuse_key(self)
        check_kind(schema, self.columns, "text")
        return schema

    def apply(self, rows: pa.Table, learnt: Any) -> Applied:
        """See Step."""
        changed = np.zeros(rows.num_rows, bool)
        for name in present(rows, self.columns):
            values, here = normalise(array_of(rows, name), self.settings)
            changed |= here
            rows = with_column(rows, name, values)
        return Applied(rows, changed)


class Markers(Step[settings.Markers]):
    """Values that stand for a missing one become null."""

    @property
    def judges(self) -> bool:
        """See Step."""
        return False

    def writes(self) -> set[str]:
        """See Step."""
        return set(self.columns)

    def check(self, schema: pa.Schema) -> pa.Schema:
        """See Step."""
        super().check(schema)
        refuse_key(self)
        for name in self.columns:
            kind = schema.field(name).type
            if pa.types.is_nested(kind) or pa.types.is_binary(kind):
                raise UsageError(f"column {shown(name)} holds {kind}; expected text, numbers or dates")
        return schema

    def apply(self, rows: pa.Table, learnt: Any) -> Applied:
        """See Step."""
        changed = np.zeros(rows.num_rows, bool)
        for name in present(rows, self.columns):
            values = array_of(rows, name)
            here = rules.among(values, list(self.settings.values))
            if here.any():
                changed |= here
                rows = with_column(rows, name, pc.if_else(pa.array(here), pa.scalar(None, values.type), values))
        return Applied(rows, changed)


class ColumnType(Step[settings.ColumnType]):
    """Values of another type."""

    def writes(self) -> set[str]:
        """See Step."""
        return set(self.columns)

    def check(self, schema: pa.Schema) -> pa.Schema:
        """See Step."""
        super().check(schema)
        refuse_key(self)
        for name in self.columns:
            values, _ = rules.converted(pa.array([], schema.field(name).type), self.settings.to)
            schema = schema.set(schema.names.index(name), pa.field(name, values.type))
        return schema

    def apply(self, rows: pa.Table, learnt: Any) -> Applied:
        """See Step."""
        failures = []
        for name in present(rows, self.columns):
            before = array_of(rows, name)
            after, wrong = rules.converted(before, self.settings.to)
            failures.append(Failure(wrong, name, self.settings.to, before))
            rows = with_column(rows, name, after)
        return Applied(rows, None, failures)


class Range(Step[settings.Range]):
    """Numbers and dates within bounds."""

    def check(self, schema: pa.Schema) -> pa.Schema:
        """See Step."""
        super().check(schema)
        check_kind(schema, self.columns, "number or time")
        for name in self.columns:
            for bound in (self.settings.min, self.settings.max):
                if bound is not None:
                    rules.bound(bound, schema.field(name).type)
        return schema

    def apply(self, rows: pa.Table, learnt: Any) -> Applied:
        """See Step."""
        low, high = self.settings.min, self.settings.max
        bounds = " and ".join(
            [f"at least {_plain(low)}"] * (low is not None) + [f"at most {_plain(high)}"] * (high is not None)
        )
        failures = []
        for name in self.columns:
            values = array_of(rows, name)
            failures.append(Failure(rules.outside(values, low, high), name, bounds or "a finite number", values))
        return Applied(rows, None, failures)


class Pattern(Step[settings.Pattern]):
    """Text that matches a regular expression."""

    def check(self, schema: pa.Schema) -> pa.Schema:
        """See Step."""
        super().check(schema)
        check_kind(schema, self.columns, "text")
        try:
            rules.unmatched(pa.array([""]), self.settings.regex)
        except pa.ArrowInvalid as error:
            raise UsageError(f"regex {shown(self.settings.regex)}: {shown(str(error), 160)}") from error
        return schema

    def apply(self, rows: pa.Table, learnt: Any) -> Applied:
        """See Step."""
        expected = f"text like {shown(self.settings.regex)}"
        columns = [(name, array_of(rows, name)) for name in self.columns]
        return Applied(
            rows,
            None,
            [Failure(rules.unmatched(each, self.settings.regex), name, expected, each) for name, each in columns],
        )


class Allowed(Step[settings.Allowed]):
    """Values out of a set."""

    def check(self, schema: pa.Schema) -> pa.Schema:
        """See Step."""
        super().check(schema)
        for name in self.columns:
            kind = schema.field(name).type
            if not rules.fitting(list(self.settings.values), kind):
                raise UsageError(f"column {shown(name)} holds {kind}; none of the values is one")
        return schema

    def apply(self, rows: pa.Table, learnt: Any) -> Applied:
        """See Step."""
        options = list(self.settings.values)
        expected = f"one of {shown(', '.join(str(option) for option in options))}"
        columns = [(name, array_of(rows, name)) for name in self.columns]
        return Applied(
            rows, None, [Failure(rules.not_among(each, options), name, expected, each) for name, each in columns]
        )


class Check(Step[settings.Check]):
    """A rule over several columns."""

    def __init__(self, index: int, rule: str, told: settings.Check) -> None:
        super().__init__(index, rule, told)
        self._rule = Rule(told.rule)

    @property
    def columns(self) -> list[str]:
        """See Step."""
        return sorted(self._rule.columns)

    def check(self, schema: pa.Schema) -> pa.Schema:
        """See Step."""
        self._rule.check(schema)
        return schema

    def apply(self, rows: pa.Table, learnt: Any) -> Applied:
        """See Step."""
        failing = self._rule.failing(rows)
        texts = None
        if failing.any():  # what stands in the columns of the rule, for the rows that fail
            seen = rows.select(self.columns).filter(pa.array(failing)).to_pylist()
            told = iter(", ".join(f"{name} {shown(value, 40)}" for name, value in row.items()) for row in seen)
            texts = pa.array([next(told) if wrong else None for wrong in failing.tolist()], pa.string())
        return Applied(rows, None, [Failure(failing, "row", shown(self.settings.rule, 200), texts)])


class Readable(Step[settings.Readable]):
    """Bytes of an image or a recording that can be decoded."""

    def check(self, schema: pa.Schema) -> pa.Schema:
        """See Step."""
        super().check(schema)
        check_kind(schema, self.columns, "bytes")
        self._raw = is_image_table(schema)  # of all columns: a piece that is judged has only those that are read
        return schema

    def reads(self, schema: pa.Schema) -> set[str]:
        """See Step."""
        raw = is_image_table(schema) and "image" in self.columns
        return {*self.columns, *(SHAPE_COLUMNS if raw else ())}

    def apply(self, rows: pa.Table, learnt: Any) -> Applied:
        """See Step."""
        failures = []
        for name in self.columns:
            if name == "image" and self._raw:
                failures += [
                    Failure(_true(mask), name, reason)
                    for reason, mask in media.raw_faults(rows, self.settings.max_pixels)
                ]
                continue
            faults = media.faults(array_of(rows, name), self.settings.kind, self.settings.max_pixels)
            for reason in sorted({fault for fault in faults if fault is not None}):
                mask = np.array([fault == reason for fault in faults], bool)
                failures.append(Failure(mask, name, reason))
        return Applied(rows, None, failures)


def _true(mask: pa.ChunkedArray) -> Mask:
    made: Mask = pc.fill_null(mask, False).to_numpy()
    return made


def present(rows: pa.Table, columns: list[str]) -> list[str]:
    """The columns that a piece has: those that nobody needs later are not read."""
    return [name for name in columns if name in rows.column_names]


def refuse_key(step: Step[Any]) -> None:
    """Raise UsageError where a step would change keys."""
    if KEY in step.columns:
        raise UsageError(f"column {KEY}: names a row and is never changed; make a column of its own of it")


def _plain(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
