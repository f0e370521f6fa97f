"""What rank 0 notes for the run report: figures per interval of steps, and each evaluation."""

from __future__ import annotations

import io
import json
import time
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from lepton_ray.errors import LeptonError
from lepton_ray.storage import Store

PARTS = ("data_wait", "forward", "backward", "optimizer", "checkpoint")


class History:
    """Rows of `metrics/history-g<n>.parquet` and entries of `metrics/evaluations-g<n>.json`, written at each epoch."""

    def __init__(self, store: Store, run: str, generation: int) -> None:
        self._store = store
        self._folder, self._suffix = f"runs/{run}/metrics", f"g{generation}"
        self._rows: list[dict[str, float]] = []
        self.evaluations: list[dict[str, Any]] = []

    def note(self, step: int, epoch: int, figures: dict[str, float]) -> None:
        """One interval: mean loss, learning rate, samples per second, seconds per step of each part."""
        self._rows.append({"step": step, "epoch": epoch, "time": time.time(), **figures})

    def evaluated(self, step: int, epoch: int, metrics: dict[str, float]) -> None:
        """One evaluation of the held-out rows."""
        self.evaluations.append({"step": step, "epoch": epoch, "time": time.time(), "metrics": metrics})

    def write(self) -> bool:
        """Write both files; False where storage is away, which must not stop training."""
        try:
            if self._rows:
                sink = io.BytesIO()
                pq.write_table(pa.Table.from_pylist(self._rows), sink)
                self._store.put(f"{self._folder}/history-{self._suffix}.parquet", sink.getvalue())
            self._store.put(
                f"{self._folder}/evaluations-{self._suffix}.json", json.dumps(self.evaluations, indent=1).encode()
            )
        except LeptonError:
            return False
        return True
