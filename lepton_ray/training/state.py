"""Model and optimiser as safetensors bytes and back: no pickle, bit for bit."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors

from lepton_ray.errors import IntegrityError
from lepton_ray.settings import OptimizerSettings
from lepton_ray.tasks import load_weights

Tensors = dict[str, torch.Tensor]


def make_optimizer(model: torch.nn.Module, settings: OptimizerSettings) -> torch.optim.Optimizer:
    """The optimiser over a model's parameters: weights of two and more dimensions decay, norms and biases do not.

    Fused kernels update all parameters in one call; they are about twice as fast on the CPU too.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": settings.weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if settings.name == "sgd":
        return torch.optim.SGD(groups, lr=settings.learning_rate, momentum=0.9, nesterov=True, fused=True)
    kind = torch.optim.Adam if settings.name == "adam" else torch.optim.AdamW
    return kind(groups, lr=settings.learning_rate, fused=True)


def copy_state(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> tuple[Tensors, Tensors]:
    """Copies on the CPU of the model's and the optimiser's tensors, to be written while training goes on."""
    weights = {name: value.detach().to("cpu", copy=True).contiguous() for name, value in model.state_dict().items()}
    moments = {
        f"{index}.{name}": torch.as_tensor(value).detach().to("cpu", copy=True).contiguous()
        for index, entry in optimizer.state_dict()["state"].items()
        for name, value in entry.items()
        if value is not None
    }
    return weights, moments


def pack(weights: Tensors, moments: Tensors, state: Mapping[str, Any]) -> dict[str, bytes]:
    """The files of a checkpoint."""
    return {
        "model.safetensors": save_tensors(weights),
        "optimizer.safetensors": save_tensors(moments),
        "state.json": json.dumps(state).encode(),
    }


def unpack(files: Mapping[str, bytes], model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Restore model and optimiser in place from a checkpoint's files; returns the state that was packed with them.

    Raises IntegrityError where the files do not fit the model and optimiser.
    """
    load_weights(model, files["model.safetensors"])
    states: dict[int, dict[str, torch.Tensor]] = {}
    for key, value in load_tensors(files["optimizer.safetensors"]).items():
        index, _, name = key.partition(".")
        states.setdefault(int(index), {})[name] = value
    fresh = optimizer.state_dict()
    parameters = sum(len(group["params"]) for group in fresh["param_groups"])
    if states and max(states) >= parameters:
        raise IntegrityError(f"optimizer state has {max(states) + 1} parameters, the model {parameters}")
    optimizer.load_state_dict({"state": states, "param_groups": fresh["param_groups"]})
    state: dict[str, Any] = json.loads(files["state.json"])
    return state
