"""A small slice of the real digits and settings that train on it in seconds."""

from __future__ import annotations

from typing import Any

import pyarrow as pa

from lepton_ray.data.digits import load_digits
from lepton_ray.data.tables import ingest
from lepton_ray.settings import Settings, parse_settings
from lepton_ray.storage import Store

ROWS = 300


def digits_slice(rows: int = ROWS) -> pa.Table:
    """Every n-th row of the 5,000 real digits, which are sorted by label."""
    whole = load_digits()
    return whole.take(list(range(0, whole.num_rows, whole.num_rows // rows))[:rows])


def fill(store: Store, name: str = "digits") -> None:
    """A table of the slice."""
    ingest(store, name, digits_slice())


def small_settings(run: str, **training: Any) -> Settings:
    """A run of 300 short steps with a checkpoint every 40."""
    options = {
        "epochs": 20,
        "optimizer": {"learning_rate": 5e-3},
        "global_batch": 16,
        "workers": 2,
        "checkpoint": {"every_steps": 40},
        **training,
    }
    return parse_settings(
        {
            "run": run,
            "task": {"options": {"width": 8, "dropout": 0.1}},
            "training": options,
            "publish": {"model": "digits", "alias": "champion"},
        }
    )
