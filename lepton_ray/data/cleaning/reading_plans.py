"""From a plan to the steps that carry it out, checked against the table: all that does not fit is told at once."""

from __future__ import annotations

import hashlib
from typing import Any

import pyarrow as pa

from lepton_ray.data.cleaning import group_steps, learnt_steps, value_steps
from lepton_ray.data.cleaning.steps import Step
from lepton_ray.errors import UsageError
from lepton_ray.settings.cleaning import CleaningPlan

_KINDS: dict[str, Any] = {
    "normalise": value_steps.Normalise,
    "markers": value_steps.Markers,
    "type": value_steps.ColumnType,
    "range": value_steps.Range,
    "pattern": value_steps.Pattern,
    "allowed": value_steps.Allowed,
    "check": value_steps.Check,
    "readable": value_steps.Readable,
    "missing": learnt_steps.Missing,
    "outliers": learnt_steps.Outliers,
    "labels": learnt_steps.Labels,
    "duplicates": group_steps.Duplicates,
    "near_duplicates": group_steps.NearDuplicates,
}
MEANING = 1
"""Counted up when a plan comes to mean something else than before."""


def steps_of(plan: CleaningPlan, schema: pa.Schema, where: str) -> list[Step[Any]]:
    """The steps of a plan, in order.

    Raises UsageError with everything that does not fit a table of this schema, in one line.
    """
    made: list[Step[Any]] = []
    wrong = []
    for index, told in enumerate(plan.steps):
        kinds = [_KINDS[told.rule]]
        if told.labels is not None and told.labels.conflicts:
            kinds.append(group_steps.Conflicts)
        try:
            for kind in kinds:
                step = kind(index, told.rule, told.settings)
                schema = step.check(schema)
                made.append(step)
        except UsageError as error:
            wrong.append(f"steps.{index}.{told.rule}: {error}")
    if wrong:
        raise UsageError(f"plan for {where}: {'; '.join(wrong)}")
    return made


def schema_after(steps: list[Step[Any]], schema: pa.Schema) -> pa.Schema:
    """The schema of the cleaned table."""
    for step in steps:
        schema = step.check(schema)
    return schema


def digest_of(plan: CleaningPlan) -> str:
    """SHA-256 of what a plan says; the same for plans that say the same."""
    text = plan.model_dump_json(exclude_defaults=False)
    return hashlib.sha256(f"{MEANING}\n{text}".encode()).hexdigest()
