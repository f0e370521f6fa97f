"""A cleaning plan: the steps that make a cleaner version of a table, in the order in which they are carried out.

Strict as the settings are: unknown keys are refused and all errors are told at once. Whether the columns exist and
hold what a step needs is checked against the table before anything is read (`lepton_ray.data.cleaning.steps`).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, ValidationError, model_validator

from lepton_ray.errors import UsageError, shown
from lepton_ray.settings.loading import describe_errors, parse_yaml, read_config
from lepton_ray.settings.node import Node, OneOf

Columns = Annotated[list[str], Field(min_length=1)]
Value = bool | int | float | str
MAX_PATTERN = 1000


class Normalise(Node):
    """Text in one form. Carried out until a value no longer changes, so that doing it again changes nothing."""

    columns: Columns
    """Columns of text."""
    unicode: Literal["NFC", "NFKC"] | None = "NFKC"
    """Unicode normal form; null leaves characters as they are."""
    control: bool = True
    """Control characters are left out; tabs and line ends become spaces."""
    html: bool = False
    """Tags are left out and entities such as &amp; become characters."""
    whitespace: bool = True
    """Runs of white space become one space, none at the ends."""
    case: Literal["lower", "upper"] | None = None
    """Letters in one case."""


class Markers(Node):
    """Values that stand for a missing one become null."""

    columns: Columns
    values: Annotated[list[Value], Field(min_length=1)]
    """For example `["?", "NA", -999]`; those of another type than the column never match."""


class ColumnType(Node):
    """Values of another type. A value that is none is wrong, never cast to something near."""

    columns: Columns
    to: Literal["int64", "float64", "bool", "date", "timestamp", "text"]
    """`bool` takes true, false, yes, no, 1 and 0; dates and timestamps are ISO 8601 (UTC where no zone is given)."""


class Range(Node):
    """Numbers (or dates, as text in ISO 8601) within bounds, both inclusive; finite."""

    columns: Columns
    min: float | str | None = None
    max: float | str | None = None


class Pattern(Node):
    """Text that matches a regular expression as a whole (RE2 syntax: time grows linearly with the text)."""

    columns: Columns
    regex: Annotated[str, Field(min_length=1, max_length=MAX_PATTERN)]


class Allowed(Node):
    """Values out of a set."""

    columns: Columns
    values: Annotated[list[Value], Field(min_length=1)]


class Check(Node):
    """A rule over several columns of a row, e.g. `begin <= end and (kind != "gift" or price == 0)`."""

    rule: Annotated[str, Field(min_length=1, max_length=MAX_PATTERN)]
    """Column names, numbers, text in quotes, `+ - * /`, comparisons (also chained, `in`, `not in`), `and or not`,
    `missing(column)`, `length(column)`, `column("any name")`. A row where a needed value is missing passes."""


class Missing(Node):
    """What becomes of missing values: nulls, and floating point values that are no number."""

    columns: Columns
    fill: Literal["drop", "refuse", "mean", "median", "most_frequent", "constant", "interpolate"]
    """`drop` leaves the rows out, `refuse` puts them into quarantine, the others put a value there. `interpolate` is
    linear along the column `along`; before its first and after its last known value the nearest one is taken."""
    value: Value | None = None
    """For `constant`."""
    along: str | None = None
    """For `interpolate`: a column of numbers, dates or times."""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if (self.fill == "constant") != (self.value is not None):
            raise ValueError("value goes with fill: constant and with no other")
        if (self.fill == "interpolate") != (self.along is not None):
            raise ValueError("along goes with fill: interpolate and with no other")
        return self


class Outliers(Node):
    """Numbers far from the others. Decided once by the rows that the steps before left; not repeated on what stays."""

    columns: Columns
    by: Literal["zscore", "iqr"] = "iqr"
    """`zscore`: more than `limit` standard deviations from the mean. `iqr`: more than `limit` times the distance
    between the quartiles beyond them (Tukey's fences)."""
    limit: Annotated[float, Field(gt=0.0)] | None = None
    """3 for zscore and 1.5 for iqr where none is given."""
    action: Literal["quarantine", "clip"] = "quarantine"
    """`clip` puts the bound in the place of the value (rounded towards the middle for whole numbers)."""


class Labels(Node):
    """What must hold of the column that says what a row is."""

    column: str = "label"
    classes: Annotated[int, Field(ge=2)] | None = None
    """Labels are whole numbers from 0 to classes - 1."""
    values: Annotated[list[Value], Field(min_length=1)] | None = None
    """Labels are out of this set."""
    min_rows: Annotated[int, Field(ge=1)] = 1
    """Rows of a label that fewer rows have fail."""
    conflicts: bool = True
    """Rows that are equal in every column but the key and the label, and whose labels differ, fail (all of them)."""


class Readable(Node):
    """Bytes of an image or a recording that can be decoded. An image table's raw pixels must have the right length."""

    columns: Columns
    kind: Literal["image", "audio"]
    max_pixels: Annotated[int, Field(ge=1, le=2**31)] = 64_000_000
    """Larger images fail by what their header says, before they are decoded."""


class Duplicates(Node):
    """Rows that are equal to an earlier one are left out."""

    columns: Columns | None = None
    """What must be equal; every column but the key where none is given."""


class NearDuplicates(Node):
    """Rows whose text or image is much like that of an earlier row that stays are left out."""

    column: str
    kind: Literal["text", "image"] = "text"
    threshold: Annotated[float, Field(ge=0.5, le=1.0)] = 0.8
    """For text: share of common 8-byte pieces (Jaccard similarity) from which two texts are near."""
    distance: Annotated[int, Field(ge=0, le=16)] = 4
    """For images: bits of the 64-bit perceptual hash in which two images that are near may differ."""


class Step(OneOf):
    """One step: exactly one of these."""

    normalise: Normalise | None = None
    markers: Markers | None = None
    type: ColumnType | None = None
    range: Range | None = None
    pattern: Pattern | None = None
    allowed: Allowed | None = None
    check: Check | None = None
    missing: Missing | None = None
    outliers: Outliers | None = None
    labels: Labels | None = None
    readable: Readable | None = None
    duplicates: Duplicates | None = None
    near_duplicates: NearDuplicates | None = None


class CleaningPlan(Node):
    """Steps, and how many rows may fail."""

    steps: Annotated[list[Step], Field(min_length=1, max_length=500)]
    max_quarantine: Annotated[float, Field(ge=0.0, le=1.0)] = 0.01
    """Share of the rows read that may go to quarantine; above it nothing is written."""


def parse_plan(tree: Mapping[str, Any], where: str = "plan") -> CleaningPlan:
    """The plan of an already parsed mapping.

    Raises UsageError with all faults in one line.
    """
    try:
        return CleaningPlan.model_validate(dict(tree))
    except ValidationError as error:
        raise UsageError(f"{where}: {describe_errors(error, CleaningPlan)}") from error


def load_plan(path: Path | str) -> CleaningPlan:
    """The plan of a YAML file. Raises UsageError for an unreadable file, wrong YAML, unknown keys or wrong values."""
    where = f"plan {shown(path)}"
    tree = parse_yaml(read_config(Path(path)), where)
    if not isinstance(tree, dict):
        raise UsageError(f"{where}: holds {shown(tree)}; expected the keys steps and max_quarantine")
    return parse_plan(tree, where)
