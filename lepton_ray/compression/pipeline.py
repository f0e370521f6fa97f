"""From a model version to a smaller one: load, step by step, pack, load again, compare, publish or refuse."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import lepton_ray
from lepton_ray.compression.candidate import Candidate
from lepton_ray.compression.comparison import Comparison, compare
from lepton_ray.compression.distillation import Learnt, distil
from lepton_ray.compression.pruning import prune_magnitude, prune_structured
from lepton_ray.compression.quantisation import quantise
from lepton_ray.compression.rows import ComparisonRows, check_learnable, comparison_rows
from lepton_ray.errors import RefusedError, UsageError
from lepton_ray.registry import LoadedVersion, ModelVersion, Registry
from lepton_ray.settings.compression import CastStep, CompressionSettings, DistilStep, PruneStep, QuantiseStep, told
from lepton_ray.storage import Store
from lepton_ray.tasks import Predictor
from lepton_ray.tasks.packed_weights import Packing

BUSY = 1.5
"""Load per CPU above which times are told to be doubtful."""


@dataclass(frozen=True)
class Compressed:
    """What compression came to, before anybody decides on it."""

    parent: ModelVersion
    steps: tuple[str, ...]
    notes: tuple[str, ...]
    """What the steps did beyond their settings, in sentences."""
    comparison: Comparison
    rows: ComparisonRows
    max_drop: float
    name: str
    """The model under which it would be published."""
    card: dict[str, Any]
    transforms: dict[str, Any]
    weights: bytes
    """safetensors, exactly as measured."""

    @property
    def refused(self) -> str | None:
        """Why it may not be published; None where it may."""
        found = self.comparison
        # a hair of slack: 0.95 - 0.94 is a little more than 0.01
        if found.drop <= self.max_drop + 1e-9:
            return None
        return (
            f"{self.parent.ref} compressed by {'; '.join(self.steps)}: {found.metric} over {found.rows} rows is "
            f"{found.compressed.metric:.4f}, was {found.original.metric:.4f}: {found.drop:.2f} points worse, "
            f"{self.max_drop:g} allowed; nothing is published: compress less, add a distil step, or raise --max-drop"
        )

    def publish(self, store: Store) -> ModelVersion:
        """Store the model version, linked to its parent; no alias moves. Raises RefusedError where it lost too much."""
        if self.refused:
            raise RefusedError(self.refused)
        return Registry(store).publish(self.name, weights=self.weights, card=self.card, transforms=self.transforms)


def compress(
    store: Store, ref: str, settings: CompressionSettings, *, watch: Callable[[Learnt], None] = lambda _: None
) -> Compressed:
    """Compress a model version and compare it with the original; nothing is written.

    What is compared is what would be published: the stored bytes, loaded as a replica loads them.

    Args:
        store: where the model and its rows are.
        ref: `MODEL`, `MODEL@ALIAS` or `MODEL:N`.
        settings: steps and limits.
        watch: called after each epoch of a distil step.

    Raises NotFoundError or IntegrityError for the version or table, UsageError for a step that the model cannot take.
    """
    registry = Registry(store)
    parent = registry.resolve(ref)
    loaded = registry.load(parent)
    _check_parent(parent, loaded)
    original = Predictor.load(loaded.card, loaded.transforms, loaded.weights)
    rows = comparison_rows(store, loaded.card, original.task, loaded.transforms, settings.table)
    if any(isinstance(step, DistilStep) for step in settings.steps):
        check_learnable(rows, original.task, loaded.transforms)
    candidate = Candidate.of(loaded.card, loaded.transforms, original.model)
    for step in settings.steps:
        _do(step, candidate, original, rows, settings.seed, watch)
    weights, card = _packed(candidate, parent, loaded, settings, rows)
    result = Predictor.load(card, loaded.transforms, weights)
    comparison = compare(
        (original, len(loaded.weights)),
        (result, len(weights)),
        rows.held_out,
        threads=settings.threads,
        seconds=settings.seconds,
        batch=settings.batch,
    )
    if comparison.compressed.size >= comparison.original.size:
        candidate.notes.append("the file is not smaller: add quantise or cast, or prune more than a thirty-second")
    if comparison.load > BUSY:
        candidate.notes.append(
            f"the machine was busy ({comparison.load:.1f} processes per CPU): measure the times again"
        )
    card["metrics"] = result.evaluate(rows.held_out)
    card["compression"]["comparison"] = comparison.to_dict()
    card["compression"]["notes"] = candidate.notes
    return Compressed(
        parent=parent,
        steps=tuple(told(step) for step in settings.steps),
        notes=tuple(candidate.notes),
        comparison=comparison,
        rows=rows,
        max_drop=settings.max_drop,
        name=settings.name or parent.model,
        card=card,
        transforms=loaded.transforms,
        weights=weights,
    )


def _check_parent(parent: ModelVersion, loaded: LoadedVersion) -> None:
    """Raise UsageError for a version whose weights are int8 already: steps work on floats."""
    compression = loaded.card.get("compression") or {}
    if (compression.get("weights") or {}).get("linear"):
        before = (loaded.card.get("lineage") or {}).get("parent")
        hint = f"compress its parent {before} with all steps at once" if before else "compress its original"
        raise UsageError(f"{parent.ref} is quantised already: {hint}")


def _do(
    step: PruneStep | QuantiseStep | CastStep | DistilStep,
    candidate: Candidate,
    original: Predictor,
    rows: ComparisonRows,
    seed: int,
    watch: Callable[[Learnt], None],
) -> None:
    """One step."""
    if isinstance(step, PruneStep):
        prune = prune_magnitude if step.method == "magnitude" else prune_structured
        prune(candidate, step.amount)
    elif isinstance(step, QuantiseStep):
        quantise(candidate, step.scheme)
    elif isinstance(step, CastStep):
        candidate.floats = step.to
    else:
        distil(candidate, original.model, rows.train, step, seed=seed, watch=watch)


def _packed(
    candidate: Candidate,
    parent: ModelVersion,
    loaded: LoadedVersion,
    settings: CompressionSettings,
    rows: ComparisonRows,
) -> tuple[bytes, dict[str, Any]]:
    """Weights and card as they would be published, but for what is measured yet."""
    try:
        weights, packing = candidate.packed()
    except OverflowError as error:
        raise UsageError(f"cast {candidate.floats}: {error}; take bf16") from error
    lineage = loaded.card.get("lineage") or {}
    card = {
        "task": {"name": candidate.task.name, "options": candidate.options},
        "lineage": {
            # where its table, run and checkpoint are from stays true of the smaller model
            **lineage,
            "parent": parent.ref,
            "parent_digest": parent.digest,
            "steps": [told(step) for step in settings.steps],
            "code_version": lepton_ray.__version__,
        },
        "framework": loaded.card.get("framework"),
        "compression": {
            "steps": [json.loads(step.model_dump_json()) for step in settings.steps],
            "seed": settings.seed,
            "max_drop": settings.max_drop,
            "table": rows.table,
            "table_fingerprint": rows.fingerprint,
            "split": rows.split,
            # none where the tensors lie as the model has them
            **({} if packing == Packing() else {"weights": packing.model_dump()}),
        },
    }
    return weights, card
