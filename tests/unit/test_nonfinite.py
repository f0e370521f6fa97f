"""Steps whose loss or gradients are not finite: skipped by all, and gone back from."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import torch

from lepton_ray.settings import OptimizerSettings
from lepton_ray.training.nonfinite import NonFinite, poisoned
from lepton_ray.training.optimisation import clip

sys.path.insert(0, str(Path(__file__).parent.parent))
from ranks import run_ranks


def test_single_steps_are_skipped_and_several_in_a_row_go_back() -> None:
    watch = NonFinite(3)
    finite = [True, False, False, True, False, False, False]
    assert [watch.seen(step, good) for step, good in enumerate(finite)] == [
        "ok", "skip", "skip", "ok", "skip", "skip", "roll_back",
    ]  # fmt: skip
    assert watch.left_out == {4, 5, 6}
    assert watch.roll_backs == 1


def test_counting_starts_anew_after_going_back() -> None:
    """The run comes again by steps 4 to 6, leaves them out, and meets two more: those are skips."""
    watch = NonFinite(3)
    for step in (4, 5, 6):
        watch.seen(step, False)
    assert [watch.seen(step, False) for step in (7, 8)] == ["skip", "skip"]
    assert watch.seen(9, False) == "roll_back"
    assert watch.left_out == {4, 5, 6, 7, 8, 9}
    assert watch.roll_backs == 2


def test_a_limit_of_one_goes_back_at_once() -> None:
    assert NonFinite(1).seen(0, False) == "roll_back"


def test_a_new_process_goes_on_counting_and_keeps_what_is_left_out() -> None:
    watch = NonFinite(3)
    for step in (1, 2, 3, 7, 8):
        watch.seen(step, False)
    other = NonFinite(3)
    other.left_out = {99}
    other.restore(json.loads(json.dumps(watch.to_json())))
    assert other.left_out == {1, 2, 3, 99}
    assert other.seen(9, False) == "roll_back"
    assert other.left_out == {1, 2, 3, 7, 8, 9, 99}


def test_going_back_to_the_middle_of_a_row_does_not_count_it_again() -> None:
    """The checkpoint was written after two steps of the row that then sent the run back to it."""
    watch = NonFinite(3)
    for step in (98, 99):
        watch.seen(step, False)
    checkpoint = json.loads(json.dumps(watch.to_json()))
    assert watch.seen(100, False) == "roll_back"
    watch.restore(checkpoint)
    assert watch.left_out == {98, 99, 100}
    assert watch.seen(101, False) == "skip"


def test_an_infinite_loss_gives_gradients_that_are_not_finite() -> None:
    """Also where its own gradients would be finite."""
    weight = torch.tensor([1.0, 2.0], requires_grad=True)
    (weight.sum() + math.inf).backward()
    assert weight.grad is not None
    assert torch.isfinite(weight.grad).all()
    weight.grad = None
    poisoned(weight.sum() + math.inf).backward()
    assert torch.isnan(weight.grad).all()


def test_a_finite_loss_is_left_as_it_is() -> None:
    weight = torch.tensor([1.0, 2.0], requires_grad=True)
    loss = weight.square().sum()
    assert poisoned(loss).item() == loss.item()
    poisoned(loss).backward()
    assert weight.grad is not None
    assert weight.grad.tolist() == [2.0, 4.0]


def norms() -> list[float]:
    """The norms that one rank sees when the loss of rank 1 is infinite in the second of three steps."""
    model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(3, 1))
    seen = []
    for step in range(3):
        loss = model(torch.ones(2, 3)).mean()
        bad = step == 1 and torch.distributed.get_rank() == 1
        poisoned(loss + (math.inf if bad else 0.0)).backward()
        seen.append(float(clip(model.parameters(), OptimizerSettings())))
        model.zero_grad()
    return seen


def test_all_ranks_learn_of_one_ranks_loss_from_the_gradients() -> None:
    for seen in run_ranks(norms, 2):
        assert [math.isfinite(norm) for norm in seen] == [True, False, True]
