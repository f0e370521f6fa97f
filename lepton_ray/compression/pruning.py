"""Pruning, made permanent: single weights by magnitude over the whole model, or whole channels layer by layer."""

from __future__ import annotations

import copy

import torch
from torch import nn

from lepton_ray.compression.candidate import Candidate
from lepton_ray.errors import UsageError

Layer = nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d
"""What has output channels: the first dimension of its weight."""
NARROWS = "width"
"""The task option that scales every hidden layer."""
_SAMPLE = 16
"""Example rows on which a narrower model must answer as the one with its channels at zero."""


def prune_magnitude(candidate: Candidate, amount: float) -> None:
    """Set the share `amount` of all weights to zero: those of smallest absolute value over all layers together.

    Weights are parameters of two and more dimensions; norms and biases stay. (Han et al. 2015, "Learning both Weights
    and Connections for Efficient Neural Networks"; torch's `prune.global_unstructured` with `L1Unstructured`.)
    """
    weights = {name: value for name, value in candidate.model.named_parameters() if value.dim() >= 2}
    if not weights:
        raise UsageError(f"prune magnitude {amount}: the model has no weight matrices")
    sizes = torch.cat([value.detach().abs().flatten() for value in weights.values()])
    gone = torch.argsort(sizes, stable=True)[: round(amount * len(sizes))]  # stable: ties go the same way every time
    alive = torch.ones(len(sizes), dtype=torch.bool)
    alive[gone] = False
    for (name, value), mask in zip(
        weights.items(), alive.split([value.numel() for value in weights.values()]), strict=True
    ):
        before = candidate.masks.get(name)
        candidate.masks[name] = mask.reshape(value.shape) if before is None else mask.reshape(value.shape) & before
    candidate.keep_zeros()


def prune_structured(candidate: Candidate, amount: float) -> None:
    """Remove the share `amount` of each hidden layer's channels: those with the smallest sum of absolute weights.

    (Li et al. 2017, "Pruning Filters for Efficient ConvNets".) Where the task has an option `width`, the model is built
    anew with less of it and the living channels move there, provided that it then answers as the model with those
    channels at zero; otherwise the channels stay in place, at zero.
    """
    layers = _hidden_layers(candidate.model)
    if not layers:
        raise UsageError(f"prune structured {amount}: the model has no hidden linear or convolution layer")
    if not _narrow(candidate, amount):
        keep = {name: max(1, round(len(layer.weight) * (1 - amount))) for name, layer in layers.items()}
        _silence(candidate.model, {name: _strongest(layers[name], count) for name, count in keep.items()})
        for name, layer in layers.items():
            alive = (layer.weight != 0).flatten(1).any(1)
            shape = [-1] + [1] * (layer.weight.dim() - 1)
            candidate.masks[f"{name}.weight"] = alive.reshape(shape).expand_as(layer.weight).clone()
            if layer.bias is not None:
                candidate.masks[f"{name}.bias"] = alive
        candidate.notes.append(
            f"this model is not made narrower by a task option {NARROWS}: pruned channels stay in place, at zero"
        )


def _layers(model: nn.Module) -> dict[str, Layer]:
    """Layers with channels, by name, in the order of their registration."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Layer)}


def _hidden_layers(model: nn.Module) -> dict[str, Layer]:
    """The same without the last: its outputs are the answers."""
    return dict(list(_layers(model).items())[:-1])


def _strongest(layer: Layer, count: int) -> torch.Tensor:
    """Indices of the `count` output channels with the largest sum of absolute weights, ascending."""
    weight = layer.weight
    strength = weight.detach().abs().flatten(1).sum(1)
    return torch.argsort(strength, descending=True, stable=True)[:count].sort().values


def _silence(model: nn.Module, living: dict[str, torch.Tensor]) -> None:
    """Set weights and bias of all channels that do not live to zero."""
    layers = _layers(model)
    with torch.no_grad():
        for name, alive in living.items():
            layer = layers[name]
            mask = torch.zeros(len(layer.weight))
            mask[alive] = 1
            layer.weight.mul_(mask.reshape(-1, *[1] * (layer.weight.dim() - 1)))
            if layer.bias is not None:
                layer.bias.mul_(mask)


def _narrow(candidate: Candidate, amount: float) -> bool:
    """Build the model with a smaller `width` and move the living channels there; False where that cannot be done."""
    width = getattr(candidate.task.options, NARROWS, None)
    if type(width) is not int:
        return False
    smaller = max(1, round(width * (1 - amount)))
    try:
        task, options, narrow = candidate.with_options({NARROWS: smaller})
    except UsageError:  # e.g. a width that the number of heads does not divide
        return False
    layers, targets = _hidden_layers(candidate.model), _hidden_layers(narrow)
    if layers.keys() != targets.keys():
        return False
    if sum(value.numel() for value in narrow.parameters()) >= sum(p.numel() for p in candidate.model.parameters()):
        return False  # this kind of model takes its size from elsewhere
    living = {name: _strongest(layer, len(targets[name].weight)) for name, layer in layers.items()}
    silent = copy.deepcopy(candidate.model)
    _silence(silent, living)
    if not _move(silent, narrow, living) or not _equal(candidate, silent, narrow):
        return False
    candidate.task, candidate.options, candidate.model = task, options, narrow
    candidate.masks.clear()
    candidate.notes.append(f"task option {NARROWS} is {smaller}, was {width}: the model is smaller by its channels")
    return True


def _move(wide: nn.Module, narrow: nn.Module, living: dict[str, torch.Tensor]) -> bool:
    """Copy living channels of a chain of layers into the narrower model; False where the shapes are not those of one.

    A layer's inputs are the living outputs of the layer before it; where an image was flattened between the two, each
    of those stands for as many inputs as one channel had pixels.
    """
    state = {name: value.clone() for name, value in wide.state_dict().items()}
    before: tuple[torch.Tensor, int] | None = None
    for name, layer in _layers(wide).items():
        outputs = living.get(name, torch.arange(len(layer.weight)))
        weight, inputs = layer.weight.detach(), layer.weight.shape[1]
        if before is not None:
            alive, total = before
            if inputs % total:
                return False
            each = inputs // total
            weight = weight[:, (alive[:, None] * each + torch.arange(each)).flatten()]
        state[f"{name}.weight"] = weight[outputs].contiguous()
        if layer.bias is not None:
            state[f"{name}.bias"] = layer.bias.detach()[outputs]
        before = (outputs, len(layer.weight))
    wanted = {name: value.shape for name, value in narrow.state_dict().items()}
    if wanted != {name: value.shape for name, value in state.items()}:
        return False
    narrow.load_state_dict(state)
    return True


def _equal(candidate: Candidate, silent: nn.Module, narrow: nn.Module) -> bool:
    """Whether the narrower model answers as the one with silent channels does, on rows of noise and the task's example.

    That holds only where a silent channel stays silent up to the next layer (ReLU, pooling), so it is not taken on
    trust.
    """
    example = candidate.task.rows_of([candidate.task.example(candidate.transforms)], candidate.transforms)
    rows = candidate.task.inputs(example, candidate.transforms)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randint(0, 200, (_SAMPLE, *rows.shape[1:]), generator=generator).to(rows.dtype)
    with torch.inference_mode():
        for inputs in (rows, noise):
            try:
                wanted, found = silent(inputs), narrow(inputs)
            except (RuntimeError, IndexError):  # noise that the model has no meaning for, e.g. no such word
                return False
            if not torch.allclose(found, wanted, rtol=1e-4, atol=1e-4 * float(wanted.abs().max())):
                return False
    return True
