"""The one way a trained model is applied: offline evaluation and a replica run the same code on the same transforms."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa
import torch
from pydantic import BaseModel
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors

from lepton_ray.errors import IntegrityError, UsageError, shown
from lepton_ray.tasks.measuring import EVALUATION_BATCH, Evaluation, Measures, joined
from lepton_ray.tasks.task import AnyTask, find_task


def load_weights(model: torch.nn.Module, weights: bytes) -> None:
    """Fill a model from safetensors bytes.

    Raises IntegrityError where names, shapes or types are not exactly those of the model.
    """
    try:
        tensors = load_tensors(weights)
    except (SafetensorError, ValueError) as error:
        raise IntegrityError(f"weights: not safetensors ({shown(error)}); publish the model again") from error
    wanted = {name: (tuple(value.shape), value.dtype) for name, value in model.state_dict().items()}
    found = {name: (tuple(value.shape), value.dtype) for name, value in tensors.items()}
    wrong = sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name))
    if wrong:
        name = wrong[0]
        raise IntegrityError(
            f"weights: tensor {shown(name)} is {found.get(name, 'missing')}, the model has {wanted.get(name, 'none')} "
            f"({len(wrong)} differ); use the options that the model was trained with"
        )
    model.load_state_dict(tensors)


class Predictor:
    """A task, its fitted transforms and a trained model on one device, in evaluation mode."""

    def __init__(
        self, task: AnyTask, transforms: Mapping[str, Any], model: torch.nn.Module, device: str = "cpu"
    ) -> None:
        self.task = task
        self.transforms = transforms
        self.device = torch.device(device)
        self.model = model.to(self.device).eval()

    @classmethod
    def load(
        cls, card: Mapping[str, Any], transforms: Mapping[str, Any], weights: bytes, device: str = "cpu"
    ) -> Predictor:
        """From what a model version holds: its card (`model.json`), its transforms and its safetensors bytes."""
        task = find_task(card["task"]["name"], card["task"]["options"])
        model = task.build(transforms)
        packing = (card.get("compression") or {}).get("weights")
        if packing is None:
            load_weights(model, weights)
        else:  # imported here: most versions are not compressed
            from lepton_ray.tasks.packed_weights import load_packed

            load_packed(model, weights, packing)
        return cls(task, transforms, model, device)

    @torch.inference_mode()
    def outputs(self, rows: pa.Table, batch: int = 256) -> torch.Tensor:
        """The model's outputs for rows, on the CPU, computed `batch` rows at a time."""
        inputs = self.task.inputs(rows, self.transforms)
        parts = [self.model(inputs[at : at + batch].to(self.device)).cpu() for at in range(0, len(inputs), batch)]
        return torch.cat(parts) if parts else torch.empty(0)

    def predict(self, requests: Sequence[BaseModel], batch: int = 256) -> list[BaseModel]:
        """Answers to requests, in their order. Raises UsageError for a request that does not fit the model."""
        return self.answer_rows(self.task.rows_of(requests, self.transforms), batch)

    def answer_rows(self, rows: pa.Table, batch: int = 256) -> list[BaseModel]:
        """Answers for table rows, in their order."""
        return self.task.answers(self.outputs(rows, batch), self.transforms) if rows.num_rows else []

    def evaluate(self, rows: pa.Table, batch: int = EVALUATION_BATCH) -> dict[str, float]:
        """The task's metrics over labelled rows, each row counted once; see `measure`."""
        return self.measure(rows, batch).metrics

    @torch.inference_mode()
    def measure(self, rows: pa.Table, batch: int = EVALUATION_BATCH) -> Evaluation:
        """Metrics and tables over labelled rows: the figures that training gives for the same rows and weights."""
        measures = Measures(self.task, self.transforms, self.device)
        for number, at in enumerate(range(0, rows.num_rows, batch)):
            part = rows.slice(at, batch)
            targets = self.task.targets(part, self.transforms).to(self.device)
            inputs = self.task.inputs(part, self.transforms).to(self.device)
            measures.update(number, self.model(inputs), targets)
        if not rows.num_rows:
            raise UsageError(f"evaluation of task {self.task.name}: there are no rows; give labelled rows")
        return joined(self.task, self.transforms, [measures.state()])
