"""Weights move as with torch's own optimisers, penalties, clipping and averages."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from lepton_ray.errors import IntegrityError, UsageError
from lepton_ray.settings import OptimizerSettings
from lepton_ray.settings.training import GroupSettings, LoraSettings, TransferSettings
from lepton_ray.training.optimisation import WeightAverage, add_penalty, clip, make_optimizer
from lepton_ray.training.transfer import Transfer

sys.path.insert(0, str(Path(__file__).parent.parent))
from ranks import run_ranks

Parameters = list[dict[str, Any]]
RATE = 0.02

TORCH: dict[str, tuple[dict[str, Any], Callable[[Parameters], torch.optim.Optimizer]]] = {
    "sgd": ({"momentum": 0.0, "nesterov": False}, lambda p: torch.optim.SGD(p, RATE)),
    "sgd momentum": (
        {"momentum": 0.8, "nesterov": False},
        lambda p: torch.optim.SGD(p, RATE, momentum=0.8),
    ),
    "sgd nesterov": (
        {"momentum": 0.8, "nesterov": True},
        lambda p: torch.optim.SGD(p, RATE, momentum=0.8, nesterov=True),
    ),
    "adam": (
        {"betas": [0.8, 0.99], "epsilon": 1e-6},
        lambda p: torch.optim.Adam(p, RATE, betas=(0.8, 0.99), eps=1e-6),
    ),
    "adamw": (
        {"betas": [0.8, 0.99], "epsilon": 1e-6},
        lambda p: torch.optim.AdamW(p, RATE, betas=(0.8, 0.99), eps=1e-6),
    ),
    "adagrad": ({"epsilon": 1e-6}, lambda p: torch.optim.Adagrad(p, RATE, eps=1e-6)),
    "rmsprop": (
        {"alpha": 0.9, "momentum": 0.5, "epsilon": 1e-6},
        lambda p: torch.optim.RMSprop(p, RATE, alpha=0.9, momentum=0.5, eps=1e-6),
    ),
}


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Tensors of a few values are slower with more."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def network(seed: int = 0) -> torch.nn.Sequential:
    torch.manual_seed(seed)
    return torch.nn.Sequential(
        torch.nn.Linear(5, 7), torch.nn.Tanh(), torch.nn.BatchNorm1d(7), torch.nn.LayerNorm(7), torch.nn.Linear(7, 1)
    )


def backward(model: torch.nn.Module, step: int, *, scale: float = 1.0) -> None:
    generator = torch.Generator().manual_seed(step)
    inputs = torch.randn(8, 5, generator=generator)
    (scale * (model(inputs) - inputs.sum(1, keepdim=True)).square().mean()).backward()


def train(model: torch.nn.Module, optimizer: torch.optim.Optimizer, steps: int = 20) -> None:
    for step in range(steps):
        backward(model, step)
        optimizer.step()
        optimizer.zero_grad()


def settings(kind: str, **values: Any) -> OptimizerSettings:
    return OptimizerSettings(name=kind.split(maxsplit=1)[0], learning_rate=RATE, **values)


def assert_same(first: torch.nn.Module, second: torch.nn.Module, tolerance: float = 1e-6) -> None:
    for (name, one), other in zip(first.state_dict().items(), second.state_dict().values(), strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance, msg=lambda text, name=name: name + text)


@pytest.mark.parametrize("kind", TORCH)
def test_weights_after_twenty_steps_are_those_of_torch(kind: str) -> None:
    """With decay on weights and none on norms and biases, every optimiser ends where torch's plain one ends."""
    values, reference = TORCH[kind]
    ours, theirs = network(), network()
    train(ours, make_optimizer(ours, settings(kind, weight_decay=0.3, **values)))
    weights = [p for p in theirs.parameters() if p.ndim >= 2]
    others = [p for p in theirs.parameters() if p.ndim < 2]
    train(theirs, reference([{"params": weights, "weight_decay": 0.3}, {"params": others, "weight_decay": 0.0}]))
    assert_same(ours, theirs)
    assert not torch.allclose(ours[0].weight, network()[0].weight, atol=1e-3)


def test_norms_and_biases_decay_when_asked_to() -> None:
    optimizer = make_optimizer(network(), settings("sgd", weight_decay=0.3, decay_norm_and_bias=True))
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.3]


def test_the_first_group_that_matches_decides() -> None:
    """Factor and decay come from the first pattern; norms and biases go on without decay; a null keeps the decay."""
    model = network()
    groups = [
        GroupSettings(pattern="4.weight", learning_rate_factor=10.0, weight_decay=0.5),
        GroupSettings(pattern="4.*", learning_rate_factor=3.0),
        GroupSettings(pattern="0.*", learning_rate_factor=0.0),
    ]
    optimizer = make_optimizer(model, settings("sgd", weight_decay=0.1, groups=groups))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = {
        names[id(parameter)]: (group["factor"], group["weight_decay"], group["lr"])
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    assert found == {
        "0.weight": (0.0, 0.1, 0.0), "0.bias": (0.0, 0.0, 0.0),
        "2.weight": (1.0, 0.0, RATE), "2.bias": (1.0, 0.0, RATE),
        "3.weight": (1.0, 0.0, RATE), "3.bias": (1.0, 0.0, RATE),
        "4.weight": (10.0, 0.5, 10 * RATE), "4.bias": (3.0, 0.0, 3 * RATE),
    }  # fmt: skip


def test_adapters_go_with_the_weight_that_they_adapt() -> None:
    """Patterns are of the task's own names, with LoRA as without."""
    model = network()
    transfer = TransferSettings(lora=LoraSettings(rank=2, targets=["0"], train=["4.*"]))
    learns = Transfer(model, transfer).learns
    groups = [GroupSettings(pattern="0.weight", learning_rate_factor=4.0)]
    optimizer = make_optimizer(model, settings("adamw", groups=groups), learns)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = {names[id(parameter)]: group["factor"] for group in optimizer.param_groups for parameter in group["params"]}
    assert found == {
        "0.lora_A.default.weight": 4.0, "0.lora_B.default.weight": 4.0, "4.weight": 1.0, "4.bias": 1.0,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("group", "words"),
    [
        ({"pattern": "4.wieght"}, r"groups\[1\]\.pattern is '4\.wieght': no parameter .*4\.weight"),
        ({"pattern": "*.bias", "weight_decay": 0.1}, r"groups\[1\]\.weight_decay is 0\.1: all 4 .*decay_norm_and_bias"),
    ],
)
def test_a_group_that_would_do_nothing_is_refused(group: dict[str, Any], words: str) -> None:
    groups = [GroupSettings(pattern="0.*"), GroupSettings(**group)]
    with pytest.raises(UsageError, match=words):
        make_optimizer(network(), settings("sgd", groups=groups))


def test_what_may_never_learn_is_not_in_the_optimiser() -> None:
    """What learns from a later epoch on is in it and stays as it is until it gets gradients, decay or no decay."""
    model = network()
    before = copy.deepcopy(model.state_dict())
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith("4."))
    optimizer = make_optimizer(model, settings("adamw", weight_decay=0.5), lambda name: name[0] in "04")
    assert sum(len(group["params"]) for group in optimizer.param_groups) == 4
    train(model, optimizer, 2)
    assert torch.equal(model[0].weight, before["0.weight"])
    assert not torch.equal(model[4].weight, before["4.weight"])
    model[0].requires_grad_(requires_grad=True)
    train(model, optimizer, 2)
    assert not torch.equal(model[0].weight, before["0.weight"])
    with pytest.raises(UsageError, match="no parameter to learn"):
        make_optimizer(model, settings("adamw"), lambda _: False)


def test_penalties_add_the_gradient_of_l1_and_l2() -> None:
    """The gradient is that of the loss with both sums in it, and left alone where there is none."""
    ours, theirs = network(), network()
    backward(ours, 0)
    ours[4].bias.grad = None
    add_penalty(ours.parameters(), 0.03, 0.2)
    backward(theirs, 0)
    learning = [p for name, p in theirs.named_parameters() if name != "4.bias"]
    (sum(0.03 * p.abs().sum() + 0.1 * p.square().sum() for p in learning)).backward()  # type: ignore[union-attr]
    assert ours[4].bias.grad is None
    for name, parameter in ours.named_parameters():
        if name != "4.bias":
            torch.testing.assert_close(parameter.grad, theirs.get_parameter(name).grad, rtol=1e-6, atol=1e-6)


def test_l1_and_l2_shrink_weights_as_computed() -> None:
    """Without any other gradient L1 takes rate x l1 a step off each weight, L2 leaves (1 - rate x l2) of it."""
    for l1, l2, expected in ((0.5, 0.0, [0.9, -0.4, 0.0]), (0.0, 0.5, [0.9, -0.45, 0.0]), (0.2, 0.5, [0.86, -0.41, 0])):
        weight = torch.nn.Parameter(torch.tensor([1.0, -0.5, 0.0]))
        weight.grad = torch.zeros(3)
        add_penalty([weight], l1, l2)
        torch.optim.SGD([weight], 0.2).step()
        assert weight.tolist() == pytest.approx(expected)


@pytest.mark.parametrize(("value", "norm"), [(None, 0.5), (0.01, None), (0.01, 0.02), (None, None), (None, 1e6)])
def test_gradients_are_cut_by_value_and_then_scaled_to_the_norm_as_torch_does(
    value: float | None, norm: float | None
) -> None:
    ours, theirs = network(), network()
    backward(ours, 0)
    backward(theirs, 0)
    found = clip(ours.parameters(), settings("sgd", clip_value=value, clip_norm=norm))
    if value is not None:
        torch.nn.utils.clip_grad_value_(theirs.parameters(), value)
    expected = torch.nn.utils.clip_grad_norm_(theirs.parameters(), float("inf") if norm is None else norm)
    torch.testing.assert_close(found, expected)
    for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad)


@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("value", [None, 0.1])
def test_cutting_does_not_hide_a_gradient_that_is_not_finite(bad: float, value: float | None) -> None:
    weight = torch.nn.Parameter(torch.zeros(3))
    weight.grad = torch.tensor([1.0, bad, 2.0])
    assert not torch.isfinite(clip([weight], settings("sgd", clip_value=value, clip_norm=1.0)))
    assert not torch.isfinite(weight.grad).all()


def test_without_any_gradient_the_norm_is_zero() -> None:
    assert clip(network().parameters(), settings("sgd")) == 0.0


def test_the_average_is_that_of_torch() -> None:
    """Weights and running means go as torch's AveragedModel that began at the same weights; counters follow."""
    model = network()
    ours = WeightAverage(model, 0.9)
    theirs = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
    theirs.update_parameters(model)  # its first call copies
    optimizer = make_optimizer(model, settings("adamw"))
    for step in range(20):
        backward(model, step)
        optimizer.step()
        optimizer.zero_grad()
        ours.update()
        theirs.update_parameters(model)
    expected = dict(theirs.module.state_dict())
    assert ours.state()["2.num_batches_tracked"] == model[2].num_batches_tracked == 20
    expected["2.num_batches_tracked"] = torch.tensor(20)
    assert set(expected) == set(ours.state())
    for name, value in ours.state().items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=0, msg=name)


def test_the_average_is_applied_and_taken_away_again() -> None:
    """Inside the model has the averages in the same storage; after it, also after an error, its own weights."""
    model = network()
    average = WeightAverage(model, 0.5)
    train(model, make_optimizer(model, settings("sgd")), 3)
    average.update()
    learning, averaged = copy.deepcopy(model.state_dict()), copy.deepcopy(average.state())
    storage = {name: value.data_ptr() for name, value in model.state_dict().items()}

    def use() -> None:
        with average.applied():
            assert {name: value.data_ptr() for name, value in model.state_dict().items()} == storage
            for name, value in model.state_dict().items():
                assert torch.equal(value, averaged[name]), name
            raise InterruptedError

    with pytest.raises(InterruptedError):
        use()
    for name, value in model.state_dict().items():
        assert torch.equal(value, learning[name]), name
        assert torch.equal(average.state()[name], averaged[name]), name
    assert not torch.equal(learning["0.weight"], averaged["0.weight"])


def test_a_restored_average_goes_on_bit_for_bit() -> None:
    model = network()
    average = WeightAverage(model, 0.9)
    train(model, make_optimizer(model, settings("sgd")), 3)
    average.update()
    other = WeightAverage(network(1), 0.9)
    other.load({name: value.clone() for name, value in average.state().items()})
    assert all(torch.equal(value, other.state()[name]) for name, value in average.state().items())
    with pytest.raises(IntegrityError, match=r"0\.bias"):
        other.load({name: value for name, value in average.state().items() if name != "0.bias"})
    with pytest.raises(IntegrityError, match=r"0\.bias has shape \[2\], the model \[7\]"):
        other.load(average.state() | {"0.bias": torch.zeros(2)})


def test_weights_that_two_modules_share_are_averaged_once_and_named_twice() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
    model[1].weight = model[0].weight
    average = WeightAverage(model, 0.5)
    torch.nn.init.zeros_(model[0].weight)
    before = average.state()["1.weight"].clone()
    average.update()
    assert set(average.state()) == set(model.state_dict())
    assert torch.equal(average.state()["1.weight"], before / 2)
    with average.applied():
        assert torch.equal(model[1].weight, before / 2)
    assert not model[0].weight.any()
    average.load({name: value.clone() for name, value in average.state().items()})


def sharded(names: list[str]) -> dict[str, dict[str, float]]:
    """On one rank of FSDP2: the largest differences to the same model whole, per optimiser."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    found = {}
    for name in names:
        chosen = settings(name, clip_norm=0.05, clip_value=0.2, l1=0.01, l2=0.02)
        cut, whole = network(), network()
        for layers in (cut, whole):
            del layers[2]
        mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
        for layer in (cut[0], cut[2], cut):  # the last layer stays with the root, whose weights stay gathered
            fully_shard(layer, mesh=mesh)
        pairs = [(model, make_optimizer(model, chosen), WeightAverage(model, 0.9)) for model in (cut, whole)]
        norms: list[list[float]] = [[], []]
        for step in range(3):
            for (model, optimizer, average), seen in zip(pairs, norms, strict=True):
                backward(model, step)
                add_penalty(model.parameters(), chosen.l1, chosen.l2)
                seen.append(float(clip(model.parameters(), chosen)))
                optimizer.step()
                optimizer.zero_grad()
                average.update()
        inputs = torch.ones(3, 5)
        with torch.no_grad():
            plain = float((cut(inputs) - whole(inputs)).abs().max())
            with pairs[0][2].applied(), pairs[1][2].applied():  # the root's weights are gathered at this moment
                averaged = float((cut(inputs) - whole(inputs)).abs().max())
                moved = float((cut(inputs) - network()[4](torch.zeros(3, 7))).abs().max())
            again = float((cut(inputs) - whole(inputs)).abs().max())
        pairs[0][2].load({key: value.full_tensor() for key, value in pairs[0][2].state().items()})  # type: ignore[attr-defined]
        restored = max(
            float((value.full_tensor() - pairs[1][2].state()[key]).abs().max())  # type: ignore[attr-defined]
            for key, value in pairs[0][2].state().items()
        )
        found[name] = {
            "norm": max(abs(one - other) for one, other in zip(*norms, strict=True)),
            "plain": plain, "averaged": averaged, "again": again, "restored": restored, "moved": -moved,
        }  # fmt: skip
    return found


def test_sharded_weights_move_as_whole_ones() -> None:
    """Two ranks of FSDP2: penalty, full norm, every optimiser and the average as on the whole model."""
    names = ["sgd", "adam", "adamw", "adagrad", "rmsprop"]
    for found in run_ranks(sharded, 2, names):
        assert sorted(found) == sorted(names)
        for name, differences in found.items():
            for what, difference in differences.items():
                assert difference < 1e-5, (name, what, difference)
