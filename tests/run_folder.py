"""Run folders for tests, written through the real ledger and recorder with clocks that a test can turn.

`build_run` plays a run of two ranks: a worker group that is lost, one that goes on from the newest checkpoint, and
(where asked for) a second attempt of the driver. Everything a trainer leaves in the store is there.
"""

from __future__ import annotations

import io
import json
import math
import time
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from lepton_ray.monitoring.ledger import RankLedger
from lepton_ray.monitoring.recorder import Recorder
from lepton_ray.storage import Store

SPEC = """\
run: {run}
task:
  name: image_classification
  options:
    augment: true
data:
  table: digits
  source: digits
training:
  epochs: 12
  global_batch: 64
  workers: {workers}
  optimizer:
    name: adamw
    learning_rate: 0.002
    schedule: cosine
publish:
  model: digits
"""


class Clock:
    """A clock that a test turns."""

    def __init__(self, at: float) -> None:
        self.at = at

    def __call__(self) -> float:
        return self.at

    def pass_time(self, seconds: float) -> None:
        """Turn it on."""
        self.at += seconds


@dataclass
class BuiltRun:
    """What was written, for a test to compare with."""

    run: str
    record: dict[str, Any]
    steps: dict[str, int] = field(default_factory=dict)
    """Steps counted by rank 0 and rows counted by all ranks, replayed ones included."""
    ended_at: float = 0.0


PARTS = {"data_wait": 0.0008, "forward": 0.011, "backward": 0.017, "optimizer": 0.0045, "logging": 0.0004}
"""Seconds per step."""


def build_run(
    store: Store,
    run: str = "digits-cnn",
    *,
    workers: int = 2,
    epochs: int = 12,
    steps_per_epoch: int = 63,
    state: str = "finished",
    lost_at: int | None = 430,
    created_at: float | None = None,
    model_version: str | None = "digits:3",
) -> BuiltRun:
    """Write the folder of a run that lost its worker group after step `lost_at` (None: it never did)."""
    total = epochs * steps_per_epoch
    created_at = created_at if created_at is not None else time.time() - 90.0
    built = BuiltRun(run, {}, {"steps": 0, "rows": 0})
    stop = total if state == "finished" else total * 2 // 3
    spans = [(0, stop)] if lost_at is None or lost_at >= stop else [(0, lost_at), (lost_at // 100 * 100, stop)]
    at = created_at + 6.2
    for index, (first, last) in enumerate(spans):
        generation = _Generation(store, built, run, index + 1, workers, steps_per_epoch, total, lost_at or 0)
        at = generation.play(at, first, last, finished=last == total)
        at += 4.1 if last != stop else 0.9
    built.ended_at = at
    over = state != "running"
    metrics = {"accuracy": accuracy(stop), "loss": held_out_loss(stop)} if stop == total else {}
    built.record = {
        "run": run,
        "state": state,
        "created_at": created_at,
        "started_at": created_at + 0.4,
        "finished_at": at if state in ("finished", "failed") else None,
        "updated_at": at,
        "attempts": [
            {
                "attempt": 1,
                "driver": "workbench:4242",
                "started_at": created_at + 0.4,
                "ended_at": at if over else None,
                "generations": len(spans),
                "outcome": state if over else None,
            }
        ],
        "workers": workers,
        "table": "digits",
        "table_version": 0,
        "table_fingerprint": "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08",
        "task": "image_classification",
        "total_steps": total,
        "step": stop,
        "epoch": stop // steps_per_epoch,
        "metrics": metrics,
        "rows": {"train": 4000, "held_out": 1000},
        "samples_exact": True if stop == total else None,
        "model_version": model_version if state == "finished" else None,
        "error": "rank 1: RuntimeError: no space left on device" if state == "failed" else None,
        "failures": len(spans) - 1,
    }
    put_json(store, f"runs/{run}/record.json", built.record)
    store.put(f"runs/{run}/spec.yaml", SPEC.format(run=run, workers=workers).encode())
    for step in range(100, stop + 1, 100):
        put_checkpoint(store, run, step, created_at + 6.2 + step * 0.034)
    return built


class _Generation:
    """One worker group of a played run."""

    def __init__(
        self,
        store: Store,
        built: BuiltRun,
        run: str,
        number: int,
        workers: int,
        steps_per_epoch: int,
        total: int,
        reached: int,
    ) -> None:
        self.store, self.built, self.run, self.number, self.workers = store, built, run, number, workers
        self.steps_per_epoch, self.total, self.reached = steps_per_epoch, total, reached

    def play(self, at: float, first: int, last: int, *, finished: bool) -> float:
        """Do the steps after `first` up to `last`; returns the wall time at which the group is gone."""
        self.history: list[dict[str, float]] = []
        self.evaluations: list[dict[str, Any]] = []
        ends = [self._rank(rank, at, first, last, finished=finished) for rank in range(self.workers)]
        folder = f"runs/{self.run}/metrics"
        sink = io.BytesIO()
        pq.write_table(pa.Table.from_pylist(self.history), sink)
        self.store.put(f"{folder}/history-g{self.number}.parquet", sink.getvalue())
        self.store.put(f"{folder}/evaluations-g{self.number}.json", json.dumps(self.evaluations).encode())
        return max(ends)

    def _rank(self, rank: int, at: float, first: int, last: int, *, finished: bool) -> float:
        clock = Clock(at)
        ledger = RankLedger(self.run, 1, self.number, rank, self.workers, now=clock, wall=clock)
        recorder = Recorder(
            self.store.uri,
            f"runs/{self.run}/metrics/g{self.number}-rank{rank}.json",
            {"run": self.run, "rank": str(rank)},
        )
        recorder.follow(ledger)
        clock.pass_time(1.4 + 0.1 * rank)  # loading
        if rank == 0 and self.number > 1:
            recorder.count("lepton_training_restarts_total", cause="worker_lost")
        reached = self.reached if self.number > 1 else 0
        for step in range(first + 1, last + 1):
            self._step(ledger, clock, recorder, rank, step, replayed=step <= reached)
        if finished:
            ledger.switch("checkpoint")
            clock.pass_time(0.05)
            ledger.finish()
            clock.pass_time(0.2)
        recorder.flush()
        return clock.at

    def _step(
        self, ledger: RankLedger, clock: Clock, recorder: Recorder, rank: int, step: int, *, replayed: bool
    ) -> None:
        begun, slow = clock.at, 1.0 + 0.25 * math.sin(step / 9.0) ** 8
        for phase, spent in PARTS.items():
            ledger.switch("replayed" if replayed and phase in ("forward", "backward", "optimizer") else phase)
            clock.pass_time(spent * slow)
        ledger.step_done(step, replayed=replayed)
        recorder.step(step, clock.at - begun, 32, replayed=replayed)
        self.built.steps["rows"] += 32
        if rank == 0:
            self.built.steps["steps"] += 1
            self._report(recorder, step, clock, 64 / (clock.at - begun), slow)
        if step % self.steps_per_epoch == 0:
            ledger.switch("validation")
            clock.pass_time(0.22)
            if rank == 0:
                metrics = {"accuracy": accuracy(step), "loss": held_out_loss(step)}
                epoch = step // self.steps_per_epoch
                self.evaluations.append({"step": step, "epoch": epoch, "time": clock.at, "metrics": metrics})
                for name, value in metrics.items():
                    recorder.set("lepton_training_evaluation", value, metric=name)
        if step % 100 == 0:
            ledger.switch("checkpoint")
            clock.pass_time(0.03)
            if rank == 0:
                recorder.observe("lepton_checkpoint_seconds", 0.031)
                recorder.count("lepton_checkpoint_committed_total")
                recorder.set("lepton_checkpoint_bytes", 2_811_904)

    def _report(self, recorder: Recorder, step: int, clock: Clock, speed: float, slow: float) -> None:
        loss = training_loss(step)
        recorder.set("lepton_training_loss", loss)
        recorder.set("lepton_training_samples_per_second", speed)
        recorder.set("lepton_training_world_size", self.workers)
        recorder.set("lepton_training_total_steps", self.total)
        if step % 10 == 0 or step == self.total:
            parts = {name: spent * slow for name, spent in PARTS.items() if name != "logging"}
            checkpoint = 0.003 if step % 100 == 0 else 0.0
            self.history.append(
                {
                    "step": step,
                    "epoch": step // self.steps_per_epoch,
                    "time": clock.at,
                    "loss": loss,
                    "learning_rate": 0.002 * (1 + math.cos(math.pi * step / self.total)) / 2,
                    "gradient_norm": 1.0,
                    "samples_per_second": speed,
                    **parts,
                    "collective": parts["backward"] / 5,
                    "checkpoint": checkpoint,
                }
            )


def training_loss(step: int) -> float:
    """A loss curve with the bumps of real ones."""
    return (
        2.2 * math.exp(-step / 70) + 0.09 + 0.05 * math.exp(-step / 400) * math.sin(step * 0.7) * math.cos(step * 1.9)
    )


def held_out_loss(step: int) -> float:
    """Held-out cross-entropy at a step."""
    return 2.1 * math.exp(-step / 60) + 0.083


def accuracy(step: int) -> float:
    """Held-out accuracy at a step."""
    return 0.978 - 0.5 * math.exp(-step / 75)


def put_json(store: Store, key: str, value: Any) -> None:
    """Write a JSON file."""
    store.put(key, json.dumps(value, indent=1).encode())


def put_checkpoint(store: Store, run: str, step: int, created_at: float) -> None:
    """A committed checkpoint: its manifest, as a reader of the folder sees it."""
    files = {
        "model.safetensors": {"path": "000001-ab/model.safetensors", "size": 1_405_000, "sha256": "0" * 64},
        "state.json": {"path": "000001-ab/state.json", "size": 1_904, "sha256": "0" * 64},
    }
    manifest = {"format": 1, "step": step, "attempt": 1, "created_at": created_at, "files": files, "world_size": 2}
    put_json(store, f"runs/{run}/checkpoints/step-{step:012d}/manifest.json", manifest)
