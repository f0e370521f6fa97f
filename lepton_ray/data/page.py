"""Pages about tables: one HTML file that needs nothing else, in the manner of the run report.

Readable on a phone and on paper, light or dark as the reader's system is, without scripts and without links to
elsewhere. Charts are a few rectangles, drawn by the template itself.
"""

from __future__ import annotations

import base64
import math
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from lepton_ray.data.images import UInt8Array

TEMPLATE = Path(__file__).with_name("page.html.j2")
CELL = 120
"""Characters of a value shown at most."""


@dataclass(frozen=True)
class Bar:
    """A line of a bar chart."""

    label: str
    value: float
    share: float
    """Of the longest bar, 0 to 1."""
    note: str = ""
    tone: str = "accent"
    """`accent`, `good`, `warn` or `bad`."""


@dataclass
class Section:
    """A card of a page."""

    title: str
    note: str = ""
    facts: list[tuple[str, str]] = field(default_factory=list)
    bars: list[Bar] = field(default_factory=list)
    histogram: list[Bar] = field(default_factory=list)
    """Upright bars, side by side."""
    ends: tuple[str, str] = ("", "")
    """What stands under the first and the last bar of the histogram."""
    head: list[str] = field(default_factory=list)
    rows: list[list[str]] = field(default_factory=list)
    """A table."""
    images: list[tuple[str, str]] = field(default_factory=list)
    """Data URIs with captions."""


def render(
    kind: str, title: str, subtitle: str, tiles: Sequence[tuple[str, str, str]], sections: Sequence[Section]
) -> str:
    """The page as HTML; every text in it is escaped.

    Args:
        kind: what sort of page it is, e.g. `table profile`.
        title: of the page.
        subtitle: a line below it.
        tiles: label, value and what is below it.
        sections: the cards.
    """
    import jinja2

    from lepton_ray import __version__

    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    template = environment.from_string(TEMPLATE.read_text("utf-8"))
    return template.render(
        kind=kind, title=title, subtitle=subtitle, tiles=tiles, sections=sections, version=__version__
    )


def bars(values: Sequence[tuple[str, float, str]], tone: str = "accent") -> list[Bar]:
    """Bars of labels, values and notes, the longest of full length."""
    top = max((value for _, value, _ in values), default=0) or 1
    return [Bar(cut(label, 60), value, value / top, note, tone) for label, value, note in values]


def cut(text: str, limit: int = CELL) -> str:
    """Text without control characters, cut."""
    safe = "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in text[: limit + 1])
    return safe if len(safe) <= limit else safe[: limit - 1] + "\N{HORIZONTAL ELLIPSIS}"


def figure(value: Any) -> str:
    """A number with four significant digits and thousands separated; `-` for none."""
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return "-" if value is None else str(value)
    if isinstance(value, int) or (isinstance(value, float) and value.is_integer() and abs(value) < 1e15):
        return f"{value:,.0f}"
    return f"{value:.4g}" if isinstance(value, float) else cut(str(value))


def percent(part: float, whole: float) -> str:
    """A share as per cent; tiny ones say that they are not nothing."""
    share = part / whole if whole else 0.0
    return "<0.1%" if 0 < share < 0.001 else f"{share:.1%}"


def png_uri(pixels: UInt8Array) -> str:
    """An image as a data URI of a PNG.

    Args:
        pixels: uint8 of shape [height, width, channels] with 1, 3 or 4 channels.
    """
    height, width, channels = pixels.shape
    colour = {1: 0, 3: 2, 4: 6}[channels]
    lines = np.zeros((height, width * channels + 1), np.uint8)  # each line begins with its filter: none
    lines[:, 1:] = pixels.reshape(height, -1)
    chunks = [
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 8, colour, 0, 0, 0)),
        (b"IDAT", zlib.compress(lines.tobytes(), 6)),
        (b"IEND", b""),
    ]
    data = b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body)) for name, body in chunks
    )
    return "data:image/png;base64," + base64.b64encode(data).decode()
