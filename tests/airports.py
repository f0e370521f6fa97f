"""A real messy CSV: the 3,376 airports of the package vega_datasets, counted by hand with awk and grep.

| what | rows |
|---|---|
| all | 3,376 |
| city and state `NA` | 12, of which 4 are not in the USA |
| country not `USA` | 4, just these |
| name with two spaces in a row | 12 |
| `iata` that is not three capital letters | 1,336 |
| same name, city and state as an earlier row | 1 (Friday Harbor) |
"""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

from lepton_ray.data.digits import Package, fetch

PACKAGE = Package(
    "vega_datasets==0.9.0",
    "vega_datasets-0.9.0-py3-none-any.whl",
    "3d7c63917be6ca9b154b565f4779a31fedce57b01b5b9d99d8a34a7608062a1d",
    "pip",
)


def airports(folder: Path) -> str:
    """The path of the CSV, taken out of the package into a folder."""
    path = folder / "airports.csv"
    with zipfile.ZipFile(io.BytesIO(fetch(PACKAGE))) as wheel:
        path.write_bytes(wheel.read("vega_datasets/_data/airports.csv"))
    return str(path)
