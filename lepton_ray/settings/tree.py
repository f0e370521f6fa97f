"""The settings tree. Frozen, unknown keys refused, every field with its meaning and unit."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from lepton_ray.settings.node import Node
from lepton_ray.settings.reading import ReadingSettings
from lepton_ray.settings.training import TrainingSettings
from lepton_ray.settings.tuning import TuningSettings

NAME_PATTERN = r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?"
"""Names of runs, tables, models, aliases and endpoints: a DNS label, so that each can name a Kubernetes object too."""


def check_name(value: str) -> str:
    """The value itself where it is a valid name, else ValueError."""
    if not re.fullmatch(NAME_PATTERN, value):
        raise ValueError(f"must match {NAME_PATTERN}: 1 to 63 of a-z, 0-9 and '-', no '-' at either end")
    return value


Name = Annotated[str, AfterValidator(check_name)]


class TaskSettings(Node):
    """What is learnt."""

    name: str = "image_classification"
    """A task of the entry point group `lepton_ray.tasks`."""
    options: dict[str, Any] = Field(default_factory=dict)
    """The task's own options, checked by the task when it is made."""


class CleaningSettings(Node):
    """What is done to rows when a table is filled."""

    drop_duplicates: bool = True
    """Rows equal in every column but the key are kept once (the first)."""
    drop_missing: bool = True
    """Rows with a null in any column are left out; otherwise they are kept and counted."""


class SplitSettings(Node):
    """Which rows are held out for evaluation, and which are not used at all before the end."""

    by: Literal["hash", "stratified", "group", "time", "column"] = "hash"
    """`hash`: each row decided by the hash of its key alone, so that no row changes sides when the table grows.
    `stratified`: the exact share of each label, rows ordered by that hash (rows may change sides when the table grows).
    `group`: by the hash of what `column` holds, so that rows of one patient, speaker or source are on one side.
    `time`: by `column`; the newest rows are the test, those before them are held out (as the table grows, rows move to
    the training side). `column`: the table says so itself."""
    held_out: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.2
    """Share of the rows (of the groups for `group`) that is held out (not used by `column`)."""
    test: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """Share that training neither learns from nor looks at: for `lepton-ray evaluate --split test` (not used by
    `column`)."""
    column: str = "split"
    """For `group` the column of the group, for `time` that of a date, time or number, for `column` the one that says
    `train`, `validation` or `test` (without `validation`, the rows of `test` are held out)."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Another seed gives another split."""

    @model_validator(mode="after")
    def _rows_to_train_on(self) -> Self:
        if self.held_out + self.test >= 1.0:
            raise ValueError(f"held_out {self.held_out:g} and test {self.test:g} leave no rows to train on")
        return self


class DataSettings(Node):
    """Where the rows come from."""

    table: Name = "digits"
    """Name of the table under `datasets/` of the store."""
    version: Annotated[int, Field(ge=0)] | None = None
    """Version of the table; the newest where none is given. A resumed run keeps the version it started with."""
    source: str | None = None
    """Filled from this source when the table does not exist yet; see `lepton-ray data ingest --help`."""
    reading: ReadingSettings = ReadingSettings()
    """How the source is read: format, types of columns, limits."""
    split: SplitSettings = SplitSettings()
    """Which rows are held out."""


class PublishSettings(Node):
    """What becomes of the trained model."""

    model: Name | None = None
    """Publish a model version under this name when training ends; null publishes nothing."""
    alias: Name | None = "champion"
    """Alias that is set to the published version; null sets none."""
    weights: Literal["last", "best"] = "last"
    """The model after the last step, or the one whose evaluation was best by the deciding metric."""


class ServingSettings(Node):
    """How an endpoint answers."""

    min_replicas: Annotated[int, Field(ge=0, le=10_000)] = 1
    """Replicas kept when idle; 0 scales to zero."""
    max_replicas: Annotated[int, Field(ge=1, le=10_000)] = 2
    """Replicas under load."""
    target_ongoing_requests: Annotated[float, Field(gt=0.0)] = 8.0
    """Requests in work per replica that autoscaling aims at."""
    max_ongoing_requests: Annotated[int, Field(ge=1, le=100_000)] = 64
    """Requests in work per replica at most; further ones wait in the queue."""
    max_queued_requests: Annotated[int, Field(ge=1, le=1_000_000)] = 512
    """Requests that wait per proxy at most; further ones are refused with 503 and Retry-After."""
    max_batch: Annotated[int, Field(ge=1, le=65_536)] = 32
    """Rows joined to one call of the model, and items in one /predict/batch request."""
    batch_wait_s: Annotated[float, Field(ge=0.0, le=10.0)] = 0.002
    """Seconds a row waits at most for others to join its call of the model; alone it does not wait."""
    request_timeout_s: Annotated[float, Field(gt=0.0, le=3600.0)] = 30.0
    """Seconds after which a request is answered with 408."""
    max_body_bytes: Annotated[int, Field(ge=1024, le=2**30)] = 1_048_576
    """Longest request body."""
    cpus_per_replica: Annotated[float, Field(gt=0.0, le=4096.0)] = 1.0
    """CPUs that Ray reserves for each replica; whole ones are its torch threads."""

    @model_validator(mode="after")
    def _bounds_fit(self) -> Self:
        if self.min_replicas > self.max_replicas:
            raise ValueError(f"min_replicas {self.min_replicas} is above max_replicas {self.max_replicas}")
        return self


class Settings(Node):
    """A run from data to endpoint: the root of the tree."""

    run: Name = "digits"
    """Name of the run; the same name resumes it."""
    task: TaskSettings = TaskSettings()
    """What is learnt."""
    data: DataSettings = DataSettings()
    """Where the rows come from."""
    training: TrainingSettings = TrainingSettings()
    """How the model is trained."""
    tuning: TuningSettings | None = None
    """The search of `lepton-ray tune`, which trains several times; `lepton-ray train` trains once, without it."""
    publish: PublishSettings = PublishSettings()
    """What becomes of the trained model."""
    serving: ServingSettings = ServingSettings()
    """How an endpoint answers."""
