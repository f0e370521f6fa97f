"""The metrics that tasks choose from, by torchmetrics. Importing this takes a second: do it inside `Task.metrics`.

Each is what `tasks.measuring` needs: it never talks to other processes itself, and it does not look at its arguments'
values (that would wait for a GPU in every batch).
"""

from __future__ import annotations

import math
from typing import Any

import torch

from lepton_ray.tasks import quick_torchmetrics  # noqa: F401 - before torchmetrics itself, see there

# isort: split
from torchmetrics import Metric
from torchmetrics.classification import (
    MulticlassAccuracy,
    MulticlassAUROC,
    MulticlassConfusionMatrix,
    MulticlassF1Score,
    MulticlassPrecision,
    MulticlassRecall,
)
from torchmetrics.regression import MeanAbsoluteError, MeanSquaredError
from torchmetrics.text import CharErrorRate, WordErrorRate
from torchmetrics.utilities import dim_zero_cat

from lepton_ray.errors import UsageError

MOST_CLASSES = 100
"""Classes up to which a classifier's ROC-AUC and confusion matrix are made: the one keeps a number for each row and
class, the other is read by people."""


def accuracy(classes: int) -> Metric:
    """Share of rows whose most probable class is the true one."""
    return MulticlassAccuracy(num_classes=classes, average="micro", validate_args=False, sync_on_compute=False)


def top_k(classes: int, k: int) -> Metric:
    """Share of rows whose true class is among the `k` most probable ones."""
    return MulticlassAccuracy(num_classes=classes, average="micro", top_k=k, validate_args=False, sync_on_compute=False)


def precision(classes: int) -> Metric:
    """Of the rows given a class, the share that is of it; the mean over classes that occur (macro)."""
    return MulticlassPrecision(num_classes=classes, average="macro", validate_args=False, sync_on_compute=False)


def recall(classes: int) -> Metric:
    """Of the rows of a class, the share that was given it; the mean over classes that occur (macro)."""
    return MulticlassRecall(num_classes=classes, average="macro", validate_args=False, sync_on_compute=False)


def f1(classes: int) -> Metric:
    """Harmonic mean of precision and recall of a class; the mean over classes that occur (macro)."""
    return MulticlassF1Score(num_classes=classes, average="macro", validate_args=False, sync_on_compute=False)


def confusion_matrix(classes: int) -> Metric:
    """Rows by true class (down) and predicted class (across)."""
    return MulticlassConfusionMatrix(num_classes=classes, validate_args=False, sync_on_compute=False)


def roc_auc(classes: int) -> Metric:
    """Area under the ROC curve of each class against the others; the mean over classes for which it is defined.

    Wants probabilities. Exact: keeps the probabilities of all rows.
    """
    return _RocAuc(num_classes=classes, average="none", validate_args=False, sync_on_compute=False)


def classification(classes: int, top: int | None = None) -> dict[str, Metric]:
    """What is told of a classifier beside accuracy and loss, for probabilities `[rows, classes]` and labels `[rows]`.

    Args:
        classes: number of classes; above 100 without `roc_auc` and `confusion_matrix`.
        top: also `top_k`, the share of rows whose label is among this many most probable ones.
    """
    metrics = {"f1": f1(classes), "precision": precision(classes), "recall": recall(classes)}
    if top is not None:
        metrics["top_k"] = top_k(classes, top)
    if classes <= MOST_CLASSES:
        metrics |= {"roc_auc": roc_auc(classes), "confusion_matrix": confusion_matrix(classes)}
    return metrics


def regression() -> dict[str, Metric]:
    """What is told of predicted numbers, for two `[rows]`: root mean squared error and mean absolute error."""
    return {
        "rmse": MeanSquaredError(squared=False, sync_on_compute=False), "mae": MeanAbsoluteError(sync_on_compute=False)
    }  # fmt: skip


def word_error_rate() -> Metric:
    """Words to insert, delete or replace per word of the truth; for two lists of strings."""
    return WordErrorRate(sync_on_compute=False)


def character_error_rate() -> Metric:
    """Characters to insert, delete or replace per character of the truth; for two lists of strings."""
    return CharErrorRate(sync_on_compute=False)


def mean_average_precision() -> Metric:
    """COCO's mean average precision of boxes, as three figures: over IoU 0.50 to 0.95, at 0.50, and at 0.75.

    Wants, per image, `{"boxes": [n, 4] x1 y1 x2 y2, "scores": [n], "labels": [n]}` and `{"boxes", "labels"}`.
    Raises UsageError where the extra `detection` is not installed.
    """
    try:
        from torchmetrics.detection.mean_ap import MeanAveragePrecision

        inner = MeanAveragePrecision(backend="faster_coco_eval", sync_on_compute=False)
    except (ImportError, ValueError) as error:
        raise UsageError("mean_average_precision: needs pip install 'lepton-ray[detection]'") from error
    compute = inner.compute

    def named() -> dict[str, torch.Tensor]:
        found: dict[str, Any] = compute()
        names = {"map": "mean_average_precision", "map_50": "average_precision_50", "map_75": "average_precision_75"}
        # -1 is COCO's word for "no truth to find"
        return {name: torch.where(found[key] < 0, math.nan, found[key].double()) for key, name in names.items()}

    inner.compute = named  # type: ignore[method-assign]
    return inner


class _RocAuc(MulticlassAUROC):
    """Leaves classes without any row, or with all rows, out of the mean; torchmetrics counts them as 0."""

    def compute(self) -> torch.Tensor:  # type: ignore[override]
        of_class = super().compute()
        truth = dim_zero_cat(self.target)
        rows = torch.bincount(truth, minlength=len(of_class))
        return of_class[(rows > 0) & (rows < len(truth))].mean()
