"""`lepton-ray tune`: a search for good settings, from a config to the best trial's published model."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import click
from rich.console import Console
from rich.markup import escape

from lepton_ray.cli.output import emit, json_option, store_option, table

if TYPE_CHECKING:
    from lepton_ray.data.tables import Table
    from lepton_ray.settings import Settings
    from lepton_ray.storage import Store
    from lepton_ray.training.progress import Progress
    from lepton_ray.tuning import Evaluation, Outcome, Trial


@click.command(epilog="Example: lepton-ray tune jobs/configs/digits-tune.yaml tuning.scheduler=none run=digits-search")
@click.argument("config", type=click.Path(path_type=Path))
@click.argument("overrides", nargs=-1, metavar="[KEY.PATH=VALUE]...")
@store_option
@json_option
def tune(config: Path, overrides: tuple[str, ...], store_uri: str | None, as_json: bool) -> None:
    """Train several times as CONFIG says, each time with other values of the settings in its section `tuning`.

    The best trial's model is published as `publish` says. Each trial is a run RUN-t000, RUN-t001, ... of its own. The
    same command again goes on where it stopped: trials that ended are kept, the others resume from their checkpoints.
    """
    from lepton_ray.settings import load_settings

    settings = load_settings(config, overrides)
    started = time.monotonic()
    with TuningShow(settings, quiet_stdout=as_json) as show:
        result = tune_and_publish(settings, store_uri, show.update)
    result["seconds"] = round(time.monotonic() - started, 3)
    emit(result, as_json, lambda console: _words(console, result))


def tune_and_publish(settings: Settings, store_uri: str | None, on_change: Callable[[Trial], None]) -> dict[str, Any]:
    """The search itself; fills the table from `data.source` first where it does not exist."""
    from lepton_ray.storage import open_store
    from lepton_ray.training.checks import check_run
    from lepton_ray.training.lease import RunLease
    from lepton_ray.training.trainer import Trainer
    from lepton_ray.tuning.journal import known_table_version
    from lepton_ray.tuning.space import check_space, tuning_of

    tuning = tuning_of(settings)
    store = open_store(store_uri)
    store.check_writable()
    task = Trainer(None, settings, store=store).task
    decides = task.direction(tuning.metric or task.decides[0])
    opened = _table(store, settings, known_table_version(store, settings.run))

    def check(trial: Settings) -> None:
        check_run(trial, Trainer(None, trial, store=store).task, opened.schema)

    check(settings)
    check_space(settings, check)  # before Ray Tune is imported, which takes seconds
    from lepton_ray.tuning import Tuning

    settings = with_checkpoints(settings, opened.num_rows)
    search = Tuning(
        settings, store, run_trial, decides=decides, table_version=opened.version, check=check, on_change=on_change
    )
    lease = RunLease.acquire(store, settings.run)
    try:
        found = search.run(lease.lost)
        from lepton_ray.training.publication import publish  # imports torch

        best = Trainer(None, found.best_settings, store=store).fit()  # has finished: this only reads its record
        version = publish(best, found.best_settings, store)
        search.journal.update(model_version=version.ref if version else None)
    finally:
        lease.release()
    return {
        "run": found.run,
        "resumed": found.resumed,
        "table": f"{opened.name}@{opened.version}",
        "metric": found.metric,
        "direction": found.direction,
        "trials": [_brief(trial) for trial in found.trials],
        "best": {**_brief(found.best), "metrics": best.metrics},
        "model_version": version.ref if version else None,
        "model_digest": version.digest if version else None,
        "store": store.uri,
    }


def run_trial(settings: Settings, store_uri: str, tell: Callable[[Evaluation], None]) -> Outcome:
    """One run of a trial, in the trial's own process: what the tuning room is handed."""
    from lepton_ray.storage import open_store
    from lepton_ray.training.trainer import Trainer
    from lepton_ray.tuning import Outcome

    trainer = Trainer(None, settings, store=open_store(store_uri), on_progress=EvaluationWatch(settings, tell))
    result = trainer.fit()
    metrics = dict(result.metrics)
    if settings.publish.weights == "best" and result.best and result.best["value"] is not None:
        metrics[trainer.task.decides[0]] = float(result.best["value"])
    epochs = settings.training.epochs
    done = round(result.step * epochs / max(1, int(result.record["total_steps"])))
    return Outcome(min(max(done, 1), epochs), metrics)


class EvaluationWatch:
    """Finds the evaluations in the progress of a run, and the epoch of each.

    The newest metrics come with a later step than theirs where the run has gone on meanwhile; evaluations that follow
    each other within a second are told as one.
    """

    def __init__(self, settings: Settings, tell: Callable[[Evaluation], None]) -> None:
        self._epochs, self._every = settings.training.epochs, settings.training.evaluate_every_epochs
        self._tell = tell
        self._metrics: dict[str, float] = {}
        self._newest: Evaluation | None = None

    def __call__(self, progress: Progress) -> None:
        """Tell the newest evaluation, also where it is the same as before: the one who is told may end the run."""
        from lepton_ray.tuning import Evaluation

        if progress.evaluation and progress.evaluation != self._metrics and progress.total_steps:
            epoch = int(progress.step * self._epochs / progress.total_steps)
            epoch -= epoch % self._every if epoch < self._epochs else 0
            if epoch > 0:
                self._metrics = dict(progress.evaluation)
                self._newest = Evaluation(epoch, self._metrics)
        if self._newest:
            self._tell(self._newest)


def with_checkpoints(settings: Settings, rows: int) -> Settings:
    """The settings; for population based training with two checkpoints or more between two looks at the population.

    Args:
        settings: of the search.
        rows: of the table; those held out by a column are not known yet and not taken off.
    """
    tuning, training = settings.tuning, settings.training
    if tuning is None or tuning.scheduler != "pbt":
        return settings
    share = 1.0 if settings.data.split.by == "column" else 1.0 - settings.data.split.held_out - settings.data.split.test
    steps = rows * share * tuning.pbt.interval_epochs / training.global_batch
    wanted = training.checkpoint.every_steps
    every = max(1, int(steps / 2) if wanted == "auto" else min(wanted, int(steps / 2)))
    checkpoint = training.checkpoint.model_copy(update={"every_steps": every})
    return settings.model_copy(update={"training": training.model_copy(update={"checkpoint": checkpoint})})


def _table(store: Store, settings: Settings, version: int | None) -> Table:
    """The version of the table that all trials learn from; the newest, or the one that the search began with."""
    from lepton_ray.data.tables import ingest, open_table
    from lepton_ray.errors import NotFoundError

    data = settings.data
    wanted = data.version if data.version is not None else version
    try:
        return open_table(store, data.table, wanted)
    except NotFoundError as error:
        if data.source is None or wanted is not None:
            hint = f"lepton-ray data ingest SOURCE {data.table}"
            raise NotFoundError(f"{error}; fill it first ({hint}) or set data.source") from error
        ingest(store, data.table, data.source, reading=data.reading)
        return open_table(store, data.table, None)


class TuningShow:
    """A bar per trial on a terminal, one JSON line per change of a trial elsewhere."""

    def __init__(self, settings: Settings, *, quiet_stdout: bool) -> None:
        self._run, self._epochs = settings.run, settings.training.epochs
        self._console = Console(file=sys.stderr if quiet_stdout else sys.stdout)
        self._bar: Any = None
        self._tasks: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=20),
                MofNCompleteColumn(),
                TextColumn("{task.fields[figures]}"),
                console=self._console,
            )
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def update(self, trial: Trial) -> None:
        """Show what changed."""
        if self._bar is None:
            line = {"event": "trial", "tuning": self._run, **_brief(trial)}
            self._console.print(json.dumps(line), soft_wrap=True, markup=False, highlight=False)
            return
        if trial.number not in self._tasks:
            self._tasks[trial.number] = self._bar.add_task(trial.name, total=self._epochs, figures="")
        figures = f"{trial.state}  {_number(trial.value)}  {escape(_params(trial.params))}"
        self._bar.update(self._tasks[trial.number], completed=trial.epoch, figures=figures)


def _brief(trial: Trial) -> dict[str, Any]:
    """A trial in one line of JSON."""
    return {
        "trial": trial.name,
        "run": trial.run,
        "state": trial.state,
        "epoch": trial.epoch,
        "value": trial.value,
        "params": dict(trial.params),
        "runs": len(trial.segments),
        "seconds": trial.seconds,
        "error": trial.error,
    }


def _words(console: Console, result: dict[str, Any]) -> None:
    sign = -1.0 if result["direction"] == "max" else 1.0
    trials = sorted(result["trials"], key=lambda each: (each["value"] is None, sign * (each["value"] or 0.0)))
    rows = [
        [
            each["trial"],
            each["state"],
            each["epoch"],
            _number(each["value"]),
            f"{each['seconds']:.0f} s",
            escape(each["error"] or _params(each["params"])),
        ]
        for each in trials
    ]
    made = table(
        f"tuning {result['run']} on {result['table']}",
        ["trial", "state", "epochs", result["metric"], "time", "settings"],
        rows,
    )
    if not console.is_terminal:
        console.width = 240  # a file or program takes whole lines
    console.print(made)
    best = result["best"]
    console.print(f"best {best['trial']}: run {best['run']}, {result['metric']} {_number(best['value'])}", markup=False)
    if result["model_version"]:
        console.print(f"model version {result['model_version']} (sha256 {result['model_digest'][:12]})", markup=False)
    console.print(f"took {result['seconds']:.1f} s")


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _params(params: Mapping[str, Any]) -> str:
    """Settings by the last part of their key, numbers cut to four digits."""
    return " ".join(
        f"{key.rpartition('.')[2]}={f'{value:.4g}' if isinstance(value, float) else value}"
        for key, value in params.items()
    )
