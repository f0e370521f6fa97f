"""Pruning: which weights go, that they stay away, and that a narrower model answers as its pruned original."""

from __future__ import annotations

import copy

import pytest
import torch
from served_model import OPTIONS, TRANSFORMS
from torch import nn
from torch.nn.utils import prune

from lepton_ray.compression.candidate import Candidate
from lepton_ray.compression.pruning import prune_magnitude, prune_structured
from lepton_ray.errors import UsageError
from lepton_ray.tasks import find_task

CARD = {"task": {"name": "image_classification", "options": {**OPTIONS, "width": 8}}}


def candidate(seed: int = 0) -> Candidate:
    """The small CNN with random weights."""
    torch.manual_seed(seed)
    model = find_task("image_classification", CARD["task"]["options"]).build(TRANSFORMS)
    return Candidate.of(CARD, TRANSFORMS, model)


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """Its matrices and convolutions."""
    return {name: value.detach() for name, value in model.named_parameters() if value.dim() >= 2}


class Residual(nn.Module):
    """Two layers beside a short cut: channels cannot be taken out of it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(784, 20), nn.Linear(20, 20), nn.Linear(20, 10)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Logits."""
        seen = self.first(images.float().flatten(1) / 255)
        logits: torch.Tensor = self.last(seen + torch.relu(self.second(seen)))
        return logits


def images() -> torch.Tensor:
    """Rows as the task makes them."""
    return torch.randint(0, 256, (8, 1, 28, 28), generator=torch.Generator().manual_seed(3), dtype=torch.uint8)


@pytest.mark.parametrize("amount", [0.1, 0.5, 0.93])
def test_magnitude_takes_the_weights_that_torch_takes(amount: float) -> None:
    """Those of `global_unstructured` with L1: smallest over all layers together; biases stay."""
    made = candidate()
    theirs = copy.deepcopy(made.model)
    layers = [module for module in theirs.modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    prune.global_unstructured(
        [(layer, "weight") for layer in layers], pruning_method=prune.L1Unstructured, amount=amount
    )
    for layer in layers:
        prune.remove(layer, "weight")
    prune_magnitude(made, amount)
    for name, value in theirs.state_dict().items():
        assert torch.equal(made.model.state_dict()[name], value), name
    kept = sum(int(mask.sum()) for mask in made.masks.values())
    total = sum(value.numel() for value in weights(made.model).values())
    assert kept == total - round(amount * total)


def test_pruned_weights_stay_zero_and_a_second_step_adds_to_them() -> None:
    """Whatever a distil step does meanwhile."""
    made = candidate()
    prune_magnitude(made, 0.4)
    with torch.no_grad():
        for value in made.model.parameters():
            value.add_(1.0)
    made.keep_zeros()
    zeros = {name: value == 0 for name, value in weights(made.model).items()}
    total = sum(value.numel() for value in zeros.values())
    assert sum(int(value.sum()) for value in zeros.values()) == round(0.4 * total)
    prune_magnitude(made, 0.6)
    now = weights(made.model)
    assert all((now[name][gone] == 0).all() for name, gone in zeros.items())
    assert sum(int((value == 0).sum()) for value in now.values()) == round(0.6 * total)


def test_structured_makes_the_model_narrower() -> None:
    """Half of the width, and the answers of the original whose weakest channels are at zero, whatever their place."""
    made = candidate()
    wide = copy.deepcopy(made.model)
    prune_structured(made, 0.5)
    assert made.options["width"] == 4
    assert [len(value) for value in weights(made.model).values()] == [4, 8, 8, 16, 10]
    layers = [module for module in wide.modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    with torch.no_grad():
        for layer, count in zip(layers[:-1], [4, 8, 8, 16], strict=True):
            gone = layer.weight.abs().flatten(1).sum(1).argsort()[:-count]
            layer.weight[gone] = 0
            layer.bias[gone] = 0
    with torch.inference_mode():
        assert torch.allclose(made.model(images()), wide(images()), atol=1e-5)
    assert made.notes == ["task option width is 4, was 8: the model is smaller by its channels"]
    assert not made.masks


def test_a_model_that_cannot_be_narrowed_keeps_its_channels_at_zero() -> None:
    """Half of each hidden layer's channels answer nothing any more; the last layer is left alone."""
    made = candidate()
    made.model = Residual().eval()
    prune_structured(made, 0.5)
    assert made.options["width"] == 8
    for name, zeros in (("first", 10), ("second", 10), ("last", 0)):
        layer = made.model.get_submodule(name)
        assert isinstance(layer, nn.Linear)
        silent = (layer.weight == 0).all(1)
        assert int(silent.sum()) == zeros
        assert torch.equal(silent, layer.bias == 0)
    assert "stay in place, at zero" in made.notes[0]
    assert made.packed()[1].sparse == ["first.bias", "first.weight", "second.bias", "second.weight"]


def test_a_wrong_narrowing_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model of the same shapes that computes otherwise is not exchanged for one that answers differently."""

    def softplus(model: nn.Module) -> nn.Module:  # a silent channel is log 2 after it, not 0
        for name, module in model.named_modules():
            if isinstance(module, nn.ReLU):
                parent, _, last = name.rpartition(".")
                setattr(model.get_submodule(parent), last, nn.Softplus())
        return model

    build = type(candidate().task).build
    monkeypatch.setattr(type(candidate().task), "build", lambda self, transforms: softplus(build(self, transforms)))
    made = candidate()
    prune_structured(made, 0.5)
    assert made.options["width"] == 8
    assert made.masks


def test_models_without_weights_are_refused() -> None:
    """Told by the step; nothing is divided by nothing."""
    made = candidate()
    made.model = nn.Sequential(nn.Flatten(), nn.Linear(784, 10))
    with pytest.raises(UsageError, match=r"prune structured 0\.5: the model has no hidden"):
        prune_structured(made, 0.5)
    made.model = nn.Sequential(nn.LayerNorm(8))
    with pytest.raises(UsageError, match=r"prune magnitude 0\.5: the model has no weight matrices"):
        prune_magnitude(made, 0.5)
