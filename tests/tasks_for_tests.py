"""Tasks that tests train: image classification with faults that can be asked for."""

from __future__ import annotations

import torch

from lepton_ray.tasks import task as tasks
from lepton_ray.tasks.image_classification import ImageClassification


class Faulty(ImageClassification):
    """The loss of some rows is infinite: of those whose augmentation seed ends in BAD_SEEDS, whatever the weights."""

    name = "faulty"
    bad_calls: tuple[int, ...] = ()
    calls = 0

    def losses(self, outputs: torch.Tensor, targets: torch.Tensor, *, label_smoothing: float) -> torch.Tensor:
        each = super().losses(outputs, targets, label_smoothing=label_smoothing)
        call, Faulty.calls = Faulty.calls, Faulty.calls + 1
        return each * torch.inf if call in Faulty.bad_calls and torch.distributed.get_rank() == 1 else each


tasks.SHIPPED["faulty"] = "tasks_for_tests:Faulty"
