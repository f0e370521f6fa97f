"""Distillation: a student learns the answers of the original beside the labels (Hinton, Vinyals and Dean 2015)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import torch
from torch.nn import functional

from lepton_ray.compression.candidate import Candidate
from lepton_ray.data.order import mix64
from lepton_ray.errors import LeptonError, UsageError
from lepton_ray.settings.compression import DistilStep
from lepton_ray.tasks import AnyTask

WARMUP = 0.1
"""Share of the steps in which the learning rate rises."""
CLIP = 1.0
"""L2 norm to which gradients are scaled down."""


@dataclass(frozen=True)
class Learnt:
    """An epoch of distillation, for whoever watches."""

    epoch: int
    """Counted from 1."""
    epochs: int
    loss: float
    """Mean over the epoch."""


def distil(
    candidate: Candidate,
    teacher: torch.nn.Module,
    rows: pa.Table,
    step: DistilStep,
    *,
    seed: int,
    watch: Callable[[Learnt], None] = lambda _: None,
) -> None:
    """Train the candidate's model, or a smaller one with `step.options`, on the teacher's answers; in this process.

    The same seed, rows and thread count give the same student.

    Args:
        candidate: gets the student; weights pruned before stay zero.
        teacher: the original model, in evaluation mode.
        rows: the training rows.
        step: how.
        seed: of initial weights, order and augmentation.
        watch: called after each epoch.

    Raises UsageError where the options are wrong or outputs are no logits of classes, LeptonError where it diverges.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if step.options:
            candidate.task, candidate.options, candidate.model = candidate.with_options(step.options)
            candidate.masks.clear()
        _train(candidate, teacher, rows, step, seed, watch)
    candidate.model.eval().requires_grad_(requires_grad=False)


def _train(
    candidate: Candidate,
    teacher: torch.nn.Module,
    rows: pa.Table,
    step: DistilStep,
    seed: int,
    watch: Callable[[Learnt], None],
) -> None:
    task, student = candidate.task, candidate.model
    inputs, targets = task.inputs(rows, candidate.transforms), task.targets(rows, candidate.transforms)
    batches = math.ceil(len(inputs) / step.batch)
    student.train().requires_grad_(requires_grad=True)
    optimizer = torch.optim.AdamW(student.parameters(), lr=step.learning_rate)
    for epoch in range(step.epochs):
        order = torch.randperm(len(inputs))
        total = 0.0
        for number, chosen in enumerate(order.split(step.batch)):
            position = (epoch * batches + number + 1) / (step.epochs * batches)
            optimizer.param_groups[0]["lr"] = step.learning_rate * _rate(position)
            counters = chosen.numpy().astype(np.uint64) + np.uint64(epoch * len(inputs))
            seen = task.augment(inputs[chosen], mix64(counters ^ mix64(np.array([seed], np.uint64))))
            with torch.no_grad():
                taught = teacher(seen)
            loss = _loss(task, student(seen), taught, targets[chosen], step)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(student.parameters(), CLIP)
            optimizer.step()
            candidate.keep_zeros()
            total += float(loss.detach()) * len(chosen)
        if not math.isfinite(total):
            raise LeptonError(f"distil: the loss is not finite in epoch {epoch + 1}; lower learning_rate")
        watch(Learnt(epoch + 1, step.epochs, total / len(inputs)))


def _rate(position: float) -> float:
    """Factor on the peak learning rate at a position in 0..1."""
    if position < WARMUP:
        return position / WARMUP
    return 0.5 * (1 + math.cos(math.pi * (position - WARMUP) / (1 - WARMUP)))


def _loss(
    task: AnyTask, outputs: torch.Tensor, taught: torch.Tensor, targets: torch.Tensor, step: DistilStep
) -> torch.Tensor:
    """`soft` T^2 KL(teacher / T, student / T) + (1 - `soft`) of the task's loss, mean over the rows (section 2)."""
    if outputs.dim() != 2 or outputs.shape != taught.shape:
        raise UsageError(
            f"distil: outputs are {list(outputs.shape)}, the teacher's {list(taught.shape)}; expected logits "
            "[rows, classes] of both"
        )
    heat = step.temperature
    soft = functional.kl_div(
        functional.log_softmax(outputs / heat, 1),
        functional.log_softmax(taught / heat, 1),
        reduction="batchmean",
        log_target=True,
    )
    hard = task.losses(outputs, targets, label_smoothing=0.0).mean()
    return step.soft * heat**2 * soft + (1 - step.soft) * hard
