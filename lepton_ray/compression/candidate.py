"""The model between two steps: what it computes, which weights stay zero, and how it will be stored."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from lepton_ray.tasks import AnyTask, find_task
from lepton_ray.tasks.packed_weights import Packing, pack


@dataclass
class Candidate:
    """A model on its way to being smaller. Each step changes it in place."""

    task: AnyTask
    options: dict[str, Any]
    """Task options as in a card: what `find_task` made `task` of."""
    transforms: Mapping[str, Any]
    model: torch.nn.Module
    """Float weights until a quantise step, on the CPU, in evaluation mode."""
    masks: dict[str, torch.Tensor] = field(default_factory=dict)
    """For each pruned parameter which of its values live; a distil step keeps the others zero."""
    floats: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Type in which floating-point tensors will be stored."""
    notes: list[str] = field(default_factory=list)
    """What a step did that its settings do not say, in sentences."""

    @classmethod
    def of(cls, card: Mapping[str, Any], transforms: Mapping[str, Any], model: torch.nn.Module) -> Candidate:
        """A copy of a loaded model, ready to be changed."""
        options = dict(card["task"]["options"])
        task = find_task(card["task"]["name"], options)
        changed = copy.deepcopy(model).cpu().eval()
        packed = (card.get("compression") or {}).get("weights") or {}
        masks = {
            name: value.detach() != 0 for name, value in changed.named_parameters() if name in packed.get("sparse", ())
        }
        return cls(task, options, transforms, changed, masks)

    def with_options(self, options: Mapping[str, Any]) -> tuple[AnyTask, dict[str, Any], torch.nn.Module]:
        """Task, options and fresh model where `options` stand over the present ones; nothing here is changed.

        Raises UsageError for options that the task refuses.
        """
        merged = {**self.options, **options}
        task = find_task(self.task.name, merged)
        return task, merged, task.build(self.transforms).eval()

    def keep_zeros(self) -> None:
        """Set pruned weights to zero again."""
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                if name in self.masks:
                    parameter.mul_(self.masks[name])

    def packed(self) -> tuple[bytes, Packing]:
        """The weights as they will be stored. Raises OverflowError naming a tensor too large for `floats`."""
        return pack(self.model, floats=self.floats, sparse=bool(self.masks))
