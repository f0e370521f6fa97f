"""Which rows a model is compared on, and which it may learn from: the split of the run that trained it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
from pydantic import ValidationError

from lepton_ray.data.split import split_rows
from lepton_ray.data.tables import open_table
from lepton_ray.errors import IntegrityError, LeptonError, NotFoundError, UsageError
from lepton_ray.settings.loading import describe_errors, parse_yaml
from lepton_ray.settings.tree import SplitSettings
from lepton_ray.storage import Store
from lepton_ray.tasks import AnyTask


@dataclass(frozen=True)
class ComparisonRows:
    """The rows, split."""

    table: str
    """`name@version`."""
    fingerprint: str
    train: pa.Table
    held_out: pa.Table
    split: str
    """Where the split is from, in words."""


def comparison_rows(
    store: Store, card: Mapping[str, Any], task: AnyTask, transforms: Mapping[str, Any], table: str | None
) -> ComparisonRows:
    """Rows of a table (that of the model's lineage where None), split as the run of its lineage split them.

    A table split anew by another rule would hold out rows that the model was trained on; the rule is in the run's
    `spec.yaml`. A model without a run is taken to be split by the defaults.

    Raises UsageError where there is no table to take or it does not fit the task, NotFoundError where it is gone.
    """
    lineage = card.get("lineage") or {}
    if table is None:
        if lineage.get("table") is None or lineage.get("table_version") is None:
            raise UsageError("table: the model's lineage names none; give --table TABLE[@VERSION]")
        table = f"{lineage['table']}@{lineage['table_version']}"
    opened = open_table(store, table)
    task.check_columns(opened.schema)
    rows = opened.read()
    settings, source = _split_settings(store, lineage.get("run"))
    split = split_rows(rows, settings, label=task.label)
    train, held_out = rows.take(split.train), rows.take(split.held_out)
    task.check_rows(held_out, transforms)
    return ComparisonRows(opened.ref, opened.fingerprint(), train, held_out, source)


def _split_settings(store: Store, run: str | None) -> tuple[SplitSettings, str]:
    """How the run split its table, and where that was found."""
    if run is None:
        return SplitSettings(), "the defaults (the model's lineage names no run)"
    key = f"runs/{run}/spec.yaml"
    try:
        tree = parse_yaml(store.get(key).decode(), key)
        told = (tree.get("data") or {}).get("split") or {}
        return SplitSettings.model_validate(told), f"run {run}"
    except NotFoundError:
        return SplitSettings(), f"the defaults (run {run} is not in the store any more)"
    except ValidationError as error:
        raise IntegrityError(f"{key}: data.split: {describe_errors(error, SplitSettings)}") from error
    except (AttributeError, UnicodeDecodeError, UsageError) as error:
        raise IntegrityError(f"{key}: damaged; restore it, or compress a version of another run") from error


def check_learnable(rows: ComparisonRows, task: AnyTask, transforms: Mapping[str, Any]) -> None:
    """Raise LeptonError's UsageError where the training rows do not fit the model; before a distil step."""
    try:
        task.check_rows(rows.train, transforms)
    except LeptonError as error:
        raise UsageError(f"distil: training rows of {rows.table} do not fit the model: {error}") from error
