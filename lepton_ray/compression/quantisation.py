"""The door to torchao: which int8 values and scales stand for a linear layer's weights."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from lepton_ray.compression.candidate import Candidate
from lepton_ray.errors import UsageError
from lepton_ray.tasks.int8_linear import Int8Linear, Scheme, int8_instructions, linear_layers, replace_layer

if TYPE_CHECKING:
    import torch

SLOW = (
    "this CPU has no int8 instructions (VNNI or AMX): int8-dynamic answers the same here, and gains no time; "
    "int8-weight makes the file as small"
)


def quantise(candidate: Candidate, scheme: Scheme) -> None:
    """Exchange every linear layer for one with int8 weights, quantised by torchao, one scale for each output.

    Raises UsageError where torchao is missing or the model has no linear layer.
    """
    layers = linear_layers(candidate.model)
    if not layers:
        raise UsageError(f"quantise {scheme}: the model has no linear layer; convolutions stay as they are: try cast")
    for name, layer in layers.items():
        weight, scale = quantised_weight(layer, scheme)
        replace_layer(candidate.model, name, Int8Linear.of(layer, weight, scale, scheme))
    if scheme == "int8-dynamic" and not int8_instructions():
        candidate.notes.append(SLOW)


def quantised_weight(layer: torch.nn.Linear, scheme: Scheme) -> tuple[torch.Tensor, torch.Tensor]:
    """Int8 values `[outputs, inputs]` and scales `[outputs, 1]` that torchao takes for a layer.

    (`torchao.quantization.quantize_` with `Int8WeightOnlyConfig` or `Int8DynamicActivationInt8WeightConfig`, one scale
    per row.) The layer itself is not changed.
    """
    import copy

    import torch

    # torchao tells of kernels for GPUs that are not there, and torch of its enums: nothing a user could act on
    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        from torchao.quantization import (  # type: ignore[import-untyped] # torchao has no annotations to check
            Int8DynamicActivationInt8WeightConfig,
            Int8Tensor,
            Int8WeightOnlyConfig,
            quantize_,
        )
    except ImportError as error:
        raise UsageError(f"quantise {scheme}: needs torchao; pip install 'lepton-ray[compress]'") from error
    kinds = {"int8-weight": Int8WeightOnlyConfig, "int8-dynamic": Int8DynamicActivationInt8WeightConfig}
    holder = torch.nn.Sequential(copy.deepcopy(layer))
    quantize_(holder, kinds[scheme](set_inductor_config=False))  # inductor's settings belong to the whole process
    made = holder[0].weight
    if not isinstance(made, Int8Tensor) or made.qdata.shape != layer.weight.shape or made.scale.numel() != len(made):
        raise UsageError(f"quantise {scheme}: torchao gave {type(made).__name__}; install the version that is locked")
    return made.qdata, made.scale
