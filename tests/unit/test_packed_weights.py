"""Compressed weights as bytes: back again bit for bit, the same bytes every time, and no damage unnoticed."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any, Literal

import pytest
import torch
from safetensors.torch import load, save
from torch import nn

from lepton_ray.errors import IntegrityError
from lepton_ray.registry.weights import check_weights
from lepton_ray.tasks.int8_linear import Int8Linear, Scheme, replace_layer
from lepton_ray.tasks.packed_weights import load_packed, pack

Floats = Literal["fp32", "bf16", "fp16"]
FORMS = list(itertools.product([None, "int8-weight", "int8-dynamic"], ["fp32", "bf16", "fp16"], [False, True]))


def model(seed: int = 0) -> nn.Sequential:
    """Convolution, norm with whole-number and float buffers, and two linear layers of which one has no bias."""
    torch.manual_seed(seed)
    made = nn.Sequential(
        nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(12, 7, bias=False), nn.Linear(7, 2)
    )
    return made.eval()


def compressed(scheme: Scheme | None, *, sparse: bool) -> nn.Sequential:
    """The same with int8 layers and, where asked for, zeros."""
    made = model()
    if sparse:
        with torch.no_grad():
            made[3].weight[1:] = 0
            made[0].weight[0] = 0
    if scheme:
        for name in ("3", "4"):
            plain = made.get_submodule(name)
            assert isinstance(plain, nn.Linear)
            scale = plain.weight.detach().abs().amax(1, keepdim=True).clamp_min(1e-6) / 127
            weight = torch.round(plain.weight.detach() / scale).to(torch.int8)
            replace_layer(made, name, Int8Linear.of(plain, weight, scale, scheme))
    return made


@pytest.mark.parametrize(("scheme", "floats", "sparse"), FORMS)
def test_what_was_packed_comes_back(scheme: Scheme | None, floats: Floats, sparse: bool) -> None:
    """Into a freshly built model: int8 and zeros exactly, floats as their narrow type holds them; publishable bytes."""
    source = compressed(scheme, sparse=sparse)
    weights, packing = pack(source, floats=floats, sparse=sparse)
    check_weights(weights)
    target = model(seed=1)
    load_packed(target, weights, packing.model_dump())
    narrow = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[floats]
    for name, value in source.state_dict().items():
        exact = not value.is_floating_point() or name.endswith(".scale")
        wanted = value if exact else value.to(narrow).to(value.dtype)
        assert torch.equal(target.state_dict()[name], wanted), name
    assert bool(packing.sparse) == sparse
    images = torch.randn(2, 1, 4, 4)
    with torch.inference_mode():
        assert torch.allclose(target(images), source(images), atol=0.05)


def test_the_same_model_gives_the_same_bytes() -> None:
    """Publishing twice gives the same digest."""
    first, second = (pack(compressed("int8-weight", sparse=True), floats="bf16", sparse=True) for _ in range(2))
    assert first == second


def test_bytes_shrink_as_they_should() -> None:
    """Bytes of the tensors: int8 one per weight, bf16 two per value, sparse a bit per value and what is not zero."""
    sizes = {}
    for scheme, floats, sparse in FORMS:
        tensors = load(pack(compressed(scheme, sparse=sparse), floats=floats, sparse=sparse)[0])
        sizes[scheme, floats, sparse] = sum(value.numel() * value.element_size() for value in tensors.values())
    # 27 + 3 of the convolution, 4 x 3 of the norm and its counter, 84, 14 + 2
    assert sizes[None, "fp32", False] == (27 + 3 + 12 + 84 + 14 + 2) * 4 + 8
    assert sizes[None, "bf16", False] == (27 + 3 + 12 + 84 + 14 + 2) * 2 + 8
    assert sizes["int8-weight", "fp32", False] == (27 + 3 + 12 + 2) * 4 + 8 + (84 + 14) + (7 + 2) * 4
    # norm: bias and mean are zero in a new model; counter is a zero of 8 bytes
    assert sizes[None, "fp32", True] == (18 * 4 + 4) + 3 * 4 + (3 * 4 * 2 + 1 + 1) + 1 + (12 * 4 + 11) + (14 + 2) * 4


def test_a_value_too_large_for_fp16_is_named() -> None:
    """It would be stored as infinity."""
    made = model()
    with torch.no_grad():
        made[4].weight[0, 0] = 1e5
    with pytest.raises(OverflowError, match=r"4.weight has values up to 1e\+05, too large for fp16"):
        pack(made, floats="fp16", sparse=False)


def _without(tensors: dict[str, torch.Tensor], name: str) -> dict[str, torch.Tensor]:
    return {key: value for key, value in tensors.items() if key != name}


Change = Callable[[dict[str, torch.Tensor], dict[str, Any]], tuple[dict[str, torch.Tensor], dict[str, Any]]]
DAMAGE: dict[str, Change] = {
    "'3.scale' is missing": lambda t, p: (_without(t, "3.scale"), p),
    "'more' is not in the model": lambda t, p: ({**t, "more": torch.ones(1)}, p),
    "the mask of '3.int8' has 12 values of 84, 11 are stored": lambda t, p: (
        {**t, "3.int8.values": t["3.int8.values"][1:]},
        p,
    ),
    "mask or values of '3.int8' do not fit": lambda t, p: ({**t, "3.int8.mask": t["3.int8.mask"][1:]}, p),
    "'4.int8' is .* expected .* torch.int8": lambda t, p: ({**t, "4.int8": t["4.int8"].float()}, p),
    "'4.bias' is .* expected .* torch.bfloat16": lambda t, p: ({**t, "4.bias": t["4.bias"].float()}, p),
    "no layer '0'": lambda t, p: (t, {**p, "linear": {**p["linear"], "0": "int8-weight"}}),
    "linear.3 is 'int2'": lambda t, p: (t, {**p, "linear": {**p["linear"], "3": "int2"}}),
    "format is 2": lambda t, p: (t, {**p, "format": 2}),
    "code: unknown key": lambda t, p: (t, {**p, "code": "import os"}),
}


@pytest.mark.parametrize("words", DAMAGE)
def test_damage_is_told(words: str) -> None:
    """By the name of the tensor or entry; the model is not used."""
    weights, packing = pack(compressed("int8-weight", sparse=True), floats="bf16", sparse=True)
    tensors, told = DAMAGE[words](load(weights), packing.model_dump())
    with pytest.raises(IntegrityError, match=words):
        load_packed(model(), save(tensors), told)


def test_bytes_that_are_no_safetensors_are_told() -> None:
    """And a packing that is no mapping."""
    _, packing = pack(model(), floats="bf16", sparse=False)
    with pytest.raises(IntegrityError, match="not safetensors"):
        load_packed(model(), b"\x80\x04 pickle", packing.model_dump())
    with pytest.raises(IntegrityError, match=r"card: compression\.weights"):
        load_packed(model(), b"", "int8")  # type: ignore[arg-type]
