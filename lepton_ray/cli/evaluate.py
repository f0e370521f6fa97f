"""`lepton-ray evaluate`: the metrics of any model version on any version of a table, printed and stored."""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console

from lepton_ray.cli.output import emit, json_option, store_option, table

if TYPE_CHECKING:
    import pyarrow as pa

    from lepton_ray.data.tables import Table
    from lepton_ray.registry import ModelVersion
    from lepton_ray.settings.tree import SplitSettings
    from lepton_ray.storage import Store
    from lepton_ray.tasks import AnyTask

HELD_OUT, TRAIN, TEST, ALL = "held_out", "train", "test", "all"
MOST_CLASSES_SHOWN = 20
"""Classes up to which the confusion matrix is printed; `--json` has it in any case."""


@click.command()
@click.argument("ref", metavar="MODEL[@ALIAS|:N]")
@click.argument("table_ref", metavar="TABLE[@VERSION]")
@click.option(
    "--split",
    type=click.Choice([HELD_OUT, TRAIN, TEST, ALL]),
    help="Which rows. [default: held_out of the table that the model was trained on, all of another]",
)
@json_option
@store_option
def evaluate(ref: str, table_ref: str, split: str | None, as_json: bool, store_uri: str | None) -> None:
    """Evaluate a model version on a table version; print the metrics and store them beside the model.

    held_out, train and test are the sides as the model's own run split them, also for a newer version of its table.

    \b
    lepton-ray evaluate digits@champion digits
    lepton-ray evaluate digits:3 digits@5 --split all --json
    """  # noqa: D301 - click wants the character, not a backslash and a b
    from lepton_ray.storage import open_store

    store = open_store(store_uri)
    store.check_writable()
    started = time.monotonic()
    result = evaluate_version(store, ref, table_ref, split)
    result["seconds"] = round(time.monotonic() - started, 3)
    emit(result, as_json, lambda console: _words(console, result))


def evaluate_version(store: Store, ref: str, table_ref: str, split: str | None) -> dict[str, Any]:
    """Evaluate and store; what is printed."""
    from lepton_ray.data.tables import open_table
    from lepton_ray.registry import Registry
    from lepton_ray.registry.evaluations import store_evaluation, trained_split
    from lepton_ray.tasks import Predictor, find_task

    registry = Registry(store)
    version = registry.resolve(ref)
    opened = open_table(store, table_ref)
    task = find_task(version.card["task"]["name"], version.card["task"]["options"])
    task.check_columns(opened.schema)
    settings = trained_split(store, version.card)
    split = split or (HELD_OUT if settings and _lineage(version).get("table") == opened.name else ALL)
    rows = _side(opened, task, settings, split, version)
    loaded = registry.load(version)
    task.check_rows(rows, loaded.transforms)
    found = Predictor.load(loaded.card, loaded.transforms, loaded.weights).measure(rows)
    evaluation = {
        "table": opened.ref,
        "table_fingerprint": opened.fingerprint(),
        "split": split,
        "split_settings": settings.model_dump(mode="json") if settings and split != ALL else None,
        "rows": found.rows,
        "rows_trained_on": _trained_on(store, version, task, settings, opened, rows),
        # JSON has no NaN
        "metrics": {name: value if math.isfinite(value) else None for name, value in found.metrics.items()},
        "tables": found.tables,
        "classes": loaded.transforms.get("labels"),  # of a task whose labels are words, in the order of the table
        "framework": _framework(),
    }
    key, new = store_evaluation(store, version, evaluation)
    stored = {"stored": f"{store.uri}/{key}", "new": new}
    return {"model": version.ref, "digest": version.digest, **evaluation, **stored}


def _side(opened: Table, task: AnyTask, settings: SplitSettings | None, split: str, version: ModelVersion) -> pa.Table:
    """The rows of one side of the split. Raises UsageError where it is not known how the model's rows were split."""
    from lepton_ray.data.split import split_rows
    from lepton_ray.errors import UsageError

    rows = opened.read()
    if split == ALL:
        return rows
    if settings is None:
        run = _lineage(version).get("run")
        told = f"the settings of its run {run} are gone" if run else "its lineage names no run"
        raise UsageError(f"--split {split}: how {version.ref} was split is not known, {told}; use --split all")
    sides = split_rows(rows, settings, label=task.label)
    if split == TEST and not len(sides.test):
        raise UsageError(f"--split test: the run of {version.ref} kept no test rows (data.split.test); use held_out")
    return rows.take({HELD_OUT: sides.held_out, TRAIN: sides.train, TEST: sides.test}[split])


def _trained_on(
    store: Store, version: ModelVersion, task: AnyTask, settings: SplitSettings | None, opened: Table, rows: pa.Table
) -> int | None:
    """How many of the rows the model has learnt from, by their keys; None where that cannot be told.

    A row keeps its side only where the hash of its key decides; after another split the table may have moved it.
    """
    import pyarrow.compute as pc

    from lepton_ray.data.split import split_rows
    from lepton_ray.data.tables import open_table
    from lepton_ray.errors import LeptonError

    lineage = _lineage(version)
    if settings is None or lineage.get("table") != opened.name or "key" not in rows.column_names:
        return None
    try:
        before = open_table(store, opened.name, lineage.get("table_version"))
        decides = {"stratified": task.label, "hash": "key"}.get(settings.by, settings.column)
        past = before.read(list(dict.fromkeys(["key", decides])))
        learnt = past["key"].take(split_rows(past, settings, label=task.label).train)
    except LeptonError:  # that version was vacuumed, or cannot be read
        return None
    return int(pc.sum(pc.is_in(rows["key"], value_set=learnt.combine_chunks())).as_py() or 0)


def _lineage(version: ModelVersion) -> dict[str, Any]:
    found: dict[str, Any] = version.card.get("lineage") or {}
    return found


def _framework() -> dict[str, str]:
    """What the last bits of a figure may depend on."""
    import importlib.metadata

    import lepton_ray

    names = ("torch", "torchmetrics")
    return {"lepton-ray": lepton_ray.__version__, **{name: importlib.metadata.version(name) for name in names}}


def _words(console: Console, result: dict[str, Any]) -> None:
    title = f"{result['model']} on {result['table']}, {result['split'].replace('_', '-')} rows: {result['rows']:,}"
    metrics = [(name, "not finite" if value is None else value) for name, value in result["metrics"].items()]
    console.print(table(title, ["metric", "value"], [(name, _shown(value)) for name, value in metrics]))
    matrix = result["tables"].get("confusion_matrix")
    if matrix and len(matrix) <= MOST_CLASSES_SHOWN:
        names = [str(name) for name in result["classes"] or range(len(matrix))]
        rows = [(name, *(count or "." for count in row)) for name, row in zip(names, matrix, strict=True)]
        console.print(table("rows by true class (down) and predicted class", ["", *names], rows))
    learnt = result["rows_trained_on"]
    if learnt:
        console.print(f"note: the model was trained on {learnt:,} of these rows; on new rows it will do worse")
    elif learnt is None and result["split"] != HELD_OUT:
        console.print("note: whether the model was trained on some of these rows is not known")
    console.print(f"{'stored' if result['new'] else 'stored before'}: {result['stored']}")


def _shown(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, float) else str(value)
