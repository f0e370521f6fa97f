"""The page about what is in a table: its figures (`lepton_ray.data.profile`) as cards, and sample images."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from lepton_ray.data.cleaning import LABEL, media
from lepton_ray.data.images import SHAPE_COLUMNS, UInt8Array, is_image_table
from lepton_ray.data.page import Bar, Section, bars, cut, figure, percent, png_uri, render
from lepton_ray.data.tables import Table

if TYPE_CHECKING:
    from lepton_ray.data.profile import ColumnProfile, TableProfile

BINS = 24
SAMPLES = 24
"""Images shown."""
TOP = 8
"""Most frequent values shown."""
MAX_COLUMNS = 300
"""Columns that get a card."""


def samples_of(table: Table) -> list[tuple[str, str]]:
    """Images of the first data file, evenly spaced, as data URIs with their labels."""
    kinds = {field.name: field.type for field in table.schema}
    if not pa.types.is_binary(kinds.get("image", pa.null())):
        return []
    raw = is_image_table(table.schema)
    rows = next(table.batches([name for name in ("image", LABEL, *SHAPE_COLUMNS) if name in kinds]))
    picked = rows.take(pa.array(np.unique(np.linspace(0, rows.num_rows - 1, SAMPLES).astype(int))))
    found = []
    for row in picked.to_pylist():
        pixels = _raw(row) if raw else _decoded(row["image"])
        if pixels is not None:
            found.append((png_uri(pixels), cut(str(row.get(LABEL, "")), 24)))
    return found


def _raw(row: dict[str, Any]) -> UInt8Array | None:
    shape = [row[name] for name in SHAPE_COLUMNS]
    fits = row["image"] is not None and None not in shape and min(shape) > 0 and max(shape) <= 1024
    if not fits or len(row["image"]) != shape[0] * shape[1] * shape[2] or shape[2] not in (1, 3, 4):
        return None
    return np.frombuffer(row["image"], np.uint8).reshape(shape)


def _decoded(data: bytes | None) -> UInt8Array | None:
    from PIL import Image

    if data is None or media.faults(pa.array([data], pa.binary()), "image", 16_000_000)[0] is not None:
        return None
    with Image.open(io.BytesIO(data)) as image:
        image.thumbnail((168, 168))
        return np.asarray(image.convert("RGB"))


def page(found: TableProfile, samples: list[tuple[str, str]]) -> str:
    """The profile as HTML."""
    missing = sum(each.missing for each in found.columns)
    cells = found.rows * len(found.columns)
    tiles = [
        ("rows", f"{found.rows:,}", f"in {found.bytes / 2**20:,.1f} MiB"),
        (
            "columns",
            f"{len(found.columns):,}",
            f"{sum(each.missing > 0 for each in found.columns):,} with missing values",
        ),
        ("missing values", f"{missing:,}", percent(missing, cells)),
    ]
    sections = []
    label = next((each for each in found.columns if each.name == LABEL), None)
    if label is not None and label.top:
        most, least = label.top[0][1], label.top[-1][1]
        tiles.append(("classes", f"{len(label.top):,}", f"largest {most / max(1, least):.3g} x the smallest"))
        counts = [(value, count, f"{count:,} ({percent(count, found.rows)})") for value, count in label.top[:40]]
        sections.append(Section("Class balance", f"rows by {LABEL}", bars=bars(counts)))
    lacking = [
        (each.name, each.missing, f"{each.missing:,} ({percent(each.missing, found.rows)})") for each in found.columns
    ]
    if missing:
        most_missing = sorted((each for each in lacking if each[1]), key=lambda each: -each[1])[:40]
        sections.append(Section("Missing values", "by column", bars=bars(most_missing, "warn")))
    if samples:
        sections.append(
            Section("Sample images", f"{len(samples)} of the first data file, with their labels", images=samples)
        )
    sections += [_card(each, found.rows) for each in found.columns[:MAX_COLUMNS]]
    subtitle = "what is in the table, column by column"
    if len(found.columns) > MAX_COLUMNS:
        subtitle += f"; the first {MAX_COLUMNS} of them"
    return render("table profile", f"{found.table}@{found.version}", subtitle, tiles, sections)


def _card(column: ColumnProfile, rows: int) -> Section:
    about = "" if column.distinct_exact else "about "
    facts = [
        ("missing", f"{column.missing:,} ({percent(column.missing, rows)})"),
        ("different", f"{about}{column.distinct:,}"),
    ]
    if column.infinite:
        facts.append(("infinite", f"{column.infinite:,}"))
    made = Section(column.name, column.type, facts)
    lengths = column.type in ("string", "binary") or column.type.startswith("list")
    if column.span is not None:
        facts.append(("from, to", f"{column.span[0]}, {column.span[1]}"))
        made.ends = column.span
    elif column.quantiles is not None:
        low, first, middle, third, high = column.quantiles
        what = "length" if lengths else "value"
        facts.append((f"least, greatest {what}", f"{figure(low)}, {figure(high)}"))
        facts.append(("quartiles", f"{figure(first)}, {figure(middle)}, {figure(third)}"))
        if column.mean is not None:
            facts.append(("mean, deviation", f"{figure(column.mean)}, {figure(column.deviation)}"))
        made.ends = figure(low), figure(high)
    few = column.top and len(column.top) <= BINS
    if column.top and (few or lengths):
        made.bars = bars([(value, count, f"{count:,}") for value, count in column.top[:TOP]])
    elif column.histogram:
        top = max(column.histogram) or 1
        made.histogram = [Bar(f"bin {i + 1}", n, n / top, f"{n:,} rows") for i, n in enumerate(column.histogram)]
    if not made.histogram:
        made.ends = ("", "")
    return made
