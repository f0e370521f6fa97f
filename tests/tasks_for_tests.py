"""Tasks that tests train: image classification with faults that can be asked for."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

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


class Doomed(ImageClassification):
    """A network with batch normalisation; the rank that the environment names is killed at one of its steps.

    `DOOMED` is `<rank>:<call of the loss, from 1>:<forward or backward>`. With `DOOMED_AWAITS=<file>` it is not killed
    before that file is there: a checkpoint is committed in the background.
    """

    name = "doomed"
    calls = 0

    def build(self, transforms: Any) -> torch.nn.Module:
        return torch.nn.Sequential(super().build(transforms), torch.nn.BatchNorm1d(10))

    def losses(self, outputs: torch.Tensor, targets: torch.Tensor, *, label_smoothing: float) -> torch.Tensor:
        each = super().losses(outputs, targets, label_smoothing=label_smoothing)
        rank, call, place = os.environ.get("DOOMED", "-1:0:").split(":")
        if torch.is_grad_enabled() and int(rank) == torch.distributed.get_rank():
            Doomed.calls += 1
            if Doomed.calls == int(call):
                awaited, deadline = os.environ.get("DOOMED_AWAITS"), time.monotonic() + 60
                while awaited and not Path(awaited).exists() and time.monotonic() < deadline:
                    time.sleep(0.01)
                if place == "forward":
                    os.kill(os.getpid(), signal.SIGKILL)
                each.register_hook(lambda _: os.kill(os.getpid(), signal.SIGKILL))
        return each


tasks.SHIPPED["doomed"] = "tasks_for_tests:Doomed"
tasks.SHIPPED["faulty"] = "tasks_for_tests:Faulty"
