"""Digests of what is the same on every rank with DDP: parameters, the optimiser's moments, a moving average.

Buffers are not (batch normalisation counts what its own rank saw).
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch

_WORD = 8
"""Bytes that are taken together."""
_FOLD = 1024
"""Words that an exclusive or is folded to while it runs over a tensor on a GPU."""


def digest_of(tensors: Iterable[torch.Tensor], device: torch.device) -> torch.Tensor:
    """Sum (modulo 2**64) and exclusive or of the tensors' bytes as 64-bit words: shape `[2]`, int64, on `device`.

    Any flipped bit changes both. Tensors on the CPU are read by numpy, at the speed of memory; others where they are,
    without a word between host and device.
    """
    total = torch.zeros(2, dtype=torch.int64, device=device)
    sum_, xor = 0, 0
    for value in tensors:
        if not value.numel():
            continue
        data = value.detach().reshape(-1).view(torch.uint8)
        if value.device.type == "cpu":
            one = _words(data)
            sum_, xor = (sum_ + one[0]) % 2**64, xor ^ one[1]
        else:
            total = _joined(total, _on_device(data))
    if sum_ or xor:
        total = _joined(total, torch.tensor([_signed(sum_), _signed(xor)], dtype=torch.int64, device=device))
    return total


def _words(data: torch.Tensor) -> tuple[int, int]:
    """Sum and exclusive or of bytes on the CPU as unsigned 64-bit words; the last one is filled up with zeros."""
    content = data.numpy()
    whole = len(content) // _WORD * _WORD
    rest = int.from_bytes(content[whole:].tobytes(), "little")
    if not whole:  # an optimiser's count of steps
        return rest, rest
    words = content[:whole].view(np.uint64)
    return (int(np.add.reduce(words)) + rest) % 2**64, int(np.bitwise_xor.reduce(words)) ^ rest


def _on_device(data: torch.Tensor) -> torch.Tensor:
    """The same where the bytes are."""
    missing = -len(data) % _WORD
    if missing or data.storage_offset() % _WORD:  # only bytes that lie on a word's border can be seen as words
        data = torch.cat([data, data.new_zeros(missing)])
    words = data.view(torch.int64)
    rows = len(words) // _FOLD
    folded = torch.zeros(_FOLD, dtype=torch.int64, device=data.device)
    block = words[: rows * _FOLD].view(rows, _FOLD)
    while len(block):
        if len(block) % 2:
            folded ^= block[-1]
        half = len(block) // 2
        block = block[:half] ^ block[half : 2 * half]
    rest = words[rows * _FOLD :]
    folded[: len(rest)] ^= rest
    while len(folded) > 1:
        folded = folded[: len(folded) // 2] ^ folded[len(folded) // 2 :]
    return torch.stack([words.sum(), folded[0]])


def _joined(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    return torch.stack([left[0] + right[0], left[1] ^ right[1]])


def _signed(word: int) -> int:
    return word - 2**64 if word >= 2**63 else word
