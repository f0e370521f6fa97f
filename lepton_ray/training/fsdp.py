"""FSDP2: a model whose weights, gradients and optimiser state are cut over the ranks (`torch.distributed.fsdp`).

Each repeated block is gathered when its turn comes and freed after; what is left of the model is one more such unit.
Only a run with `parallel.strategy: fsdp` imports this file.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard


def shard(model: nn.Module, device: torch.device, *, reshard_after_forward: bool) -> nn.Module:
    """Cut a model over all ranks, in place; rank 0's values become everyone's. Its parameters are DTensors after.

    A model on the CPU is moved to `device` block by block.
    """
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:  # what DDP does on its own
            value = tensor.detach().to(device)
            dist.broadcast(value, 0)
            tensor.copy_(value)
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for unit in [*repeated_blocks(model), model]:
        fully_shard(unit, mesh=mesh, reshard_after_forward=reshard_after_forward)
    return model


def reshard(model: nn.Module) -> None:
    """Free what is gathered: the next forward gathers anew from the shards."""
    for unit in _units(model):
        unit.reshard()


def repeated_blocks(model: nn.Module) -> list[nn.Module]:
    """The children of lists and sequences that hold parameters, inner ones first.

    Inside such a block only lists are cut further: a block's own short sequences (linear, activation, linear) are
    gathered with it, since a collective for each layer costs more than it saves.
    """
    return list(dict.fromkeys(_blocks(model, inside=False)))


def _blocks(module: nn.Module, *, inside: bool) -> Iterator[nn.Module]:
    cuts = isinstance(module, nn.ModuleList) or (isinstance(module, nn.Sequential) and not inside)
    for child in module.children():
        yield from _blocks(child, inside=inside or cuts)
        is_container = isinstance(child, nn.ModuleList | nn.ModuleDict)  # has no forward that could gather it
        if cuts and not is_container and next(child.parameters(), None) is not None:
            yield child


def _units(model: nn.Module) -> Iterator[FSDPModule]:
    return (module for module in model.modules() if isinstance(module, FSDPModule))
