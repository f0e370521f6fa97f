"""The recorder: counters, gauges and histograms of one rank or replica, written to the store as snapshots.

It never raises into its caller: what cannot be recorded or written is counted, and told once per cause in the log.
The values are kept in plain cells rather than in `prometheus_client`'s: half the cost per call on the step path, and
workers and replicas start without importing the library. The exporter turns snapshots into Prometheus' formats.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from pathlib import Path
from typing import Any

from lepton_ray.monitoring.catalogue import LABELS, MAX_LABEL_LENGTH, METRICS, OTHER, Metric
from lepton_ray.monitoring.cells import Cell, Counter, Gauge, Histogram, as_json
from lepton_ray.monitoring.ledger import RankLedger
from lepton_ray.storage import Store, open_store

SNAPSHOT_VERSION = 1
MAX_CELLS = 2_000
"""Series of one recorder; further label values are dropped and counted."""

_log = logging.getLogger(__name__)
_CELL_KINDS: dict[str, type[Counter | Gauge]] = {"counter": Counter, "gauge": Gauge}


class Recorder:
    """Counts, sets and observes the catalogue's metrics; a daemon thread writes them to the store.

    Args:
        store_uri: where snapshots go; opened by the thread, so that a store that is away costs the caller nothing.
        key: the snapshot's key, e.g. `runs/<run>/metrics/g<generation>-rank<rank>.json`. One key, one recorder.
        labels: labels of every sample, e.g. `{"run": "digits", "rank": "0"}`; each metric takes those it declares.
        every_s: seconds between two snapshots.

    Only rank 0 (or a recorder without a rank) records what is one value for the whole run: see `step`.
    """

    def __init__(self, store_uri: str, key: str, labels: dict[str, str], *, every_s: float = 2.0) -> None:
        self._store_uri = store_uri
        self._key = key
        self._labels = {str(name): _text(value) for name, value in labels.items()}
        self._every_s = every_s
        self._rank0 = self._labels.get("rank", "0") == "0"
        self._lock = threading.Lock()
        self._cells: dict[tuple[str, tuple[tuple[str, str], ...]], Cell] = {}
        self._resolved: dict[tuple[Any, ...], Cell] = {}
        self._seen: dict[tuple[str, str], set[str]] = {}
        self._told: set[str] = set()
        self._store: Store | None = None
        self._ledger: RankLedger | None = None
        self._writing = threading.Lock()
        self._stop = threading.Event()
        self._wake = threading.Event()
        self._thread: threading.Thread | None = None

    def count(self, metric: str, /, amount: float = 1.0, **labels: object) -> None:
        """Add `amount` (0 or more, finite) to a counter; a gauge takes either sign."""
        try:
            cell = self._resolved.get((metric, *labels.items()) if labels else (metric,)) or self._cell(metric, labels)
            cell.add(amount)
        except Exception as error:  # noqa: BLE001 - recording never reaches its caller
            self._failed(error)

    def set(self, metric: str, /, value: float, **labels: object) -> None:
        """Set a gauge. NaN and infinities are kept: a loss that is not a number is news."""
        try:
            cell = self._resolved.get((metric, *labels.items()) if labels else (metric,)) or self._cell(metric, labels)
            cell.set(value)
        except Exception as error:  # noqa: BLE001 - recording never reaches its caller
            self._failed(error)

    def observe(self, metric: str, /, value: float, **labels: object) -> None:
        """Add one observation (0 or more, finite) to a histogram."""
        try:
            cell = self._resolved.get((metric, *labels.items()) if labels else (metric,)) or self._cell(metric, labels)
            cell.observe(value)
        except Exception as error:  # noqa: BLE001 - recording never reaches its caller
            self._failed(error)

    def step(self, step: int, seconds: float, samples: int, *, replayed: bool = False) -> None:
        """Record one optimizer step of this rank.

        Args:
            step: steps of the run that are done now.
            seconds: since the step before.
            samples: rows of this rank's share of the global batch.
            replayed: an earlier generation had done this step already.
        """
        self.observe("lepton_training_step_seconds", seconds)
        self.count("lepton_training_samples_total", samples)
        if self._rank0:
            self.count("lepton_training_steps_total")
            self.set("lepton_training_step", step)
            if replayed:
                self.count("lepton_training_replayed_steps_total")

    def follow(self, ledger: RankLedger) -> None:
        """From now on each snapshot also carries the ledger's phases, and the ledger's entry is written beside it."""
        self._ledger = ledger

    def start(self) -> None:
        """Start the thread that writes a snapshot every `every_s` seconds."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="lepton-recorder", daemon=True)
            self._thread.start()

    def flush(self) -> None:
        """Write a snapshot now, in the caller's thread; a failure is counted."""
        with self._writing:
            try:
                self._write()
            except Exception as error:  # noqa: BLE001 - a store that is away must not stop training
                self._failed(error, "storage")

    def write_soon(self) -> None:
        """Let the thread write a snapshot now rather than at its next turn."""
        self._wake.set()

    def close(self, timeout_s: float = 5.0) -> None:
        """Write a last snapshot and stop the thread; gives up after `timeout_s`, as the store may hang."""
        self._stop.set()
        self._wake.set()
        self.start()
        if self._thread is not None:
            self._thread.join(timeout_s)
            if self._thread.is_alive():
                self._failed(TimeoutError(f"last snapshot not written within {timeout_s} s"), "storage")

    def snapshot(self) -> dict[str, Any]:
        """The JSON snapshot as of now."""
        self._sample_process()
        families: dict[str, dict[str, Any]] = {}
        with self._lock:
            for (name, labels), cell in self._cells.items():
                family = families.setdefault(name, {"name": name, "kind": METRICS[name].kind, "samples": []})
                family["samples"].append({"labels": dict(labels), **cell.sample()})
        return {
            "version": SNAPSHOT_VERSION,
            "labels": self._labels,
            "written_at": time.time(),
            "families": list(families.values()),
        }

    def _run(self) -> None:
        while not self._stop.is_set():
            self._wake.wait(self._every_s)
            self._wake.clear()
            if not self._stop.is_set():
                self.flush()
        self.flush()

    def _write(self) -> None:
        if self._store is None:
            self._store = open_store(self._store_uri)
        self._store.put(self._key, as_json(self.snapshot()))
        if self._ledger is not None:
            self._store.put(self._ledger.key, as_json(self._ledger.entry()))

    def _sample_process(self) -> None:
        if "rank" not in self._labels:
            return
        with contextlib.suppress(Exception):
            self._mirror("lepton_process_cpu_seconds_total", time.process_time())
            resident = int(Path("/proc/self/statm").read_text("ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")
            self._cell("lepton_process_resident_memory_bytes", {}).set(float(resident))
        if self._ledger is not None:
            for phase, spent in self._ledger.clock.totals().items():
                self._mirror("lepton_training_phase_seconds_total", spent, phase=phase)

    def _mirror(self, name: str, value: float, **labels: str) -> None:
        cell = self._cell(name, labels)
        if isinstance(cell, Counter):
            cell.mirror(value)

    def _cell(self, name: str, labels: dict[str, Any]) -> Cell:
        """The cell of a metric and its labels, made where it is new; bounds are applied here, once per label set."""
        metric = METRICS.get(name)
        if metric is None:
            raise _UnrecordableError("unknown_metric", f"metric {ascii(name)[:80]} is not in the catalogue")
        expected = set(metric.labels) - self._labels.keys()
        if set(labels) != expected:
            raise _UnrecordableError("labels", f"{name} takes the labels {sorted(expected)}, got {sorted(labels)}")
        with self._lock:
            bounded = tuple((label, self._bounded(name, label, labels[label])) for label in sorted(expected))
            cell = self._cells.get((name, bounded))
            if cell is None:
                if len(self._cells) >= MAX_CELLS and name != "lepton_recorder_errors_total":
                    raise _UnrecordableError(
                        "limit", f"more than {MAX_CELLS} series; {name} with new labels is dropped"
                    )
                cell = self._cells[name, bounded] = _make(metric, self._lock)
            if len(self._resolved) < 2 * MAX_CELLS:  # values without end are looked up the slow way
                self._resolved[(name, *labels.items())] = cell
        return cell

    def _bounded(self, metric: str, label: str, value: object) -> str:
        text, declared = _text(value), LABELS[label]
        if declared.values:
            return text if text in declared.values else OTHER
        seen = self._seen.setdefault((metric, label), set())
        if text in seen:
            return text
        if len(seen) >= declared.bound:
            return OTHER
        seen.add(text)
        return text

    def _failed(self, error: Exception, cause: str = "value") -> None:
        """Count a failure, and log the first of each cause."""
        with contextlib.suppress(Exception):
            cause = error.cause if isinstance(error, _UnrecordableError) else cause
            if cause not in self._told:
                self._told.add(cause)
                _log.warning("monitoring: %s (%s); counted from here on, not logged again", error, cause)
            self._cell("lepton_recorder_errors_total", {"cause": cause}).add(1.0)


class _UnrecordableError(ValueError):
    """A recording that the catalogue does not allow."""

    def __init__(self, cause: str, message: str) -> None:
        super().__init__(message)
        self.cause = cause


def _make(metric: Metric, lock: threading.Lock) -> Cell:
    return Histogram(lock, metric.buckets) if metric.kind == "histogram" else _CELL_KINDS[metric.kind](lock)


def _text(value: object) -> str:
    text = value if isinstance(value, str) else str(value)
    return text[:MAX_LABEL_LENGTH].encode("utf-8", "replace").decode("utf-8")
