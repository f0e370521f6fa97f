"""Model and optimiser go to bytes and back bit for bit."""

from __future__ import annotations

import copy

import pytest
import torch

from lepton_ray.errors import IntegrityError
from lepton_ray.settings import OptimizerSettings
from lepton_ray.training.loop import step_seed
from lepton_ray.training.state import copy_state, make_optimizer, pack, unpack


def network() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.ReLU(), torch.nn.Linear(7, 2))


def steps(model: torch.nn.Module, optimizer: torch.optim.Optimizer, first: int, last: int) -> None:
    for step in range(first, last):
        torch.manual_seed(step)
        model(torch.randn(8, 5)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("name", ["sgd", "adam", "adamw"])
def test_a_restored_run_goes_on_bit_for_bit(name: str) -> None:
    """Five steps, a checkpoint, five more: as ten steps without one."""
    settings = OptimizerSettings(name=name)  # type: ignore[arg-type]
    whole = network()
    steps(whole, make_optimizer(whole, settings), 0, 10)
    first = network()
    optimizer = make_optimizer(first, settings)
    steps(first, optimizer, 0, 5)
    files = pack(*copy_state(first, optimizer), {"step": 5})
    steps(first, optimizer, 5, 7)  # what is done after the copy must not show in it
    second = network()
    restored = make_optimizer(second, settings)
    assert unpack(files, second, restored) == {"step": 5}
    steps(second, restored, 5, 10)
    for expected, found in zip(whole.parameters(), second.parameters(), strict=True):
        assert torch.equal(expected, found)


def test_biases_do_not_decay() -> None:
    groups = make_optimizer(network(), OptimizerSettings(weight_decay=0.3)).param_groups
    assert [(group["weight_decay"], [p.ndim for p in group["params"]]) for group in groups] == [
        (0.3, [2, 2]),
        (0.0, [1, 1]),
    ]


def test_a_checkpoint_of_another_model_is_refused() -> None:
    model = network()
    optimizer = make_optimizer(model, OptimizerSettings())
    steps(model, optimizer, 0, 1)
    files = pack(*copy_state(model, optimizer), {"step": 1})
    other = torch.nn.Linear(5, 7)
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(IntegrityError, match="differ"):
        unpack(files, other, make_optimizer(other, OptimizerSettings()))
    assert all(torch.equal(before[name], value) for name, value in other.state_dict().items())


def test_random_numbers_of_a_step_depend_on_seed_step_and_rank() -> None:
    seeds = {step_seed(seed, step, rank) for seed in (0, 1) for step in (0, 1, 2**30) for rank in (0, 1, 1000)}
    assert len(seeds) == 18
    assert step_seed(3, 4, 5) == step_seed(3, 4, 5)
