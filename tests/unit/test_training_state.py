"""Model and optimiser go to bytes and back bit for bit."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load

from lepton_ray.errors import IntegrityError
from lepton_ray.settings import OptimizerSettings
from lepton_ray.settings.training import ParallelSettings
from lepton_ray.training.optimisation import WeightAverage, make_optimizer
from lepton_ray.training.parallel import Parallel, wrap
from lepton_ray.training.seeds import seed_torch, step_seed
from lepton_ray.training.state import copy_state, pack, unpack, whole_weights


@pytest.fixture(autouse=True, scope="module")
def one_rank() -> Iterator[None]:
    """A process group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def parallel_of(model: torch.nn.Module) -> Parallel:
    return wrap(model, ParallelSettings(), torch.device("cpu"))


def network() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.ReLU(), torch.nn.Linear(7, 2))


def steps(model: torch.nn.Module, optimizer: torch.optim.Optimizer, first: int, last: int) -> None:
    for step in range(first, last):
        torch.manual_seed(step)
        model(torch.randn(8, 5)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("name", ["sgd", "adam", "adamw", "adagrad", "rmsprop"])
def test_a_restored_run_goes_on_bit_for_bit(name: str) -> None:
    """Five steps, a checkpoint, five more: as ten steps without one."""
    settings = OptimizerSettings(name=name)  # type: ignore[arg-type]
    whole = network()
    steps(whole, make_optimizer(whole, settings), 0, 10)
    first = network()
    optimizer = make_optimizer(first, settings)
    steps(first, optimizer, 0, 5)
    files = pack(copy_state(parallel_of(first), optimizer), {"step": 5})
    steps(first, optimizer, 5, 7)  # what is done after the copy must not show in it
    second = network()
    restored = make_optimizer(second, settings)
    assert unpack(files, parallel_of(second), restored) == {"step": 5}
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
    files = pack(copy_state(parallel_of(model), optimizer), {"step": 1})
    other = torch.nn.Linear(5, 7)
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(IntegrityError, match="differ"):
        unpack(files, parallel_of(other), make_optimizer(other, OptimizerSettings()))
    assert all(torch.equal(before[name], value) for name, value in other.state_dict().items())


def test_random_numbers_of_a_step_depend_on_seed_step_and_rank() -> None:
    seeds = {step_seed(seed, step, rank) for seed in (0, 1) for step in (0, 1, 2**30) for rank in (0, 1, 1000)}
    assert len(seeds) == 18
    assert step_seed(3, 4, 5) == step_seed(3, 4, 5)


def test_seeding_torch_gives_what_its_own_way_gives() -> None:
    """Without the stack traces that it notes for devices which are not in use."""
    torch.manual_seed(2**62 + 1)
    expected = torch.rand(5)
    seed_torch(2**62 + 1, torch.device("cpu"))
    assert torch.equal(torch.rand(5), expected)


def test_memory_of_a_written_copy_is_used_again() -> None:
    """The second copy lies where the first did, and holds the newer values."""
    model = network()
    optimizer = make_optimizer(model, OptimizerSettings())
    parallel = parallel_of(model)
    steps(model, optimizer, 0, 1)
    first = copy_state(parallel, optimizer)
    places = {name: value.data_ptr() for name, value in first.tensors["model"].items()}
    steps(model, optimizer, 1, 2)
    second = copy_state(parallel, optimizer, into=first)
    assert {name: value.data_ptr() for name, value in second.tensors["model"].items()} == places
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in second.tensors["model"].items())


class Tied(torch.nn.Module):
    """The weight of the first layer is that of the last."""

    def __init__(self) -> None:
        super().__init__()
        self.first = torch.nn.Linear(4, 4)
        self.last = torch.nn.Linear(4, 4)
        self.last.weight = self.first.weight
        self.norm = torch.nn.BatchNorm1d(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.norm(self.first(x)))


def test_the_average_is_published_under_every_name_of_a_shared_weight() -> None:
    """A model with one weight under two names: both get the average, and both come back."""
    model = Tied()
    average = WeightAverage(model, 0.5)
    optimizer = make_optimizer(model, OptimizerSettings())
    parallel = parallel_of(model)
    model(torch.randn(8, 4)).square().sum().backward()
    optimizer.step()
    average.update()
    files = pack(copy_state(parallel, optimizer, average), {})
    published = load(whole_weights(files))
    assert published.keys() == model.state_dict().keys()
    assert torch.equal(published["last.weight"], published["first.weight"])
    assert torch.equal(published["last.weight"], average.state()["first.weight"])
    assert not torch.equal(published["last.weight"], model.last.weight)
    other = Tied()
    restored = WeightAverage(other, 0.5)
    unpack(files, parallel_of(other), make_optimizer(other, OptimizerSettings()), restored)
    assert all(torch.equal(value, average.state()[name]) for name, value in restored.state().items())
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in other.state_dict().items())


def test_a_value_that_is_not_finite_is_found_by_name() -> None:
    model = network()
    optimizer = make_optimizer(model, OptimizerSettings())
    steps(model, optimizer, 0, 1)
    copied = copy_state(parallel_of(model), optimizer)
    assert copied.first_non_finite() is None
    for value in (float("nan"), float("inf"), -float("inf")):
        copied = copy_state(parallel_of(model), optimizer)
        copied.tensors["optimizer"]["2.weight.exp_avg"][1, 3] = value
        assert copied.first_non_finite() == "2.weight.exp_avg"
