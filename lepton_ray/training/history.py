"""What rank 0 notes of a run: figures per interval of steps, and each evaluation; written beside training.

A thread writes, so that a store that is slow or away costs training nothing; whatever goes wrong there is logged once.
"""

from __future__ import annotations

import collections
import io
import json
import logging
import math
import threading
import time
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from lepton_ray.storage import Store
from lepton_ray.training.tensorboard import TensorBoard

PARTS = ("data_wait", "forward", "backward", "collective", "optimizer", "checkpoint", "logging")
"""Parts of a step, in seconds per step. `collective` is the share of `backward` that waits for the gradient exchange
(`training.collective_time`); the others stand beside each other."""
EVERY_S = 30.0
"""Seconds after which noted figures are written even where no evaluation comes."""

_log = logging.getLogger(__name__)


class History:
    """Rows of `metrics/history-g<n>.parquet` and entries of `metrics/evaluations-g<n>.json` of a run.

    Args:
        store: where they go.
        run: name of the run.
        generation: number of the worker group, which has files of its own.
        tensorboard: also write event files under `tensorboard/`.
    """

    def __init__(self, store: Store, run: str, generation: int, *, tensorboard: bool = False) -> None:
        self._store = store
        self._folder, self._suffix = f"runs/{run}/metrics", f"g{generation}"
        self._tensorboard = TensorBoard(store, run, generation) if tensorboard else None
        self._rows: collections.deque[dict[str, float]] = collections.deque()  # filled here, emptied by the thread
        self.evaluations: list[dict[str, Any]] = []
        self._evaluated = 0  # evaluations that TensorBoard has
        self._written: list[pa.Table] = []
        self._last_write = time.monotonic()
        self._wanted, self._closing = threading.Event(), threading.Event()
        self._thread: threading.Thread | None = None
        self._told = False

    def note(self, step: int, epoch: int, figures: dict[str, float]) -> None:
        """One interval: mean loss, learning rate, gradient norm, samples per second, seconds per step of each part."""
        self._rows.append({"step": step, "epoch": epoch, "time": time.time(), **figures})
        if time.monotonic() - self._last_write > EVERY_S:
            self.write()

    def evaluated(
        self, step: int, epoch: int, metrics: dict[str, float], tables: dict[str, list[Any]] | None = None
    ) -> None:
        """One evaluation of the held-out rows; tables (a confusion matrix) are kept of the newest one only."""
        if self.evaluations:
            self.evaluations[-1] = {name: value for name, value in self.evaluations[-1].items() if name != "tables"}
        # JSON has no NaN: a value that is not finite is null
        finite = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
        entry = {"step": step, "epoch": epoch, "time": time.time(), "metrics": finite}
        self.evaluations.append({**entry, "tables": tables} if tables else entry)

    def write(self) -> None:
        """Have everything noted so far written; does not wait for it."""
        self._last_write = time.monotonic()
        self._wanted.set()
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="lepton-history", daemon=True)
            self._thread.start()

    def close(self, timeout_s: float = 10.0) -> bool:
        """Write what is left; False where that took longer than `timeout_s` or failed."""
        if self._thread is None and not self._rows and not self.evaluations:
            return True
        self._closing.set()
        self.write()
        if self._thread is not None:
            self._thread.join(timeout_s)
        return not self._told and not (self._thread is not None and self._thread.is_alive())

    def _run(self) -> None:
        closing = False
        while not closing:
            self._wanted.wait()
            self._wanted.clear()
            closing = self._closing.is_set()  # asked before writing: all that was noted before `close` is written
            self._write()
        if self._tensorboard is not None:
            self._tensorboard.close()

    def _write(self) -> None:
        try:
            rows = [self._rows.popleft() for _ in range(len(self._rows))]
            evaluations = list(self.evaluations)
            if self._tensorboard is not None:
                self._tensorboard.add(rows, evaluations[self._evaluated :])
                self._evaluated = len(evaluations)
            if rows:
                self._written = [pa.concat_tables([*self._written, _table(rows)], promote_options="default")]
            if self._written:
                sink = io.BytesIO()
                pq.write_table(self._written[0], sink)
                self._store.put(f"{self._folder}/history-{self._suffix}.parquet", sink.getvalue())
            self._store.put(f"{self._folder}/evaluations-{self._suffix}.json", json.dumps(evaluations).encode())
        except Exception as error:  # noqa: BLE001 - a store that is away must not stop training
            if not self._told:
                _log.warning("history: %s; tried again with the next write, not told again", error)
            self._told = True
        else:
            self._told = False


def _table(rows: list[dict[str, float]]) -> pa.Table:
    """Rows with a column for each name that any of them has; null where a row lacks it."""
    names = dict.fromkeys(name for row in rows for name in row)
    kinds = {"step": pa.int64(), "epoch": pa.int64()}
    return pa.Table.from_pylist(rows, pa.schema([(name, kinds.get(name, pa.float64())) for name in names]))
