"""Training a task of the framework: check, split, fit the transforms, then drive the run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from lepton_ray.data.sampling import plan_sampling
from lepton_ray.data.split import split_rows
from lepton_ray.data.tables import Table, open_table, table_of
from lepton_ray.errors import UsageError
from lepton_ray.settings import Settings
from lepton_ray.storage import Store, open_store
from lepton_ray.tasks import AnyTask, find_task
from lepton_ray.training.batches import samples_as_planned
from lepton_ray.training.checkpoints import CheckpointStore, LoadedCheckpoint
from lepton_ray.training.checks import check_run
from lepton_ray.training.driver import Job, RunDriver
from lepton_ray.training.initialisation import Matched, check_initial
from lepton_ray.training.plan import TaskRows
from lepton_ray.training.progress import Progress
from lepton_ray.training.record import RunRecord
from lepton_ray.training.tensorboard import check_tensorboard
from lepton_ray.training.transfer import check_transfer


@dataclass(frozen=True)
class Rows:
    """The split rows and the transforms learnt on those to train."""

    train: pa.Table
    held_out: pa.Table
    transforms: dict[str, Any]
    initial: Matched | None
    """What the run starts from; None for random weights."""


@dataclass(frozen=True)
class TrainingResult:
    """A finished run."""

    run: str
    attempt: int
    step: int
    """Optimiser steps of the whole run."""
    metrics: dict[str, float]
    """The task's metrics over the held-out rows after the last step."""
    best: dict[str, float] | None
    """Step, and value of the deciding metric, of the best evaluation."""
    stopped: str | None
    """Why training ended before its last epoch; None where it did not."""
    table: str | None
    """`name@version` of the data; None for a training function of one's own."""
    resumed: bool
    """Whether an earlier attempt had been at it."""
    generations: int
    """Worker groups over all attempts."""
    samples_exact: bool
    """Whether the sample ledger shows each training row used exactly as often as the settings say in each epoch."""
    record: dict[str, Any]

    @classmethod
    def of(cls, record: RunRecord, *, resumed: bool, generations: int) -> TrainingResult:
        """What the record of a finished run says."""
        fields = record.fields
        return cls(
            run=fields["run"],
            attempt=fields["attempts"][-1]["attempt"],
            step=fields["step"],
            metrics=fields["metrics"],
            best=fields.get("best"),
            stopped=fields.get("stopped"),
            table=f"{fields['table']}@{fields['table_version']}" if fields.get("table") else None,
            resumed=resumed,
            generations=generations,
            samples_exact=fields["samples_exact"],
            record=fields,
        )


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

    def fit(self, table: Table | Any = None) -> TrainingResult:
        """Train to the end; the same run name resumes where an earlier attempt stopped, and is done when it finished.

        Args:
            table: the rows: an opened table, or a data set in memory (an Arrow table, a pandas or polars frame, a
                Hugging Face or Ray data set), which becomes a version of the table `data.table`; None opens the table
                that the settings name.

        Raises UsageError for anything that is wrong before a worker starts, RefusedError where another driver holds
        the run, LeptonError with the failed rank's own words where the run gives up.
        """
        self.store.check_writable()
        opened = self._table(table)
        driver = RunDriver(self.settings, self.store, self._on_progress)
        record, resumed = driver.drive(lambda record: self._check_same(record, opened), lambda: self._job(opened))
        return TrainingResult.of(record, resumed=resumed, generations=len(driver.generations()))

    def _job(self, table: Table) -> Job:
        check_run(self.settings, self.task, table.schema)
        rows = self._prepare(table)
        training, count = self.settings.training, rows.train.num_rows
        weighs = training.sampling.weighted != "none" or training.sampling.class_weights != "none"
        sampling = plan_sampling(
            training.sampling, count, training.seed, rows.train[self.task.label] if weighs else None
        )
        check_tensorboard(training.logging)
        return Job(
            TaskRows(rows.train, rows.held_out),
            exact=lambda outcome: samples_as_planned(
                outcome["samples"],
                sampling,
                epochs=training.epochs,
                global_batch=training.global_batch,
                steps=outcome["step"],
                left_out=outcome["left_out_steps"],
            ),
            facts={
                "table": table.name,
                "table_version": table.version,
                "task": self.task.name,
                "total_steps": -(-count * training.epochs // training.global_batch),
                "rows": {"train": count, "held_out": rows.held_out.num_rows},
            },
            transforms=rows.transforms,
            table_fingerprint=table.fingerprint(),
            initial=rows.initial,
        )

    def _prepare(self, table: Table) -> Rows:
        rows = table.read()
        split = split_rows(rows, self.settings.data.split, label=self.task.label)
        train, held_out = rows.take(split.train), rows.take(split.held_out)
        transforms = self.task.fit(train)
        self.task.check_rows(held_out, transforms)
        training = self.settings.training
        check_transfer(training.transfer, self.task, transforms)
        if training.optimizer.groups:
            self._check_groups(transforms)
        # a resumed run keeps what it found at first: the source may have gone since, and its checkpoints suffice
        found = RunRecord.open(self.store, self.settings.run).fields.get("initial")
        initial = Matched(**found) if found else check_initial(training.initial, self.task, transforms, self.store)
        return Rows(train, held_out, transforms, initial)

    def _check_groups(self, transforms: dict[str, Any]) -> None:
        import torch

        from lepton_ray.training.optimisation import check_groups

        with torch.device("meta"):
            check_groups(self.task.build(transforms), self.settings.training.optimizer)

    def _table(self, table: Any) -> Table:
        data = self.settings.data
        if isinstance(table, Table):
            return table
        if table is not None:
            return table_of(self.store, data.table, table)
        version = data.version
        if version is None:
            # a resumed run keeps the version it started with, though the table may have grown since
            version = RunRecord.open(self.store, self.settings.run).fields.get("table_version")
        return open_table(self.store, data.table, version)

    def _check_same(self, record: RunRecord, table: Table) -> None:
        if record.fields.get("table_fingerprint") not in (None, table.fingerprint()):
            raise UsageError(
                f"run {self.settings.run}: table {table.name}@{table.version} is not the data the run started with "
                "(its fingerprint differs); restore the table or name another run"
            )


def final_checkpoint(store: Store, result: TrainingResult, *, best: bool = False) -> LoadedCheckpoint:
    """The verified checkpoint after the last step of a finished run, or that of its best evaluation."""
    step = int(result.best["step"]) if best and result.best else result.step
    return CheckpointStore(store, result.run, result.attempt).load(step)
