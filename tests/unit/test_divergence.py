"""Digests of the weights: equal for equal bits, different for a flipped one."""

from __future__ import annotations

import pytest
import torch

from lepton_ray.training import digests
from lepton_ray.training.digests import digest_of
from lepton_ray.training.divergence import odd_ranks

CPU = torch.device("cpu")
SHAPES = [(), (1,), (3,), (8, 8), (5, 1031), (0, 4), (2, 3, 4), (4099,)]


def some_tensors(dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    """Of many shapes, the same each time."""
    draw = torch.Generator().manual_seed(5)
    return [torch.randn(shape, generator=draw).to(dtype) for shape in SHAPES]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.uint8, torch.bool])
def test_host_and_device_compute_the_same(dtype: torch.dtype) -> None:
    """What runs on a GPU gives the words that numpy gives, whatever the type and the size."""
    for value in some_tensors(dtype):
        data = value.reshape(-1).view(torch.uint8)
        if not len(data):
            continue
        expected = [digests._signed(word) for word in digests._words(data)]
        assert digests._on_device(data).tolist() == expected


def test_any_flipped_bit_is_seen() -> None:
    """Each bit of some words, at the beginning, in the middle and at the end of tensors of all sizes."""
    for index, shape in enumerate(SHAPES):
        tensors = some_tensors()
        value = tensors[index].reshape(-1).view(torch.int32)
        before = digest_of(tensors, CPU).tolist()
        for at in {0, len(value) // 2, len(value) - 1} if len(value) else ():
            for bit in (0, 1, 13, 22, 30, 31):
                changed = [part.clone() for part in tensors]
                flat = changed[index].reshape(-1).view(torch.int32)
                flat[at] ^= torch.tensor(1 << bit if bit < 31 else -(2**31), dtype=torch.int32)
                after = digest_of(changed, CPU).tolist()
                assert after[0] != before[0], (shape, at, bit)
                assert after[1] != before[1], (shape, at, bit)


def test_it_is_of_the_bits_alone() -> None:
    """Copies have the same digest, the sign of zero changes it, and nothing at all has that of nothing."""
    assert torch.equal(digest_of(some_tensors(), CPU), digest_of([value.clone() for value in some_tensors()], CPU))
    zero = torch.zeros(4)
    assert not torch.equal(digest_of([zero], CPU), digest_of([-zero], CPU))
    assert digest_of([], CPU).tolist() == digest_of([torch.empty(0)], CPU).tolist() == [0, 0]
    strided = torch.arange(64.0).reshape(8, 8).t()
    assert torch.equal(digest_of([strided], CPU), digest_of([strided.contiguous()], CPU))


def test_the_odd_rank_is_named_by_majority() -> None:
    """Of three or more the one that differs; of two, and where no two agree, all are suspects."""
    right, wrong, other = (1, 2), (3, 4), (5, 6)
    assert odd_ranks([right, wrong, right]) == [1]
    assert odd_ranks([right, wrong, right, other, right]) == [1, 3]
    assert odd_ranks([right, wrong]) == [0, 1]
    assert odd_ranks([right, right, wrong, wrong]) == [0, 1, 2, 3]
    assert odd_ranks([right, wrong, other]) == [0, 1, 2]
