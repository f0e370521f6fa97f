"""What tasks that give each row one of a fixed number of labels have in common: loss, scores, metrics, answers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel

if TYPE_CHECKING:
    import torch
    from torchmetrics import Metric


class LabelAnswer(BaseModel):
    """The most probable label, and the probability of every label in the order of `labels`."""

    label: int | str
    probability: float
    probabilities: list[float]
    labels: list[int] | list[str]


class Classifies:
    """For a task whose model gives a number for each class, `[rows, classes]`, and whose targets are `[rows]`."""

    def losses(self, outputs: torch.Tensor, targets: torch.Tensor, *, label_smoothing: float) -> torch.Tensor:
        """Cross-entropy of each row."""
        from torch.nn import functional

        return functional.cross_entropy(outputs, targets, reduction="none", label_smoothing=label_smoothing)

    def scores(self, outputs: torch.Tensor, targets: torch.Tensor) -> dict[str, torch.Tensor]:
        """Accuracy and cross-entropy of each row."""
        return {
            "accuracy": (outputs.argmax(1) == targets).double(),
            "loss": self.losses(outputs, targets, label_smoothing=0.0).double(),
        }

    def compared(self, outputs: torch.Tensor, targets: torch.Tensor, transforms: Mapping[str, Any]) -> tuple[Any, Any]:
        """Probabilities `[rows, classes]` and labels `[rows]`; in float64, which keeps close logits apart."""
        return outputs.double().softmax(1), targets


class ClassifiesByLabels(Classifies):
    """The same where the transforms name the labels, in the order of the classes: `transforms["labels"]`."""

    def metrics(self, transforms: Mapping[str, Any]) -> dict[str, Metric]:
        """F1, precision and recall; up to 100 classes ROC-AUC and the confusion matrix."""
        from lepton_ray.tasks.metrics import classification

        return classification(len(transforms["labels"]), None)

    def answers(self, outputs: torch.Tensor, transforms: Mapping[str, Any]) -> list[BaseModel]:
        """Softmax probabilities and the most probable label."""
        import torch

        labels = transforms["labels"]
        probabilities = torch.softmax(outputs.float(), 1)
        return [
            LabelAnswer(label=labels[place], probability=row[place], probabilities=row, labels=labels)
            for place, row in zip(probabilities.argmax(1).tolist(), probabilities.tolist(), strict=True)
        ]
