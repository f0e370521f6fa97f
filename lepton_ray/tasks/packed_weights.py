"""Compressed weights as safetensors bytes, and back into a model.

A model version that is smaller than its architecture says so in its card, under `compression.weights` (the packing):

    {"format": 1, "linear": {"classifier.1": "int8-weight"}, "floats": "bf16", "sparse": ["features.3.weight"]}

`linear` names the layers with int8 weights: they have `<layer>.int8` (I8) and `<layer>.scale` (F32). `floats` is the
type that the other floating-point tensors are stored in; they are widened when loaded. A tensor in `sparse` lies there
as `<name>.mask` (U8, a bit for each value, the first in the lowest bit) and `<name>.values` (those that are not zero).
Nothing here runs code from the store, and no size is taken from it: shapes are those of the model that the task builds.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors

from lepton_ray.errors import IntegrityError, shown
from lepton_ray.settings.loading import describe_errors
from lepton_ray.tasks.int8_linear import Int8Linear, Scheme, linear_layers, replace_layer

NARROW = {"bf16": torch.bfloat16, "fp16": torch.float16}
_REMEDY = "publish the model again, or load it with the lepton-ray that made it"


class Packing(BaseModel):
    """How the tensors of a compressed version are stored: `compression.weights` of its card."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal[1] = 1
    linear: dict[str, Scheme] = Field(default_factory=dict)
    """Layers with int8 weights."""
    floats: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Type in which floating-point tensors are stored."""
    sparse: Annotated[list[str], Field(max_length=100_000)] = Field(default_factory=list)
    """Tensors stored without their zeros."""


def pack(model: torch.nn.Module, *, floats: Literal["fp32", "bf16", "fp16"], sparse: bool) -> tuple[bytes, Packing]:
    """The weights of a model with `Int8Linear` layers and zeros, as bytes and how to read them; the same every time.

    Args:
        model: as it computes.
        floats: type in which floating-point tensors are stored.
        sparse: leave out the zeros of each tensor where that saves bytes.

    Raises OverflowError naming a tensor that does not fit into `floats`.
    """
    linear = {name: layer.scheme for name, layer in model.named_modules() if isinstance(layer, Int8Linear)}
    stored: dict[str, torch.Tensor] = {}
    thinned: list[str] = []
    for name, value in sorted(model.state_dict().items()):
        kept = value.detach().cpu().contiguous().clone()
        if floats != "fp32" and _narrows(name, kept, linear):
            kept = kept.to(NARROW[floats])
            if not torch.isfinite(kept).all():
                raise OverflowError(f"tensor {name} has values up to {value.abs().max():.3g}, too large for {floats}")
        count = int(torch.count_nonzero(kept))
        if sparse and -(-kept.numel() // 8) + count * kept.element_size() < kept.numel() * kept.element_size():
            thinned.append(name)
            flat = kept.flatten()
            bits = np.packbits((flat != 0).numpy(), bitorder="little")
            stored[f"{name}.mask"], stored[f"{name}.values"] = torch.from_numpy(bits), flat[flat != 0].clone()
        else:
            stored[name] = kept
    weights: bytes = save_tensors(stored)
    return weights, Packing(linear=linear, floats=floats, sparse=thinned)


def load_packed(model: torch.nn.Module, weights: bytes, packing: Mapping[str, Any]) -> None:
    """Fill a freshly built model from the bytes of a compressed version; quantised layers are exchanged in place.

    Raises IntegrityError where the packing is not understood, or names, shapes, types or counts do not fit the model.
    """
    try:
        told = Packing.model_validate(dict(packing))
    except (ValidationError, TypeError, ValueError) as error:
        reason = describe_errors(error, Packing) if isinstance(error, ValidationError) else shown(str(error))
        raise IntegrityError(f"card: compression.weights: {reason}; {_REMEDY}") from error
    try:
        stored = load_tensors(weights)
    except (SafetensorError, ValueError) as error:
        raise IntegrityError(f"weights: not safetensors ({shown(error)}); publish the model again") from error
    _quantise_in_place(model, told)
    state = model.state_dict()
    _check_names(state, stored, told)
    filled = {}
    for name, value in state.items():
        wanted = NARROW[told.floats] if told.floats != "fp32" and _narrows(name, value, told.linear) else value.dtype
        raw = _dense(name, stored, value.shape, wanted) if name in told.sparse else stored[name]
        if raw.dtype != wanted or raw.shape != value.shape:
            raise IntegrityError(
                f"weights: tensor {shown(name)} is {tuple(raw.shape)} {raw.dtype}, expected {tuple(value.shape)} "
                f"{wanted}; {_REMEDY}"
            )
        filled[name] = raw.to(value.dtype)
    model.load_state_dict(filled)


def _narrows(name: str, value: torch.Tensor, linear: Mapping[str, Scheme]) -> bool:
    """Whether a tensor is stored in 16 bits: floats are, but for the scales of int8 weights."""
    layer, _, last = name.rpartition(".")
    return value.is_floating_point() and value.dtype == torch.float32 and not (last == "scale" and layer in linear)


def _quantise_in_place(model: torch.nn.Module, packing: Packing) -> None:
    """Empty int8 layers where the packing says so."""
    layers = linear_layers(model)
    for name, scheme in packing.linear.items():
        plain = layers.get(name)
        if plain is None:
            raise IntegrityError(f"card: compression.weights.linear: the model has no layer {shown(name)}; {_REMEDY}")
        empty = Int8Linear(plain.in_features, plain.out_features, bias=plain.bias is not None, scheme=scheme)
        replace_layer(model, name, empty)


def _check_names(state: Mapping[str, torch.Tensor], stored: Mapping[str, torch.Tensor], packing: Packing) -> None:
    """Each tensor of the model is there, as itself or as mask and values, and nothing else is."""
    sparse = set(packing.sparse)
    expected = {part for name in state for part in ((f"{name}.mask", f"{name}.values") if name in sparse else (name,))}
    wrong = sorted((expected ^ stored.keys()) | (sparse - state.keys()))
    if wrong:
        fault = "missing" if wrong[0] in expected else "not in the model"
        raise IntegrityError(f"weights: tensor {shown(wrong[0])} is {fault} ({len(wrong)} differ); {_REMEDY}")


def _dense(name: str, stored: Mapping[str, torch.Tensor], shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
    """A tensor with its zeros again."""
    mask, values, count = stored[f"{name}.mask"], stored[f"{name}.values"], shape.numel()
    if mask.dtype != torch.uint8 or mask.shape != (-(-count // 8),) or values.dtype != dtype or values.dim() != 1:
        raise IntegrityError(f"weights: mask or values of {shown(name)} do not fit {tuple(shape)} {dtype}; {_REMEDY}")
    bits = np.unpackbits(mask.numpy(), bitorder="little")
    if bits[count:].any() or int(bits[:count].sum()) != len(values):
        raise IntegrityError(
            f"weights: the mask of {shown(name)} has {int(bits.sum())} values of {count}, {len(values)} are stored; "
            f"{_REMEDY}"
        )
    made = torch.zeros(count, dtype=dtype)
    made[torch.from_numpy(bits[:count].astype(bool))] = values
    return made.reshape(shape)
