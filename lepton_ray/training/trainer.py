"""The driver's side of a run: check, lease, split, fit the transforms, launch the ranks, record what happened."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import platform
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import yaml

import lepton_ray
from lepton_ray.cluster import Cluster, connect
from lepton_ray.data.split import split_rows
from lepton_ray.data.tables import Table, open_table
from lepton_ray.errors import LeptonError, UsageError, shown
from lepton_ray.settings import Settings
from lepton_ray.settings.loading import parse_yaml
from lepton_ray.storage import Store, open_store
from lepton_ray.tasks import AnyTask, find_task
from lepton_ray.training.checkpoints import CheckpointStore, LoadedCheckpoint
from lepton_ray.training.launch import check_resources, launch
from lepton_ray.training.lease import RunLease
from lepton_ray.training.plan import RankPlan
from lepton_ray.training.progress import Progress, ProgressWatch
from lepton_ray.training.record import FAILED, FINISHED, INTERRUPTED, RunRecord

FREE_TO_CHANGE = ("training.workers", "training.cpus_per_worker", "training.gpu", "training.max_failures",
                  "training.checkpoint", "publish", "serving", "data.source")  # fmt: skip
"""Settings that a resumed run may have otherwise than before; all others decide what the run computes."""
_GENERATION = re.compile(r"g([0-9]+)-rank0\.json")


@dataclass(frozen=True)
class Rows:
    """The split rows and the transforms learnt on those to train."""

    train: pa.Table
    held_out: pa.Table
    transforms: dict[str, Any]


@dataclass(frozen=True)
class TrainingResult:
    """A finished run."""

    run: str
    attempt: int
    step: int
    """Optimiser steps of the whole run."""
    metrics: dict[str, float]
    """The task's metrics over the held-out rows after the last step."""
    table: str
    """`name@version` of the data."""
    resumed: bool
    """Whether an earlier attempt had been at it."""
    generations: int
    """Worker groups over all attempts."""
    samples_exact: bool
    """Whether the sample ledger shows each training row used exactly once in each epoch."""
    record: dict[str, Any]


class Trainer:
    """Trains a task as the settings say, on the connected Ray cluster or a local one.

    Args:
        task: what is learnt; None takes the one that the settings name.
        settings: the whole tree; None takes the defaults.
        store: where everything is kept; None takes `LEPTON_STORE`, else `./lepton-store`.
        on_progress: called with the newest figures about once a second.
    """

    def __init__(
        self,
        task: AnyTask | None = None,
        settings: Settings | None = None,
        *,
        store: Store | None = None,
        on_progress: Callable[[Progress], None] | None = None,
    ) -> None:
        self.settings = settings or Settings()
        self.task = task or find_task(self.settings.task.name, self.settings.task.options)
        self.store = store or open_store()
        self._on_progress = on_progress or (lambda _: None)

    def fit(self, table: Table | None = None) -> TrainingResult:
        """Train to the end; the same run name resumes where an earlier attempt stopped, and is done when it finished.

        Raises UsageError for anything that is wrong before a worker starts, RefusedError where another driver holds
        the run, LeptonError with the failed rank's own words where the run gives up.
        """
        run = self.settings.run
        self.store.check_writable()
        table = table or self._table()
        self.task.check_columns(table.schema)
        record = RunRecord.open(self.store, run)
        if self._finished(record, table):
            return self._result(record, resumed=True)
        # all that can be wrong is told before anything is written
        rows = self._prepare(table)
        with connect() as cluster:
            self._check_cluster(cluster)
            lease = RunLease.acquire(self.store, run)
            try:
                record = RunRecord.open(self.store, run)  # another driver may have changed it meanwhile
                if self._finished(record, table):
                    return self._result(record, resumed=True)
                return self._attempt(cluster, lease, record, table, rows)
            finally:
                lease.release()

    def _finished(self, record: RunRecord, table: Table) -> bool:
        """Whether the run is done already. Raises UsageError where it was started with other settings or data."""
        if record.exists:
            self._check_unchanged(record, table)
        return bool(record.fields.get("state") == FINISHED)

    def _prepare(self, table: Table) -> Rows:
        rows = table.read()
        split = split_rows(rows, self.settings.data.split, label=self.task.label)
        train, held_out = rows.take(split.train), rows.take(split.held_out)
        transforms = self.task.fit(train)
        self.task.check_rows(held_out, transforms)
        return Rows(train, held_out, transforms)

    def _table(self) -> Table:
        data = self.settings.data
        version = data.version
        if version is None:
            # a resumed run keeps the version it started with, though the table may have grown since
            version = RunRecord.open(self.store, self.settings.run).fields.get("table_version")
        return open_table(self.store, data.table, version)

    def _check_unchanged(self, record: RunRecord, table: Table) -> None:
        run = self.settings.run
        before = _flat(parse_yaml(self.store.get(f"runs/{run}/spec.yaml").decode(), f"runs/{run}/spec.yaml"))
        now = _flat(self.settings.model_dump(mode="json"))
        changed = [
            f"{key} was {shown(before.get(key))}, is {shown(now.get(key))}"
            for key in sorted(before.keys() | now.keys())
            if before.get(key) != now.get(key) and not key.startswith(FREE_TO_CHANGE)
        ]
        if changed:
            raise UsageError(
                f"run {run} was started otherwise: {'; '.join(changed)}; set them back or name another run"
            )
        if record.fields.get("table_fingerprint") not in (None, table.fingerprint()):
            raise UsageError(
                f"run {run}: table {table.name}@{table.version} is not the data the run started with (its fingerprint "
                "differs); restore the table or name another run"
            )

    def _attempt(
        self, cluster: Cluster, lease: RunLease, record: RunRecord, table: Table, rows: Rows
    ) -> TrainingResult:
        resumed = record.exists
        run, training = self.settings.run, self.settings.training
        fingerprint = table.fingerprint()
        self.store.put(f"runs/{run}/spec.yaml", _spec(self.settings))
        record.fields.update(
            workers=training.workers,
            table=table.name,
            table_version=table.version,
            table_fingerprint=fingerprint,
            task=self.task.name,
            total_steps=-(-rows.train.num_rows * training.epochs // training.global_batch),
            transforms=rows.transforms,
            rows={"train": rows.train.num_rows, "held_out": rows.held_out.num_rows},
            model_version=None,
            environment=environment(),
        )
        record.begin_attempt(lease.attempt)
        CheckpointStore(self.store, run, lease.attempt).collect_orphans()
        plan = RankPlan(self.settings, self.store.uri, lease.attempt, rows.transforms, fingerprint)
        return self._launch(cluster, lease, record, plan, rows, resumed=resumed)

    def _launch(
        self, cluster: Cluster, lease: RunLease, record: RunRecord, plan: RankPlan, rows: Rows, *, resumed: bool
    ) -> TrainingResult:
        before = self._generations()
        watch = ProgressWatch(self.store, self.settings.run, max(before, default=0))

        def poll(*, now: bool = False) -> None:
            if progress := watch.poll(now=now):
                self._on_progress(progress)

        state, changes = INTERRUPTED, dict[str, Any]()
        try:
            outcome = launch(plan, rows.train, rows.held_out, watch=poll, lost=lease.lost, cluster=cluster)
            exact = _exact(outcome["samples"], rows.train.num_rows, self.settings.training.epochs)
            changes = {"step": outcome["step"], "metrics": outcome["metrics"], "samples_exact": exact}
            state = FINISHED
        except LeptonError as error:
            state, changes = FAILED, {"error": str(error)}
            raise
        finally:
            if not lease.lost.is_set():
                generations = len(self._generations()) - len(before)
                record.fields["attempts"][-1]["generations"] = generations
                record.fields["failures"] += max(0, generations - 1) + (state == FAILED)
                record.end_attempt(state, **changes)
        poll(now=True)
        return self._result(record, resumed=resumed)

    def _check_cluster(self, cluster: Cluster) -> None:
        import ray

        check_resources(self.settings.training, cluster, ray.cluster_resources())

    def _generations(self) -> list[int]:
        names = self.store.list_names(f"runs/{self.settings.run}/ledger")
        return [int(found.group(1)) for name in names if (found := _GENERATION.fullmatch(name))]

    def _result(self, record: RunRecord, *, resumed: bool) -> TrainingResult:
        fields = record.fields
        return TrainingResult(
            run=self.settings.run,
            attempt=fields["attempts"][-1]["attempt"],
            step=fields["step"],
            metrics=fields["metrics"],
            table=f"{fields['table']}@{fields['table_version']}",
            resumed=resumed,
            generations=len(self._generations()),
            samples_exact=fields["samples_exact"],
            record=fields,
        )


def final_checkpoint(store: Store, result: TrainingResult) -> LoadedCheckpoint:
    """The verified checkpoint after the last step of a finished run."""
    found = CheckpointStore(store, result.run, result.attempt).newest()
    if found is None or found.step != result.step:
        skipped = "; ".join(found.skipped) if found else "there is none"
        raise LeptonError(f"run {result.run}: the checkpoint of its last step {result.step} does not verify: {skipped}")
    return found


def environment() -> dict[str, str]:
    """What the run's figures depend on beside its settings: versions and the driver's machine."""
    packages = ("lepton-ray", "ray", "torch", "numpy", "pyarrow", "safetensors")
    found = {"python": platform.python_version(), "platform": platform.platform()}
    for name in packages:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:  # run from a source tree that is not installed
            found[name] = lepton_ray.__version__ if name == "lepton-ray" else "unknown"
    return found


def settings_digest(settings: Settings) -> str:
    """SHA-256 of the resolved settings in canonical JSON."""
    return hashlib.sha256(json.dumps(settings.model_dump(mode="json"), sort_keys=True).encode()).hexdigest()


def _spec(settings: Settings) -> bytes:
    return yaml.safe_dump(settings.model_dump(mode="json"), sort_keys=False).encode()


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict) or not tree:
        return {prefix.removesuffix("."): tree}
    return {key: value for name, inner in tree.items() for key, value in _flat(inner, f"{prefix}{name}.").items()}


def _exact(samples: dict[str, Any], rows: int, epochs: int) -> bool:
    from lepton_ray.data.order import SampleLedger

    ledger = SampleLedger.from_json(samples)
    return ledger.epochs() == list(range(epochs)) and all(ledger.used_exactly_once(e, rows) for e in range(epochs))
