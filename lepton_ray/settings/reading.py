"""How a source is read into a table: its format, its columns, and the limits that keep bad input out."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from lepton_ray.settings.node import Node

Format = Literal["csv", "jsonl", "parquet", "arrow", "images", "coco", "voc", "audio", "text"]
ColumnType = Literal["int", "float", "text", "bool", "date", "timestamp"]
"""Types that a column of a CSV or JSON lines file can be given: 64-bit, UTF-8, days, microseconds."""


class LimitSettings(Node):
    """What is too large, or too much of it bad, to be taken in."""

    max_cell_bytes: Annotated[int, Field(ge=1, le=2**30)] = 1_048_576
    """Bytes of a text or a list in one cell; a row with a larger one is rejected."""
    max_object_bytes: Annotated[int, Field(ge=1, le=2**30)] = 64 * 2**20
    """Bytes of an image, a recording, a text file or another binary cell; a row with a larger one is rejected."""
    max_row_bytes: Annotated[int, Field(ge=1024, le=2**30)] = 4 * 2**20
    """Bytes of one row of CSV or one line of JSON lines; a longer one ends the ingest."""
    max_pixels: Annotated[int, Field(ge=1)] = 100_000_000
    """Width times height of an image, looked at before it is decoded; a larger one is rejected."""
    min_side: Annotated[int, Field(ge=1)] = 2
    """Pixels of the shorter side of an image; a smaller one is rejected."""
    max_footer_bytes: Annotated[int, Field(ge=1024, le=2**31)] = 64 * 2**20
    """Bytes of the metadata of a Parquet or Arrow file."""
    max_unpacked_bytes: Annotated[int, Field(ge=1024)] = 4 * 2**30
    """Bytes that one row group of Parquet says it unpacks to; it is unpacked page by page."""
    max_batch_bytes: Annotated[int, Field(ge=1024)] = 2**30
    """Bytes that one batch of Arrow says it unpacks to; it is in memory as a whole."""
    max_annotation_bytes: Annotated[int, Field(ge=1024)] = 2 * 2**30
    """Bytes of a COCO file or of the manifest of a folder."""
    max_source_bytes: Annotated[int, Field(ge=1)] = 1_000_000_000_000
    """Bytes of the source, and again of what a compressed one unpacks to."""
    max_files: Annotated[int, Field(ge=1)] = 2_000_000
    """Files of a folder."""
    max_rejected_share: Annotated[float, Field(ge=0.0, le=1.0)] = 0.01
    """Share of the rows (or files) that may be rejected; with more the ingest ends and writes nothing."""


class ReadingSettings(Node):
    """How a source is read."""

    format: Format | None = None
    """What the source is, where its name and shape do not tell."""
    delimiter: Annotated[str, Field(pattern=r"^[^\"\r\n\\]$")] | None = None
    """Between the values of a CSV row; a comma, or a tab in .tsv files, where none is given."""
    types: dict[str, ColumnType] = Field(default_factory=dict)
    """Column -> type, for CSV and JSON lines; columns that are not named get theirs from the first rows."""
    limits: LimitSettings = LimitSettings()
    """What is too large or too bad to be taken in."""
