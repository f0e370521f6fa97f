"""The few collectives the loop needs beside DDP's own: sums of figures, and bytes from one rank to all or back.

Without a group they run among all ranks; a thread beside the loop needs a group of its own, since collectives of one
group must come in the same order on every rank.
"""

from __future__ import annotations

import torch
import torch.distributed as dist


def sum_over_ranks(values: torch.Tensor, group: dist.ProcessGroup | None = None) -> torch.Tensor:
    """The element-wise sum over all ranks, on every rank; `values` is changed in place."""
    dist.all_reduce(values, group=group)
    return values


def all_say(mine: bool, device: torch.device) -> bool:
    """Whether all ranks say yes, on every rank."""
    said = torch.tensor([int(mine)], dtype=torch.int64, device=device)
    dist.all_reduce(said, op=dist.ReduceOp.MIN)
    return bool(said)


def broadcast_bytes(data: bytes | None, device: torch.device, group: dist.ProcessGroup | None = None) -> bytes:
    """The bytes of rank 0 on every rank; other ranks pass None."""
    length = torch.tensor([len(data or b"")], dtype=torch.int64, device=device)
    dist.broadcast(length, 0, group=group)
    if data:
        content = torch.frombuffer(bytearray(data), dtype=torch.uint8).to(device)
    else:
        content = torch.empty(int(length), dtype=torch.uint8, device=device)
    if int(length):
        dist.broadcast(content, 0, group=group)
    return bytes(content.cpu().numpy().tobytes())


def gather_bytes(data: bytes, device: torch.device, group: dist.ProcessGroup | None = None) -> list[bytes]:
    """The bytes of every rank, by rank, on every rank."""
    sizes = torch.zeros(dist.get_world_size(group), dtype=torch.int64, device=device)
    sizes[dist.get_rank(group)] = len(data)
    sum_over_ranks(sizes, group)
    longest = int(sizes.max())
    if longest == 0:
        return [b""] * len(sizes)
    padded = torch.zeros(longest, dtype=torch.uint8, device=device)
    if data:
        padded[: len(data)] = torch.frombuffer(bytearray(data), dtype=torch.uint8).to(device)
    received = [torch.empty_like(padded) for _ in range(len(sizes))]
    dist.all_gather(received, padded, group=group)
    return [
        bytes(part[: int(size)].cpu().numpy().tobytes()) for part, size in zip(received, sizes.tolist(), strict=True)
    ]
