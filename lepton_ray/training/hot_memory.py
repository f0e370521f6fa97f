"""The shared memory that hot copies lie in: buffers like a state, what is said of them, and digests."""

from __future__ import annotations

import contextlib
import json
import math
import mmap
import os
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lepton_ray.training.state import StateCopy

ABANDONED_S = 6 * 3600.0
"""Age at which the copies of a run that never came back are removed by the next run on the node."""
_ALIGN = 64


@dataclass
class Buffer:
    """One of a rank's buffers."""

    memory: mmap.mmap
    copy: StateCopy
    said: Path
    """The small file that says what the buffer holds."""
    tensors: str
    """Names, types and shapes of what lies in the memory, as JSON."""


def make_buffer(path: Path, size: int, first: StateCopy) -> Buffer:
    """A buffer for copies like `first`; its memory is taken now, since writing to memory that is not there kills."""
    memory = make_memory(path, size)
    return Buffer(memory, _placed(memory, first), Path(f"{path}.json"), _described(first))


def make_memory(path: Path, size: int) -> mmap.mmap:
    """Memory of at least one byte under a name that outlives this process."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    try:
        os.posix_fallocate(descriptor, 0, max(size, 1))
        return mmap.mmap(descriptor, max(size, 1))
    finally:
        os.close(descriptor)


def remove_abandoned(folder: Path) -> None:
    """Remove the folders beside this one that no run has touched for `ABANDONED_S`."""
    for beside in folder.parent.iterdir():
        with contextlib.suppress(OSError):
            newest = max([entry.stat().st_mtime for entry in beside.iterdir()], default=beside.stat().st_mtime)
            if beside != folder and time.time() - newest > ABANDONED_S:
                shutil.rmtree(beside)


def digest_of(data: bytes | mmap.mmap) -> list[int]:
    """Sum and exclusive or of the 64-bit words: finds flipped bits at the speed of memory, a tenth of CRC-32's time."""
    words = np.frombuffer(data, np.uint64, count=len(data) // 8)
    return [int(np.add.reduce(words)), int(np.bitwise_xor.reduce(words))]


def _aligned(value: torch.Tensor) -> int:
    return -(-value.numel() * value.element_size() // _ALIGN) * _ALIGN


def size_of(copy: StateCopy) -> int:
    """Bytes that a buffer for such a copy has."""
    size = sum(_aligned(value) for tensors in copy.tensors.values() for value in tensors.values())
    return size + sum(_aligned(value) for value in copy.memory.values())


def _views(memory: mmap.mmap, shapes: Mapping[str, Mapping[str, torch.Tensor]]) -> dict[str, dict[str, torch.Tensor]]:
    """Tensors of these shapes that lie one after the other in the memory."""
    views: dict[str, dict[str, torch.Tensor]] = {}
    at = 0
    for kind, tensors in shapes.items():
        for name, like in tensors.items():
            count = like.numel()
            flat = torch.frombuffer(memory, dtype=like.dtype, count=count, offset=at) if count else torch.empty(0)
            views.setdefault(kind, {})[name] = flat.to(like.dtype).reshape(like.shape)
            at += _aligned(like)
    return views


def _placed(memory: mmap.mmap, first: StateCopy) -> StateCopy:
    """A copy of that form whose tensors lie in the memory."""
    views = _views(memory, {**first.tensors, "memory": first.memory})
    return StateCopy({kind: views.get(kind, {}) for kind in first.tensors}, views.get("memory", {}), None, first.rank)


def _described(copy: StateCopy) -> str:
    """Type and shape of each tensor, in the order of the memory, as JSON."""
    kinds = {**copy.tensors, "memory": copy.memory}
    return json.dumps({
        kind: {name: [str(value.dtype).removeprefix("torch."), list(value.shape)] for name, value in tensors.items()}
        for kind, tensors in kinds.items()
    })  # fmt: skip


def loaded(one: Mapping[str, Any]) -> StateCopy:
    """The copy that a buffer holds."""
    data = bytearray(Path(one["path"]).read_bytes())
    kinds: dict[str, dict[str, torch.Tensor]] = {}
    at = 0
    for kind, tensors in one["tensors"].items():
        kinds[kind] = {}
        for name, (dtype, shape) in tensors.items():
            like = torch.empty(shape, dtype=getattr(torch, dtype), device="meta")
            count = math.prod(shape)
            flat = torch.frombuffer(data, dtype=like.dtype, count=count, offset=at) if count else torch.empty(0)
            kinds[kind][name] = flat.to(like.dtype).reshape(shape)
            at += _aligned(like)
    memory = kinds.pop("memory", {})
    return StateCopy(kinds, memory, one["layout"], one["rank"])
