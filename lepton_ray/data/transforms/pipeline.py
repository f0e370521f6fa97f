"""Steps that were fitted to training rows: what training, evaluation and a replica all apply."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from pydantic import ValidationError

from lepton_ray.data.cleaning.passes import Here, Passes
from lepton_ray.data.cleaning.steps import Fitting, Pieces
from lepton_ray.data.transforms import category_steps, media_steps, number_steps, text_steps
from lepton_ray.data.transforms.pieces import InMemory, TrainingPieces
from lepton_ray.data.transforms.step import Transform, as_float64, family
from lepton_ray.errors import IntegrityError, UsageError, shown
from lepton_ray.settings.node import Node
from lepton_ray.settings.transforms import Transforms, parse_transforms

SCHEMA_VERSION = 1
"""Of the JSON form; a reader refuses one that it does not know."""
STEPS: Mapping[str, type[Transform[Any]]] = {
    "impute": number_steps.Impute,
    "standardise": number_steps.Standardise,
    "min_max": number_steps.MinMax,
    "robust": number_steps.Robust,
    "one_hot": category_steps.OneHot,
    "ordinal": category_steps.Ordinal,
    "hashing": category_steps.Hashing,
    "tokenise": text_steps.Tokenise,
    "image": media_steps.Image,
    "log_mel": media_steps.LogMel,
}


class Pipeline:
    """Fitted steps.

    Args:
        told: the steps as the settings have them.
        learnt: what each has learnt.
        takes: the columns that rows must have, and what they hold (see `step.family`).
    """

    def __init__(self, told: Transforms, learnt: Sequence[Node], takes: Mapping[str, str]) -> None:
        self.told, self.learnt, self.takes = told, list(learnt), dict(takes)
        self._steps = made_steps(told)

    @classmethod
    def fit(cls, told: Transforms, rows: pa.Table | TrainingPieces, *, passes: Passes | None = None) -> Pipeline:
        """Learn from the training rows and no others.

        Steps that do not need each other's outcome share their looks at the rows: a table of any number of columns is
        read once for means, values and words, and once or twice more for quantiles.

        Args:
            told: the steps.
            rows: in memory, or pieces of a stored table.
            passes: where the pieces are looked at: in this process by default, or `OnRay()`; the outcome is the same.

        Raises UsageError naming the step and the column.
        """
        pieces = InMemory(rows) if isinstance(rows, pa.Table) else rows
        steps = made_steps(told)
        schemas = [pieces.schema]
        for step in steps:
            schemas.append(step.check(schemas[-1]))
        if pieces.count() == 0:
            raise UsageError("transforms: there are no training rows to learn from")
        learnt = _fitted(steps, pieces, passes or Here())
        made = {column for step in steps for column in _added(step)}
        takes = {
            name: family(pieces.schema.field(name).type)
            for name in sorted({column for step in steps for column in step.reads} - made)
        }
        return cls(told, [learnt[index] for index in range(len(steps))], takes)

    def apply(self, rows: pa.Table) -> pa.Table:
        """The rows after all steps; other columns stay as they are.

        Raises UsageError for rows that lack a column, or hold in one what cannot be taken.
        """
        self.check(rows.schema)
        rows = rows.combine_chunks()
        for step, learnt in zip(self._steps, self.learnt, strict=True):
            rows = step.apply(rows, learnt)
        return rows

    def check(self, schema: pa.Schema) -> None:
        """Raise UsageError where rows of this schema cannot be taken."""
        for name, kind in self.takes.items():
            if name not in schema.names:
                raise UsageError(
                    f"no column {shown(name)}: the transforms were fitted to {shown(', '.join(self.takes), 200)}"
                )
            found = schema.field(name).type
            if family(found) != kind and not pa.types.is_null(found):
                raise UsageError(f"column {shown(name)} holds {found}; the transforms were fitted to {kind}")

    def to_json(self) -> dict[str, Any]:
        """What `parse` takes; plain JSON, numbers exact."""
        return {
            "schema_version": SCHEMA_VERSION,
            "columns": self.takes,
            "steps": [
                {"step": step.model_dump(mode="json", exclude_unset=True), "learnt": learnt.model_dump(mode="json")}
                for step, learnt in zip(self.told.steps, self.learnt, strict=True)
            ],
        }

    @classmethod
    def parse(cls, value: Any, where: str = "transforms") -> Pipeline:
        """The pipeline in a JSON value that `to_json` gave.

        Raises UsageError for a newer form, IntegrityError for anything else that is not one.
        """
        if (
            isinstance(value, dict)
            and isinstance(number := value.get("schema_version"), int)
            and number > SCHEMA_VERSION
        ):
            raise UsageError(
                f"{where}: schema_version is {number}; this version of lepton-ray reads up to {SCHEMA_VERSION}: "
                "install a newer one"
            )
        try:
            return cls(*_parsed(value, where))
        except (KeyError, TypeError, AttributeError, ValueError, ValidationError, UsageError) as error:
            raise IntegrityError(f"{where}: no fitted transforms ({shown(str(error), 200)})") from error


def _parsed(value: Any, where: str) -> tuple[Transforms, list[Node], dict[str, str]]:
    """What a pipeline is made of. Raises whatever a value of another form leads to."""
    if value["schema_version"] != SCHEMA_VERSION:
        raise ValueError(f"schema_version is {shown(value['schema_version'])}; expected {SCHEMA_VERSION}")
    told = parse_transforms([each["step"] for each in value["steps"]], where)
    learnt = []
    for step, each in zip(made_steps(told), value["steps"], strict=True):
        learnt.append(step.Learnt.model_validate_json(json.dumps(each["learnt"])))
        if not step.complete(learnt[-1]):
            raise ValueError(f"{step.where()}: what was learnt does not fit its columns")
    return told, learnt, {str(name): str(kind) for name, kind in value["columns"].items()}


def made_steps(told: Transforms) -> list[Transform[Any]]:
    """The steps that carry out what was told."""
    return [STEPS[each.rule](index, each.rule, each.settings) for index, each in enumerate(told.steps)]


def matrix(rows: pa.Table, columns: Sequence[str]) -> npt.NDArray[np.float32]:
    """Columns of numbers, of bool and of lists of one length side by side, `[rows, numbers]`.

    Raises UsageError for a column that is neither, or lacks a value.
    """
    parts = []
    for name in columns:
        values = rows[name].combine_chunks()
        if pa.types.is_fixed_size_list(values.type):
            parts.append(values.flatten().to_numpy(zero_copy_only=False).reshape(rows.num_rows, -1).astype(np.float32))
            continue
        if family(values.type) not in ("number", "bool"):
            raise UsageError(f"column {shown(name)} holds {values.type}; expected numbers: give it a step of its own")
        if pa.types.is_boolean(values.type):
            values = values.cast(pa.int8())
        numbers = as_float64(values, name)
        if np.isnan(numbers).any():
            row = int(np.argmax(np.isnan(numbers)))
            raise UsageError(f"{shown(name)} of row {row} is missing; put an impute step there, or clean the table")
        parts.append(numbers.astype(np.float32)[:, None])
    return np.concatenate(parts, 1) if parts else np.empty((rows.num_rows, 0), np.float32)


def _added(step: Transform[Any]) -> list[str]:
    """The columns that a step makes beside those that it changes."""
    if isinstance(step, number_steps.Impute) and step.settings.indicator:
        return [f"{name}_missing" for name in step.columns]
    return [f"{name}_frames" for name in step.columns] if isinstance(step, media_steps.LogMel) else []


def _fitted(steps: Sequence[Transform[Any]], pieces: TrainingPieces, passes: Passes) -> dict[int, Node]:
    """What each step has learnt, by its place."""
    learnt: dict[int, Node] = {}
    while len(learnt) < len(steps):
        fittings: dict[int, Fitting] = {}
        for index in _ready(steps, learnt):
            fitting = steps[index].fitting()
            if fitting is None:
                learnt[index] = steps[index].learn(None)
            else:
                fittings[index] = fitting
        while waiting := {index: each for index, each in fittings.items() if not each.done}:
            answers: dict[int, list[Pieces]] = {index: [] for index in waiting}
            for said in passes.each(partial(_look, pieces, steps, dict(learnt), waiting), [b""] * pieces.count()):
                for index, found in answers.items():
                    mark = f"{index}/"
                    found.append(
                        {name.removeprefix(mark): each for name, each in said.items() if name.startswith(mark)}
                    )
            for index, each in waiting.items():
                each.narrow(answers[index])
        for index, each in fittings.items():
            learnt[index] = steps[index].learn(each.result())
    return learnt


def _ready(steps: Sequence[Transform[Any]], learnt: Mapping[int, Node]) -> list[int]:
    """The steps that see nothing of what a step before them, that has not learnt yet, will change."""
    found, changed = [], set[str]()
    for index, step in enumerate(steps):
        if index in learnt:
            continue
        if not changed & set(step.reads):
            found.append(index)
        changed |= {*step.columns, *_added(step)}
    return found


def _look(
    pieces: TrainingPieces,
    steps: Sequence[Transform[Any]],
    learnt: Mapping[int, Node],
    fittings: Mapping[int, Fitting],
    index: int,
    _: bytes,
) -> Pieces:
    """What one piece has to say to the steps that learn."""
    last = max(fittings)
    needed = _needed(steps, fittings, pieces.schema)
    rows = pieces.read(index, needed)
    said: Pieces = {}
    for at, step in enumerate(steps[: last + 1]):
        if at in fittings:
            said |= {f"{at}/{name}": table for name, table in fittings[at].look(rows).items()}
        elif at in learnt and set(step.reads) <= set(rows.column_names):
            rows = step.apply(rows, learnt[at])
    return said


def _needed(steps: Sequence[Transform[Any]], fittings: Mapping[int, Fitting], schema: pa.Schema) -> list[str]:
    """The columns of the table that must be read so that these steps see what they learn from."""
    needed: set[str] = set()
    for at in range(max(fittings), -1, -1):
        step = steps[at]
        makes = {*step.columns, *_added(step)}
        if at in fittings or needed & makes:
            needed = (needed - set(_added(step))) | set(step.reads) | set(step.optional)
    return [name for name in schema.names if name in needed]
