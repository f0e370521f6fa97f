"""Transforms: how columns of a table become numbers for a model, in the order in which they are carried out.

Strict as the settings are: unknown keys are refused, all errors are told at once. Whether the columns exist and hold
what a step needs is checked against the table before anything is learnt (`lepton_ray.data.transforms`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal, Self

from pydantic import Field, ValidationError, model_validator

from lepton_ray.errors import UsageError
from lepton_ray.settings.loading import describe_errors
from lepton_ray.settings.node import Node, OneOf

Columns = Annotated[list[str], Field(min_length=1)]
Value = bool | int | float | str
Finite = Annotated[float, Field(allow_inf_nan=False)]
Seconds = Annotated[float, Field(gt=0.0, le=3600.0)]


class Impute(Node):
    """A value in the place of missing ones (nulls, and floating point values that are no number)."""

    columns: Columns
    fill: Literal["mean", "median", "most_frequent", "constant"] = "median"
    """The first two are for numbers."""
    value: Value | None = None
    """For `constant`."""
    indicator: bool = False
    """Also make a column `<name>_missing`, 1 where the value was missing."""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if (self.fill == "constant") != (self.value is not None):
            raise ValueError("value goes with fill: constant and with no other")
        return self


class Standardise(Node):
    """Numbers minus their mean, divided by their standard deviation (of the population)."""

    columns: Columns


class MinMax(Node):
    """Numbers brought into a range by the smallest and the largest that were learnt; others fall outside of it."""

    columns: Columns
    low: Finite = 0.0
    high: Finite = 1.0
    clip: bool = False
    """Put the bound in the place of what falls outside."""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.low >= self.high:
            raise ValueError("low must be below high")
        return self


class Robust(Node):
    """Numbers minus their median, divided by the distance between their quartiles: outliers move neither."""

    columns: Columns


class OneHot(Node):
    """A value as zeros and a one, at the place of the value among those learnt; one that was not learnt has no one."""

    columns: Columns
    max_values: Annotated[int, Field(ge=1, le=10_000)] = 100
    """The most frequent ones are learnt."""
    min_rows: Annotated[int, Field(ge=1)] = 1
    """Values of fewer rows are not learnt."""


class Ordinal(Node):
    """A value as its number among those learnt, from 1; 0 for a missing one and for one that was not learnt."""

    columns: Columns
    max_values: Annotated[int, Field(ge=1, le=1_000_000)] = 100_000
    """The most frequent ones are learnt."""
    min_rows: Annotated[int, Field(ge=1)] = 1
    """Values of fewer rows are not learnt."""


class Hashing(Node):
    """A value as one of some buckets, from 1, by its hash: nothing is learnt, new values have a bucket. 0: missing."""

    columns: Columns
    buckets: Annotated[int, Field(ge=2, le=2**24)] = 1024


class Tokenise(Node):
    """Text as token numbers, cut or filled up to a length. 0 is padding; a tokenizer's own numbers are one higher."""

    column: str
    kind: Literal["bpe", "wordpiece", "file"] = "bpe"
    """`bpe` and `wordpiece` are learnt from the training rows; `file` is read from `tokenizer`."""
    length: Annotated[int, Field(ge=1, le=131_072)] = 128
    vocabulary: Annotated[int, Field(ge=64, le=1_000_000)] = 8000
    """Tokens to learn at most."""
    lower: bool = True
    """Learn and read text in lower case."""
    tokenizer: str | None = None
    """For `file`: the path of a `tokenizer.json`. Its content is kept with the model; the file is not needed again."""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if (self.kind == "file") != (self.tokenizer is not None):
            raise ValueError("tokenizer goes with kind: file and with no other")
        return self


class Image(Node):
    """An image (of the columns image, height, width, channels) as numbers `[channels, height, width]`, row by row."""

    column: Literal["image"] = "image"
    height: Annotated[int, Field(ge=1, le=4096)]
    width: Annotated[int, Field(ge=1, le=4096)]
    channels: Literal[1, 3] = 3
    normalise: bool = True
    """By mean and standard deviation of each channel, learnt; otherwise 0 to 1."""
    max_pixels: Annotated[int, Field(ge=1, le=2**31)] = 64_000_000
    """Larger images are refused by what their header says, before they are decoded."""


class LogMel(Node):
    """A recording (WAV) as the logarithm of the energy in mel bands over time, `[frames, mels]`, filled up with zeros.

    Makes a column `<name>_frames` with the frames that are no filling.
    """

    column: str = "audio"
    rate: Annotated[int, Field(ge=1000, le=192_000)] = 16_000
    """Samples per second; recordings of other rates are resampled."""
    mels: Annotated[int, Field(ge=1, le=512)] = 80
    window_ms: Annotated[float, Field(gt=0.0, le=1000.0)] = 25.0
    hop_ms: Annotated[float, Field(gt=0.0, le=1000.0)] = 10.0
    max_s: Seconds = 20.0
    """Longer recordings are refused."""
    normalise: bool = True
    """Each band of a recording has mean 0 and standard deviation 1."""


class TransformStep(OneOf):
    """One step: exactly one of these."""

    impute: Impute | None = None
    standardise: Standardise | None = None
    min_max: MinMax | None = None
    robust: Robust | None = None
    one_hot: OneHot | None = None
    ordinal: Ordinal | None = None
    hashing: Hashing | None = None
    tokenise: Tokenise | None = None
    image: Image | None = None
    log_mel: LogMel | None = None


class Transforms(Node):
    """The steps, in order."""

    steps: Annotated[list[TransformStep], Field(min_length=1, max_length=500)]


def parse_transforms(steps: Sequence[Any], where: str = "transforms") -> Transforms:
    """The steps as a YAML file or a stored model has them.

    Raises UsageError with all faults in one line.
    """
    try:
        return Transforms.model_validate({"steps": list(steps)})
    except ValidationError as error:
        raise UsageError(f"{where}: {describe_errors(error, Transforms)}") from error
