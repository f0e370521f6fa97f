"""Which weights may be published: safetensors with a modest header, plain names, sound offsets, finite values.

The format is 8 bytes of header length, a JSON header, and the tensors' bytes without gaps
(https://huggingface.co/docs/safetensors, "Format"). It is read here and not by the library because the limits must
hold before anything is allocated, and because numpy has no bfloat16.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from lepton_ray.errors import RefusedError, UsageError, shown

MAX_HEADER_BYTES = 1_000_000
MAX_TENSORS = 10_000
MAX_NAME = 500
NAME_PATTERN = r"[A-Za-z0-9_.-]+"
ITEM_BYTES = (
    {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1}
    | {"I64": 8, "I32": 4, "I16": 2, "I8": 1}
    | {"U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1}
)
_FLOATS = {"F64": "<f8", "F32": "<f4", "F16": "<f2"}
# numpy does not know these: NaN and infinity are told by their exponent bits (and for E4M3, which has no infinity,
# NaN by all bits but the sign; Micikevicius et al. 2022, "FP8 Formats for Deep Learning", table 1)
_BIT_FLOATS = {"BF16": ("<u2", 0x7F80), "F8_E4M3": ("<u1", 0x7F), "F8_E5M2": ("<u1", 0x7C)}
_CHUNK = 4_194_304
"""Values looked at in one go: bounds the memory of the look."""


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of a header."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int
    """Offsets into the bytes after the header."""


def check_weights(weights: bytes) -> list[TensorEntry]:
    """The tensors of safetensors bytes that may be published, in the order of their bytes.

    Raises RefusedError for what looks like pickle or a zip of it, UsageError for anything else that is wrong, naming
    the tensor.
    """
    entries, begin = read_header(weights)
    data = memoryview(weights)[begin:]
    for entry in entries:
        bad = _first_non_finite(entry, data[entry.start : entry.end])
        if bad is not None:
            raise UsageError(
                f"weights: tensor {shown(entry.name)} holds a value that is not finite at flat index {bad}; "
                "the training diverged: publish an earlier checkpoint"
            )
    return entries


def read_header(weights: bytes) -> tuple[list[TensorEntry], int]:
    """The tensors that the header declares, checked against each other and the length, and where their bytes begin."""
    # a safetensors header of 1,152 bytes begins with the two bytes of a pickle too; its JSON tells the two apart
    if weights[8:9] != b"{" and weights[:2] in (b"PK", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05"):
        raise RefusedError("weights: look like pickle or torch.save, which can run code; save them as safetensors")
    length = int.from_bytes(weights[:8], "little")
    if len(weights) < 8 or 8 + length > len(weights) or length < 2:
        raise UsageError(f"weights: {len(weights)} bytes are no whole safetensors file; save them as safetensors")
    if length > MAX_HEADER_BYTES:
        raise UsageError(f"weights: a header of {length} bytes; expected at most {MAX_HEADER_BYTES}")
    try:
        header = json.loads(weights[8 : 8 + length].decode(), object_pairs_hook=_no_twins)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"weights: the header is no JSON object ({shown(str(error))}); save them anew") from error
    if not isinstance(header, dict):
        raise UsageError("weights: the header is no JSON object; save them anew")
    header.pop("__metadata__", None)
    if not 0 < len(header) <= MAX_TENSORS:
        raise UsageError(f"weights: {len(header)} tensors; expected 1 to {MAX_TENSORS}")
    entries = sorted((_entry(name, fields) for name, fields in header.items()), key=lambda e: (e.start, e.end))
    position = 0
    for entry in entries:
        if entry.start != position:
            raise UsageError(f"weights: tensor {shown(entry.name)} does not begin where the one before it ends")
        position = entry.end
    if 8 + length + position != len(weights):
        raise UsageError(f"weights: the tensors end at byte {8 + length + position} of {len(weights)}; save them anew")
    return entries, 8 + length


def _no_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        raise ValueError("a name stands twice")
    return made


def _entry(name: str, fields: Any) -> TensorEntry:
    """One tensor's declaration, checked on its own."""
    if not re.fullmatch(NAME_PATTERN, name) or len(name) > MAX_NAME:
        raise UsageError(f"weights: tensor name {shown(name)} must match {NAME_PATTERN}, at most {MAX_NAME} characters")
    if not isinstance(fields, dict) or set(fields) != {"dtype", "shape", "data_offsets"}:
        raise UsageError(f"weights: tensor {shown(name)} needs dtype, shape and data_offsets")
    dtype, shape, offsets = fields["dtype"], fields["shape"], fields["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        raise UsageError(f"weights: tensor {shown(name)} has dtype {shown(dtype)}; expected {', '.join(ITEM_BYTES)}")
    for numbers in (shape, offsets):
        if not isinstance(numbers, list) or not all(type(n) is int and 0 <= n < 2**63 for n in numbers):
            raise UsageError(f"weights: tensor {shown(name)} has {shown(numbers)} where whole numbers are expected")
    if len(offsets) != 2 or offsets[1] - offsets[0] != math.prod(shape) * ITEM_BYTES[dtype]:
        raise UsageError(f"weights: tensor {shown(name)} of {dtype} {shown(shape)} does not fit bytes {shown(offsets)}")
    return TensorEntry(name, dtype, tuple(shape), offsets[0], offsets[1])


def _first_non_finite(entry: TensorEntry, data: memoryview) -> int | None:
    """Flat index of the first NaN or infinity of a tensor, if there is one."""
    stride = _CHUNK * ITEM_BYTES[entry.dtype]
    for start in range(0, len(data), stride):
        chunk = data[start : start + stride]
        bad: npt.NDArray[np.bool_]
        if entry.dtype in _FLOATS:
            bad = ~np.isfinite(np.frombuffer(chunk, _FLOATS[entry.dtype]))
        elif entry.dtype in _BIT_FLOATS:
            kind, mask = _BIT_FLOATS[entry.dtype]
            bad = (np.frombuffer(chunk, kind) & mask) == mask
        else:
            return None
        if bad.any():
            return start // ITEM_BYTES[entry.dtype] + int(bad.argmax())
    return None
