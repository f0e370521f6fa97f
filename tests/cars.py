"""A real small table with missing values: 406 cars of 1970 to 1982 (ASA Data Exposition 1983), from vega_datasets.

8 rows lack the mileage and 6 the horsepower. Columns: `key`, `cylinders`, `displacement`, `horsepower`, `weight`,
`acceleration`, `year`, `origin`, and `mileage` (miles per gallon).
"""

from __future__ import annotations

import io
import json
import zipfile

import pyarrow as pa
from airports import PACKAGE

from lepton_ray.data.digits import fetch

NAMES = {
    "Cylinders": "cylinders", "Displacement": "displacement", "Horsepower": "horsepower", "Weight_in_lbs": "weight",
    "Acceleration": "acceleration", "Origin": "origin", "Miles_per_Gallon": "mileage",
}  # fmt: skip


def cars(label: str = "mileage") -> pa.Table:
    """The cars with one column as `label`; rows that lack it are left out."""
    with zipfile.ZipFile(io.BytesIO(fetch(PACKAGE))) as wheel:
        rows = json.loads(wheel.read("vega_datasets/_data/cars.json"))
    table = pa.table({
        "key": [f"{place:03d} {row['Name']}" for place, row in enumerate(rows)],
        "year": [int(row["Year"][:4]) for row in rows],
        **{ours: [row[theirs] for row in rows] for theirs, ours in NAMES.items()},
    })  # fmt: skip
    named = table.rename_columns(["label" if name == label else name for name in table.column_names])
    return named.filter(named["label"].is_valid())
