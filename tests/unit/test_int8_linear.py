"""The int8 layer: torchao's numbers bit for bit, row by row, without torchao."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from torch import nn

from lepton_ray.compression.quantisation import quantised_weight
from lepton_ray.tasks import int8_linear
from lepton_ray.tasks.int8_linear import SCHEMES, Int8Linear, Scheme, plain_state, replace_layer

FEATURES = [(5, 3), (432, 96), (2048, 32)]


def rows(features: int) -> torch.Tensor:
    """Seven rows of very different size, one all zero."""
    made = torch.randn(7, features, generator=torch.Generator().manual_seed(1)) * torch.logspace(-3, 2, 7)[:, None]
    made[3] = 0
    return made


def quantised(plain: nn.Linear, scheme: Scheme) -> Int8Linear:
    """Our layer with torchao's values."""
    return Int8Linear.of(plain, *quantised_weight(plain, scheme), scheme)


@pytest.fixture(params=[(*size, scheme) for size in FEATURES for scheme in SCHEMES], ids=str)
def case(request: pytest.FixtureRequest) -> tuple[nn.Linear, Scheme]:
    """A layer and how to quantise it."""
    inputs, outputs, scheme = request.param
    torch.manual_seed(0)
    return nn.Linear(inputs, outputs), scheme


def test_answers_are_those_of_torchao(case: tuple[nn.Linear, Scheme]) -> None:
    """Every bit of the outputs of a layer that `quantize_` changed in place; close to the floats."""
    plain, scheme = case
    logging.getLogger("torch.utils._pytree").setLevel(logging.ERROR)
    from torchao.quantization import (  # noqa: TID251 - compared with
        Int8DynamicActivationInt8WeightConfig,
        Int8WeightOnlyConfig,
        quantize_,
    )

    kinds = {"int8-weight": Int8WeightOnlyConfig, "int8-dynamic": Int8DynamicActivationInt8WeightConfig}
    theirs = nn.Sequential(copy.deepcopy(plain))
    quantize_(theirs, kinds[scheme](set_inductor_config=False))
    inputs = rows(plain.in_features)
    with torch.inference_mode():
        found = quantised(plain, scheme)(inputs)
        assert torch.equal(found, theirs(inputs))
        exact = plain(inputs)
        assert ((found - exact).abs().amax(1) <= 0.03 * exact.abs().amax(1) + 1e-6).all()


def test_int8_instructions_change_no_answer(case: tuple[nn.Linear, Scheme], monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU with them multiplies whole numbers, one without floats that hold the same ones."""
    plain, scheme = case
    layer, inputs = quantised(plain, scheme), rows(plain.in_features)
    found = []
    for there in (False, True):
        monkeypatch.setattr(int8_linear, "int8_instructions", lambda there=there: there)
        with torch.inference_mode():
            found.append(layer(inputs))
    assert torch.allclose(found[0], found[1], rtol=1e-6, atol=0)


def test_a_row_is_answered_alike_in_any_batch(case: tuple[nn.Linear, Scheme]) -> None:
    """Alone or beside rows a thousand times larger: rounding of one row does not depend on another."""
    plain, scheme = case
    layer, inputs = quantised(plain, scheme), rows(plain.in_features)
    with torch.inference_mode():
        together = layer(inputs)
        alone = torch.cat([layer(inputs[index : index + 1]) for index in range(len(inputs))])
    assert ((together - alone).abs().amax(1) <= 1e-5 * together.abs().amax(1)).all()


def test_plain_state_has_the_names_of_the_uncompressed_model() -> None:
    """So that weights of a compressed version can start another model."""
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(8, 4))
    wanted = {name: value.clone() for name, value in model.state_dict().items()}
    replace_layer(model, "2", quantised(model[2], "int8-weight"))
    found = plain_state(model)
    assert found.keys() == wanted.keys()
    for name, value in found.items():
        assert torch.allclose(value, wanted[name], atol=float(wanted[name].abs().max()) / 127)
