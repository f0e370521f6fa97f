"""A linear layer with int8 weights: what a quantised model version computes with, here and in a replica.

The numbers are those of torchao's `Int8Tensor` (symmetric, one scale for each output row; dynamic: one for each input
row), so a model quantised by torchao answers the same here, and neither torchao nor its pickled classes are needed to
serve it. Each row is scaled by itself: an answer does not depend on the rows it was batched with.
"""

from __future__ import annotations

from functools import cache
from typing import Literal, get_args

import torch
from torch import nn
from torch.nn import functional

Scheme = Literal["int8-weight", "int8-dynamic"]
SCHEMES: tuple[Scheme, ...] = get_args(Scheme)
_STEPS = 127.5
"""Half the number of int8 steps: torchao's divisor of a row's largest absolute value (`choose_qparams_affine`)."""
_SMALLEST_SCALE = torch.finfo(torch.float32).eps


class Int8Linear(nn.Module):
    """`y = x W^T + b` with W = int8 values times a scale for each output.

    Args:
        inputs: features of a row.
        outputs: features of its result.
        bias: whether there is a bias.
        scheme: `int8-weight` multiplies floats with the int8 values; `int8-dynamic` rounds each input row to int8
            first and multiplies whole numbers.

    State: `int8` `[outputs, inputs]`, `scale` float32 `[outputs]`, `bias` `[outputs]`. The first is not called
    `weight`, so that nobody who starts a model from these tensors by name takes the whole numbers for weights.
    """

    int8: torch.Tensor
    scale: torch.Tensor
    bias: torch.Tensor | None

    def __init__(self, inputs: int, outputs: int, *, bias: bool, scheme: Scheme) -> None:
        super().__init__()
        self.in_features, self.out_features, self.scheme = inputs, outputs, scheme
        self.register_buffer("int8", torch.zeros(outputs, inputs, dtype=torch.int8))
        self.register_buffer("scale", torch.ones(outputs))
        self.register_buffer("bias", torch.zeros(outputs) if bias else None)

    @classmethod
    def of(cls, linear: nn.Linear, weight: torch.Tensor, scale: torch.Tensor, scheme: Scheme) -> Int8Linear:
        """The layer in place of `linear`, with weights quantised already."""
        made = cls(linear.in_features, linear.out_features, bias=linear.bias is not None, scheme=scheme)
        made.int8, made.scale = weight.detach().clone(), scale.detach().float().flatten().clone()
        if linear.bias is not None:
            made.bias = linear.bias.detach().clone()
        return made

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Results `[..., outputs]` of rows `[..., inputs]`, in the type of the inputs."""
        if self.scheme == "int8-weight":
            product = functional.linear(inputs, self.int8.to(inputs.dtype)) * self.scale.to(inputs.dtype)
        else:
            rows = inputs.reshape(-1, self.in_features).float()
            scales = (rows.abs().amax(1, keepdim=True) / _STEPS).clamp_min(_SMALLEST_SCALE)
            whole = torch.round(rows * (1.0 / scales)).clamp(-128, 127)
            product = (_whole_product(whole, self.int8) * scales * self.scale).to(inputs.dtype)
            product = product.reshape(*inputs.shape[:-1], self.out_features)
        return product if self.bias is None else product + self.bias.to(inputs.dtype)

    def dequantised(self) -> torch.Tensor:
        """The weights as float32 `[outputs, inputs]`."""
        return self.int8.float() * self.scale[:, None]

    def extra_repr(self) -> str:
        """Shown by `print(model)`."""
        return f"in_features={self.in_features}, out_features={self.out_features}, scheme={self.scheme}"


@cache
def int8_instructions() -> bool:
    """Whether this CPU multiplies int8 faster than floats (VNNI or AMX)."""
    asked = (getattr(torch.cpu, name, None) for name in ("_is_vnni_supported", "_is_amx_tile_supported"))
    return any(ask() for ask in asked if ask is not None)


def _whole_product(rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Sums of products of whole numbers, float32 `[rows, outputs]`.

    Without int8 instructions torch multiplies int8 matrices up to 50 times slower than floats; floats hold the same
    sums exactly up to 2**24 (any row of up to 1,024 inputs), and to a part in ten million beyond.
    """
    if rows.device.type == "cpu" and int8_instructions():
        return torch._int_mm(rows.to(torch.int8), weight.t()).float()  # noqa: SLF001 - torch's int8 product has no other name
    return functional.linear(rows, weight.float())


def linear_layers(model: nn.Module) -> dict[str, nn.Linear]:
    """The layers that can be quantised, by name: not those whose weights other code reaches for (attention's output).

    That is the choice of torchao's `quantize_`.
    """
    special = nn.modules.linear.NonDynamicallyQuantizableLinear
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and not isinstance(module, special)
    }


def replace_layer(model: nn.Module, name: str, layer: nn.Module) -> None:
    """Put `layer` where the layer of that name is."""
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent) if parent else model, last, layer)


def plain_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """The state under the names of the uncompressed model, int8 weights as float32."""
    layers = {name: module for name, module in model.named_modules() if isinstance(module, Int8Linear)}
    state = {name: value for name, value in model.state_dict().items() if name.rpartition(".")[0] not in layers}
    for name, layer in layers.items():
        state[f"{name}.weight"] = layer.dequantised()
        if layer.bias is not None:
            state[f"{name}.bias"] = layer.bias
    return state
