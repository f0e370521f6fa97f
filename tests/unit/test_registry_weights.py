"""Which bytes pass as weights."""

from __future__ import annotations

import json
import struct
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import SafetensorError, deserialize
from safetensors.numpy import save
from safetensors.torch import save as save_torch

from lepton_ray.errors import LeptonError, RefusedError, UsageError
from lepton_ray.registry.weights import check_weights

FLOATS = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2]


def safetensors(header: Any, data: bytes = b"") -> bytes:
    """The bytes of a file with this header, whether it makes sense or not."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def tensor(dtype: str = "F32", shape: object = (1,), offsets: object = (0, 4)) -> dict[str, object]:
    """The declaration of one tensor."""
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


@pytest.mark.parametrize("dtype", [*FLOATS, torch.int64, torch.int8, torch.uint8, torch.bool])
def test_finite_tensors_pass(dtype: torch.dtype):
    """Every number from the smallest to the largest; also no dimension, and no element."""
    values = [torch.ones(3, 2).to(dtype), torch.zeros(()).to(dtype), torch.zeros(0, 4).to(dtype)]
    if dtype.is_floating_point:
        limits = torch.finfo(dtype)
        values.append(torch.tensor([limits.max, limits.min, limits.tiny], dtype=torch.float64).to(dtype))
    entries = check_weights(save_torch({f"layer.{number}": value for number, value in enumerate(values)}))
    assert {entry.name: entry.shape for entry in entries} == {
        f"layer.{n}": tuple(v.shape) for n, v in enumerate(values)
    }


@pytest.mark.parametrize("length", [0x0280, 0x0380, 0x0480, 0x0580, 0x4B50])
def test_header_lengths_that_look_like_pickle_pass(length: int):
    """A sound header may be as long as says the first two bytes of a pickle or a zip; what follows tells them apart."""
    text = json.dumps({"w": tensor()}).encode().ljust(length)
    assert [entry.name for entry in check_weights(safetensors(text, b"\0\0\x80\x3f"))] == ["w"]


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_value_is_found(dtype: torch.dtype, bad: float):
    """The tensor and the place are named. E4M3 has no infinity: torch makes it NaN or its maximum."""
    values = torch.ones(5).to(dtype)
    values[3] = torch.tensor(bad).to(dtype)
    file = save_torch({"fine": torch.ones(2), "layer.weight": values})
    if torch.isfinite(values.float()).all():
        check_weights(file)
        return
    with pytest.raises(UsageError, match=r"'layer\.weight' .* index 3"):
        check_weights(file)


def test_long_tensors_are_searched_to_the_end(monkeypatch: pytest.MonkeyPatch):
    """The search goes in pieces; the place is counted from the beginning."""
    monkeypatch.setattr("lepton_ray.registry.weights._CHUNK", 10)
    values = np.ones(35, np.float32)
    values[34] = np.nan
    with pytest.raises(UsageError, match="index 34"):
        check_weights(save({"w": values}))


@pytest.mark.parametrize("foreign", [b"PK\x03\x04" + bytes(50), b"\x80\x02}q\x00.", b"\x80\x05\x95" + bytes(20)])
def test_pickle_is_refused_by_policy(foreign: bytes):
    """Zip as torch.save makes it, and bare pickles: exit code 4."""
    with pytest.raises(RefusedError, match="pickle"):
        check_weights(foreign)


@pytest.mark.parametrize(
    ("file", "told"),
    [
        (b"", "whole safetensors"),
        (b"\x00" * 8, "whole safetensors"),
        (struct.pack("<Q", 2**62) + b"{}", "whole safetensors"),
        (struct.pack("<Q", 2_000_000) + b" " * 2_000_000, "header of 2000000 bytes"),
        (safetensors(b"{x"), "no JSON object"),
        (safetensors(b"[]"), "no JSON object"),
        (safetensors(b"\xff\xfe"), "no JSON object"),
        (safetensors(b"[" * 100_000), "no JSON object"),
        (safetensors(b'{"a": 1, "a": 2}'), "stands twice"),
        (safetensors({}), "0 tensors"),
        (safetensors({"__metadata__": {"a": "b"}}), "0 tensors"),
        (safetensors({f"t{n}": tensor("U8", [0], [0, 0]) for n in range(10_001)}), "10001 tensors"),
        (safetensors({"../../etc/x": tensor()}, bytes(4)), "tensor name"),
        (safetensors({"": tensor()}, bytes(4)), "tensor name"),
        (safetensors({"x" * 501: tensor()}, bytes(4)), "tensor name"),
        (safetensors({"w\n": tensor()}, bytes(4)), "tensor name"),
        (safetensors({"w": [1, 2]}), "needs dtype"),
        (safetensors({"w": tensor() | {"more": 1}}, bytes(4)), "needs dtype"),
        (safetensors({"w": tensor("F31")}, bytes(4)), "dtype 'F31'"),
        (safetensors({"w": tensor(["F32"])}, bytes(4)), "dtype"),  # type: ignore[arg-type]  # wrong on purpose
        (safetensors({"w": tensor(shape=[-1])}, bytes(4)), "whole numbers"),
        (safetensors({"w": tensor(shape=[1.0])}, bytes(4)), "whole numbers"),
        (safetensors({"w": tensor(shape=[True])}, bytes(4)), "whole numbers"),
        (safetensors({"w": tensor(shape=None)}, bytes(4)), "whole numbers"),
        (safetensors({"w": tensor(offsets=[0])}, bytes(4)), "does not fit"),
        (safetensors({"w": tensor(offsets=[4, 0])}, bytes(4)), "does not fit"),
        (safetensors({"w": tensor(shape=[2**40, 2**40])}, bytes(4)), "does not fit"),
        (safetensors({"w": tensor()}, bytes(3)), "end at byte"),
        (safetensors({"w": tensor()}, bytes(5)), "end at byte"),
        (safetensors({"a": tensor(), "b": tensor()}, bytes(4)), "does not begin"),
        (safetensors({"w": tensor(offsets=[4, 8])}, bytes(8)), "does not begin"),
    ],
)
def test_unsound_files_are_told(file: bytes, told: str):
    with pytest.raises(UsageError, match=told) as caught:
        check_weights(file)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 500


@given(flips=st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)), max_size=4), cut=st.integers(0, 40))
def test_what_passes_the_library_can_read(flips: list[tuple[int, int]], cut: int):
    """Whatever is done to a file: either a LeptonError, or the library reads the same tensors from it."""
    file = bytearray(save({"conv.weight": np.arange(6, dtype=np.float32).reshape(2, 3), "steps": np.array([7])}))
    for place, value in flips:
        file[place % len(file)] = value
    data = bytes(file[: len(file) - cut])
    try:
        entries = check_weights(data)
    except LeptonError:
        return
    try:
        read = deserialize(data)
    except SafetensorError as error:
        pytest.fail(f"the library refuses what passed: {error}")
    found = sorted((name, fields["dtype"], tuple(fields["shape"])) for name, fields in read)
    assert found == sorted((entry.name, entry.dtype, entry.shape) for entry in entries)
