"""Distillation: the student learns from the teacher, pruned weights stay zero, and it is the same every time."""

from __future__ import annotations

import copy

import pytest
import torch
from digits_slice import digits_slice
from torch import nn
from torch.nn import functional

from lepton_ray.compression.candidate import Candidate
from lepton_ray.compression.distillation import Learnt, _loss, distil
from lepton_ray.compression.pruning import prune_magnitude
from lepton_ray.errors import LeptonError, UsageError
from lepton_ray.settings.compression import DistilStep
from lepton_ray.tasks import find_task

ROWS = digits_slice(60)
OPTIONS = {"width": 2, "dropout": 0.0, "rotate": 5.0}
CARD = {"task": {"name": "image_classification", "options": OPTIONS}}


def candidate(seed: int = 0) -> Candidate:
    """The small CNN with random weights, fitted to the rows."""
    torch.manual_seed(seed)
    task = find_task("image_classification", OPTIONS)
    transforms = task.fit(ROWS)
    return Candidate.of(CARD, transforms, task.build(transforms))


def test_the_student_comes_closer_to_its_teacher() -> None:
    """A smaller student of other options; the loss told after each epoch falls."""
    made, seen = candidate(), list[Learnt]()
    teacher = copy.deepcopy(made.model)
    step = DistilStep(options={"width": 1}, epochs=8, batch=10, soft=1.0, learning_rate=0.02)
    distil(made, teacher, ROWS, step, seed=1, watch=seen.append)
    assert [found.epoch for found in seen] == list(range(1, 9))
    assert seen[-1].loss < 0.7 * seen[0].loss
    assert made.options == {**OPTIONS, "width": 1}
    assert sum(p.numel() for p in made.model.parameters()) < sum(p.numel() for p in teacher.parameters())
    assert not made.model.training


def test_the_same_seed_gives_the_same_student() -> None:
    """And torch's own random state is as before."""
    step = DistilStep(epochs=2, batch=16, options={"width": 1})
    states = []
    for seed in (5, 5, 6):
        made = candidate()
        torch.manual_seed(100 + len(states))
        before = torch.random.get_rng_state()
        distil(made, copy.deepcopy(made.model), ROWS, step, seed=seed)
        assert torch.equal(before, torch.random.get_rng_state())
        states.append(torch.cat([value.flatten() for value in made.model.parameters()]))
    assert torch.equal(states[0], states[1])
    assert not torch.equal(states[0], states[2])


def test_pruned_weights_stay_zero() -> None:
    """The others learn."""
    made = candidate()
    teacher = copy.deepcopy(made.model)
    prune_magnitude(made, 0.5)
    before = {name: value.detach().clone() for name, value in made.model.named_parameters()}
    distil(made, teacher, ROWS, DistilStep(epochs=1, batch=16), seed=0)
    for name, value in made.model.named_parameters():
        mask = made.masks.get(name)
        if mask is not None:
            assert (value[~mask] == 0).all()
            assert not torch.equal(value[mask], before[name][mask])


def test_the_loss_is_that_of_the_paper() -> None:
    """T squared times the divergence of the softened answers, plus the rest on the labels; computed by hand."""
    made = candidate()
    student, teacher = torch.randn(4, 10), torch.randn(4, 10)
    labels = torch.tensor([1, 2, 3, 4])
    step = DistilStep(temperature=3.0, soft=0.25)
    p, q = torch.softmax(teacher / 3, 1), torch.softmax(student / 3, 1)
    divergence = (p * (p.log() - q.log())).sum(1).mean()
    wanted = 0.25 * 9 * divergence + 0.75 * functional.cross_entropy(student, labels)
    assert torch.allclose(_loss(made.task, student, teacher, labels, step), wanted, atol=1e-6)


def test_what_cannot_learn_is_told() -> None:
    """Wrong options, outputs of another shape, and a loss that is not finite."""
    made = candidate()
    with pytest.raises(UsageError, match=r"task\.options\.height: unknown key"):
        distil(made, made.model, ROWS, DistilStep(options={"height": 3}), seed=0)
    with pytest.raises(UsageError, match=r"outputs are \[60, 10\], the teacher's \[60, 1, 28, 28\]"):
        distil(made, nn.Identity(), ROWS, DistilStep(epochs=1), seed=0)
    made = candidate()
    teacher = copy.deepcopy(made.model)
    with torch.no_grad():
        next(teacher.parameters()).fill_(float("inf"))
    with pytest.raises(LeptonError, match="the loss is not finite in epoch 1"):
        distil(made, teacher, ROWS, DistilStep(epochs=2), seed=0)
