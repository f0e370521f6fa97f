"""`lepton-ray train`: a run from a config to a published model version."""

from __future__ import annotations

import json
import math
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import click
from rich.console import Console

from lepton_ray.cli.output import emit, json_option, store_option, table

if TYPE_CHECKING:
    from lepton_ray.settings import Settings
    from lepton_ray.training.progress import Progress


@click.command()
@click.argument("config", required=False, type=click.Path(path_type=Path))
@click.argument("overrides", nargs=-1, metavar="[KEY.PATH=VALUE]...")
@click.option("--run", metavar="RUN", help="Go on with this run of the store, with the settings it was started with.")
@store_option
@json_option
def train(
    config: Path | None, overrides: tuple[str, ...], run: str | None, store_uri: str | None, as_json: bool
) -> None:
    """Train as CONFIG says, here or on the connected cluster (RAY_ADDRESS), and publish the model.

    The same run name resumes where an earlier attempt stopped; a finished run is not trained again.

    \b
    lepton-ray train jobs/configs/digits.yaml training.epochs=2 run=digits-2
    """  # noqa: D301 - click wants the character, not a backslash and a b
    if config is not None and "=" in str(config):  # no config: the defaults, and the first word is an override
        config, overrides = None, (str(config), *overrides)
    if run is not None and config is not None:
        raise click.UsageError("give CONFIG or --run, not both: a run of the store has its settings there")
    run_training(config, overrides, store_uri, run=run, as_json=as_json)


def run_training(
    config: Path | None, overrides: tuple[str, ...], store_uri: str | None, *, run: str | None, as_json: bool
) -> None:
    """Load the settings, train, publish, print; shared by the command and the job."""
    from lepton_ray.settings import load_settings

    if run is None:
        settings = load_settings(config, overrides)
    else:
        from lepton_ray.storage import open_store
        from lepton_ray.training.record import stored_settings

        settings = stored_settings(open_store(store_uri), run, overrides)
    started = time.monotonic()
    with ProgressShow(settings, quiet_stdout=as_json) as show:
        result = train_and_publish(settings, store_uri, show)
    result["seconds"] = round(time.monotonic() - started, 3)
    emit(result, as_json, lambda console: _words(console, result))


def train_and_publish(settings: Settings, store_uri: str | None, show: ProgressShow) -> dict[str, Any]:
    """The run itself; fills the table from `data.source` first where it does not exist."""
    from lepton_ray.data.tables import ingest, open_table
    from lepton_ray.errors import NotFoundError
    from lepton_ray.monitoring.report import write_report
    from lepton_ray.storage import open_store
    from lepton_ray.training.publication import publish
    from lepton_ray.training.trainer import Trainer

    store = open_store(store_uri)
    store.check_writable()
    trainer = Trainer(None, settings, store=store, on_progress=show.update)
    try:
        open_table(store, settings.data.table, settings.data.version)
    except NotFoundError as error:
        if settings.data.source is None:
            hint = f"lepton-ray data ingest SOURCE {settings.data.table}"
            raise NotFoundError(f"{error}; fill it first ({hint}) or set data.source") from error
        ingest(store, settings.data.table, settings.data.source, reading=settings.data.reading)
    result = trainer.fit()
    version = publish(result, settings, store)
    return {
        "run": result.run,
        "attempt": result.attempt,
        "resumed": result.resumed,
        "generations": result.generations,
        "table": result.table,
        "step": result.step,
        "metrics": result.metrics,
        "samples_exact": result.samples_exact,
        "model_version": version.ref if version else None,
        "model_digest": version.digest if version else None,
        "store": store.uri,
        "report": f"{store.uri}/{write_report(store, result.run)}",
    }


class ProgressShow:
    """A bar on a terminal; elsewhere one JSON line per logging interval (once a second at most) and evaluation."""

    def __init__(self, settings: Settings, *, quiet_stdout: bool) -> None:
        self._run, self._console = settings.run, Console(file=sys.stderr if quiet_stdout else sys.stdout)
        self._every = settings.training.logging.every_steps
        self._shown: Any = None
        self._bar: Any = None
        self._task: Any = None

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=28),
                MofNCompleteColumn(),
                TextColumn("{task.fields[figures]}"),
                TimeRemainingColumn(),
                console=self._console,
                transient=False,
            )
            self._bar.start()
            self._task = self._bar.add_task(f"train {self._run}", total=None, figures="starting workers")
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def update(self, progress: Progress) -> None:
        """Show the newest figures."""
        if self._bar is None:
            interval = (progress.generation, progress.step // self._every, progress.evaluation)
            if interval == self._shown and progress.step != progress.total_steps:
                return
            self._shown = interval
            line = {"event": "progress", "run": self._run, "rank": 0, **_named(progress.__dict__)}
            self._console.print(json.dumps(line), soft_wrap=True, markup=False, highlight=False)
            return
        figures = [f"epoch {progress.epoch}"]
        if progress.loss is not None:
            figures.append(f"loss {progress.loss:.4f}")
        for name, value in list(progress.evaluation.items())[:1]:  # the one that decides
            figures.append(f"{name} {value:.4f}")
        if progress.samples_per_second:
            figures.append(f"{progress.samples_per_second:,.0f} samples/s")
        self._bar.update(
            self._task, completed=progress.step, total=progress.total_steps or None, figures="  ".join(figures)
        )


def _named(figures: dict[str, Any]) -> dict[str, Any]:
    """The figures with those that JSON has no number for as text: a loss of `nan` is news."""
    return {
        name: _named(value) if isinstance(value, dict) else value if _has_number(value) else str(value)
        for name, value in figures.items()
    }


def _has_number(value: Any) -> bool:
    return not isinstance(value, float) or math.isfinite(value)


def _words(console: Console, result: dict[str, Any]) -> None:
    metrics = [(name, float(value)) for name, value in result["metrics"].items()]
    console.print(
        table(f"run {result['run']}: {result['step']} steps on {result['table']}", ["metric", "value"], metrics)
    )
    if result["model_version"]:
        console.print(f"model version {result['model_version']} (sha256 {result['model_digest'][:12]})")
    console.print(f"report {result['report']}")
    console.print(f"took {result['seconds']:.1f} s")
