"""What the driver tells the ranks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from lepton_ray.settings import Settings


@dataclass(frozen=True)
class RankPlan:
    """Plain values only, so that it travels to any node and loads without torch."""

    settings: Settings
    store_uri: str
    attempt: int
    transforms: Mapping[str, Any]
    table_fingerprint: str
    created_at: float = 0.0
    """When the run was started first, unix seconds; tells it from an earlier one of the same name."""
    initial: Any = None
    """What the driver found of `training.initial.weights` (`initialisation.Matched`)."""


@dataclass(frozen=True)
class TaskRows:
    """The rows of a task's run: tables for the driver, references to Ray's object store for the ranks."""

    train: Any
    held_out: Any


@dataclass(frozen=True)
class OwnFunction:
    """A training function of the user's own, called on every rank."""

    call: Callable[..., Any]


RankWork = TaskRows | OwnFunction
"""What the ranks work on."""
