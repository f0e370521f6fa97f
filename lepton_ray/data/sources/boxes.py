"""Images with boxes: what an annotation becomes in a row, and what is wrong with one.

Columns: `boxes` list of [x_min, y_min, x_max, y_max] in pixels from the upper left corner, as the annotation has them;
`labels` list of whole numbers from 0; `class_names` list of text; `ignored` list of true or false (COCO's crowds, VOC's
difficult ones: not counted in an evaluation).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from lepton_ray.data.sources.rejects import Unreadable

BOX_COLUMNS = pa.schema(
    [
        ("boxes", pa.list_(pa.list_(pa.float64()))),
        ("labels", pa.list_(pa.int64())),
        ("class_names", pa.list_(pa.string())),
        ("ignored", pa.list_(pa.bool_())),
    ]
)
TOLERANCE = 1.0
"""Pixels that a box may reach beyond its image: annotations are rounded, some counted from 1."""


@dataclass(frozen=True)
class Box:
    """One annotated object."""

    corners: tuple[float, float, float, float]
    """x_min, y_min, x_max, y_max."""
    name: str
    ignored: bool = False


def box_columns(boxes: Sequence[Box], classes: Mapping[str, int]) -> dict[str, Any]:
    """The columns of an image's boxes."""
    return {
        "boxes": [list(box.corners) for box in boxes],
        "labels": [classes[box.name] for box in boxes],
        "class_names": [box.name for box in boxes],
        "ignored": [box.ignored for box in boxes],
    }


def fits(
    boxes: Sequence[Box], height: int | None = None, width: int | None = None
) -> Callable[[Mapping[str, Any]], None]:
    """A check of a decoded image against its annotation: its size where that is known, and that all boxes lie in it."""

    def check(row: Mapping[str, Any]) -> None:
        for name, said in (("height", height), ("width", width)):
            if said is not None and row[name] != said:
                raise Unreadable("annotation of another image", f"{name} is {row[name]}, annotated as {said}")
        for number, box in enumerate(boxes, start=1):
            x_min, y_min, x_max, y_max = box.corners
            what = f"box {number} is {list(box.corners)}"
            if not all(map(math.isfinite, box.corners)) or x_max <= x_min or y_max <= y_min:
                raise Unreadable("box without area", f"{what}; expected x_min < x_max and y_min < y_max")
            inside = min(x_min, y_min) >= -TOLERANCE
            if not inside or x_max > row["width"] + TOLERANCE or y_max > row["height"] + TOLERANCE:
                raise Unreadable("box outside its image", f"{what}; the image is {row['width']}x{row['height']}")

    return check
