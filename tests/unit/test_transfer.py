"""What learns, and when: patterns, epochs, adapters and their merging."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from safetensors.torch import load, save
from text_data import sentences

from lepton_ray.errors import UsageError
from lepton_ray.settings import OptimizerSettings
from lepton_ray.settings.training import TransferSettings
from lepton_ray.tasks import AnyTask, find_task
from lepton_ray.training.optimisation import make_optimizer
from lepton_ray.training.transfer import Transfer, check_transfer, merged_weights, plain_name, publishable

LORA = {"rank": 2, "alpha": 8.0, "targets": ["query", "value"], "train": ["head.*"]}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Threads that wait for each other make these tiny models slow on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def text_task() -> tuple[AnyTask, dict[str, Any]]:
    task = find_task("text_classification", {"width": 8, "layers": 2, "heads": 2, "max_length": 8, "dropout": 0.0})
    return task, task.fit(sentences())


def built() -> torch.nn.Module:
    task, transforms = text_task()
    torch.manual_seed(0)
    return task.build(transforms)


def settings(**fields: Any) -> TransferSettings:
    return TransferSettings.model_validate(fields)


def learning(model: torch.nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def train(model: torch.nn.Module, transfer: Transfer, epochs: int, steps: int = 3) -> list[set[str]]:
    """The plain names of the parameters that each epoch changed."""
    task, transforms = text_task()
    inputs, targets = task.inputs(sentences(), transforms), task.targets(sentences(), transforms)
    optimizer = make_optimizer(model, OptimizerSettings(learning_rate=1e-2), transfer.learns)
    changed = []
    for epoch in range(epochs):
        transfer.at_epoch(epoch)
        before = {name: value.clone() for name, value in model.state_dict().items()}
        for _ in range(steps):
            optimizer.zero_grad()
            task.losses(model(inputs), targets, label_smoothing=0.0).mean().backward()
            optimizer.step()
        changed.append({name for name, value in model.state_dict().items() if not torch.equal(value, before[name])})
    return changed


def test_without_settings_everything_learns_and_the_driver_needs_no_torch() -> None:
    model = built()
    everything = learning(model)
    transfer = Transfer(model, settings())
    assert learning(model) == everything == {name for name in everything if transfer.learns(name)}
    assert not transfer.at_epoch(1)
    check_transfer(settings(), None, {})  # type: ignore[arg-type] # the task is not even looked at


def test_frozen_parameters_learn_from_their_epoch_on() -> None:
    """Decay leaves them alone too until then."""
    made = settings(
        freeze=["embedding.*", "positions.*", "blocks.*"],
        unfreeze=[{"epoch": 1, "patterns": ["blocks.1.*"]}, {"epoch": 2, "patterns": ["blocks.0.*", "positions.*"]}],
    )
    model = built()
    transfer = Transfer(model, made)
    names = {name for name, _ in model.named_parameters()}
    head = {"head.weight", "head.bias", "norm.weight", "norm.bias"}
    assert learning(model) == head
    assert not transfer.at_epoch(0)
    assert transfer.learns("blocks.0.query.weight")
    assert not transfer.learns("embedding.weight")
    changed = train(model, transfer, 3)
    # a key's bias moves all scores of a query alike, so its gradient is nothing but rounding
    stays = {name for name in names if name.endswith("key.bias")}
    blocks = [{name for name in names if name.startswith(f"blocks.{number}.")} for number in (0, 1)]
    assert changed[0] == head
    assert changed[1] - stays == (head | blocks[1]) - stays
    assert changed[2] - stays == (head | blocks[0] | blocks[1] | {"positions.weight"}) - stays


def test_a_change_of_what_learns_is_told_once_per_epoch() -> None:
    """The engine wraps the model for its ranks anew when it is; a run resumed in epoch 5 gets there in one step."""
    made = settings(freeze=["blocks.*"], unfreeze=[{"epoch": 2, "patterns": ["blocks.*"]}])
    transfer = Transfer(built(), made)
    assert [transfer.at_epoch(epoch) for epoch in range(4)] == [False, False, True, False]
    resumed = Transfer(built(), made)
    assert resumed.at_epoch(5)
    assert learning(resumed.model) == learning(transfer.model)
    assert transfer.at_epoch(0)  # gone back to an earlier checkpoint


def test_adapters_learn_and_the_weights_below_do_not() -> None:
    model = built()
    plain = {name: value.clone() for name, value in model.state_dict().items()}
    transfer = Transfer(model, settings(lora=LORA))
    task, transforms = text_task()
    inputs = task.inputs(sentences(), transforms)
    assert torch.equal(model.eval()(inputs), _with(plain).eval()(inputs))  # B is 0, so nothing has changed yet
    changed = train(model.train(), transfer, 1)[0]
    adapters = {name for name, _ in model.named_parameters() if "lora_" in name}
    assert len(adapters) == 2 * 2 * 2
    assert changed == adapters | {"head.weight", "head.bias"} == learning(model)
    assert {plain_name(name) for name in model.state_dict()} - adapters == set(plain)


def test_merged_weights_answer_as_the_model_with_adapters() -> None:
    """What is published has the names of the plain model, so that serving knows nothing of adapters."""
    model = built()
    made = settings(lora=LORA)
    train(model, Transfer(model, made), 2)
    task, transforms = text_task()
    inputs = task.inputs(sentences(), transforms)
    expected = model.eval()(inputs)
    assert not torch.allclose(expected, built().eval()(inputs), atol=1e-3)
    merged = merged_weights(model.state_dict(), made)
    assert list(merged) == list(built().state_dict())
    assert torch.allclose(_with(merged).eval()(inputs), expected, atol=1e-5)
    published = load(publishable(save(model.state_dict()), made))
    assert all(torch.equal(published[name], value) for name, value in merged.items())
    scale, name = 8.0 / 2, "blocks.0.query"
    state = model.state_dict()
    change = state[f"{name}.lora_B.default.weight"] @ state[f"{name}.lora_A.default.weight"]
    assert torch.allclose(merged[f"{name}.weight"], state[f"{name}.base_layer.weight"] + scale * change)


def test_without_adapters_bytes_are_published_as_they_are() -> None:
    assert publishable(b"anything", settings(freeze=["blocks.*"])) == b"anything"


def test_weights_below_adapters_can_begin_to_learn_later() -> None:
    made = settings(lora=LORA, unfreeze=[{"epoch": 1, "patterns": ["norm.*", "blocks.1.query.*"]}])
    model = built()
    transfer = Transfer(model, made)
    first = learning(model)
    assert transfer.at_epoch(1)
    later = {"norm.weight", "norm.bias", "blocks.1.query.base_layer.weight", "blocks.1.query.base_layer.bias"}
    assert learning(model) - first == later
    assert all(transfer.learns(name) for name in later)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"freeze": ["block.*"]}, "freeze has 'block.*': fits no parameter; the model has blocks."),
        ({"freeze": ["*"]}, "nothing learns in epoch 0"),
        (
            {"freeze": ["head.*"], "unfreeze": [{"epoch": 1, "patterns": ["blocks.*"]}]},
            "unfreeze has 'blocks.*': what it fits is not frozen",
        ),
        (
            {"freeze": ["head.*"], "unfreeze": [{"epoch": 1, "patterns": ["heads.*"]}]},
            "unfreeze has 'heads.*': fits no parameter; the model has head.",
        ),
        ({"lora": {"targets": ["q_proj"]}}, "targets has 'q_proj': no layer's name ends so; the model has blocks."),
        ({"lora": {"targets": ["embedding"]}}, "targets has 'embedding': embedding is Embedding, not linear"),
        ({"lora": {**LORA, "train": ["haed.*"]}}, "train has 'haed.*': fits no parameter; the model has head."),
    ],
)
def test_what_fits_nothing_is_told_on_the_driver_with_near_names(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError) as caught:
        check_transfer(settings(**fields), *text_task())
    assert words in str(caught.value)
    assert str(caught.value).startswith("training.transfer")
    with pytest.raises(UsageError):
        Transfer(built(), settings(**fields))


def test_adapters_without_their_package_name_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(UsageError, match=r"pip install 'lepton-ray\[lora\]'"):
        check_transfer(settings(lora=LORA), *text_task())


def _with(weights: dict[str, torch.Tensor]) -> torch.nn.Module:
    model = built()
    model.load_state_dict(weights)
    return model
