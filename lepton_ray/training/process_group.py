"""The ranks' process group, made by the ranks themselves.

Ray Train's own torch backend would import torch in the driver and in the controller too: 0.4 GB and some seconds each
for processes that compute nothing, and it waits for dead ranks when a group is torn down.
"""

from __future__ import annotations

import os
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from ray.train.backend import Backend, BackendConfig

if TYPE_CHECKING:
    import torch

TIMEOUT = timedelta(seconds=300)
"""A collective that takes longer has lost a rank."""


class _RanksJoinThemselves(Backend):  # type: ignore[misc] # Ray is untyped here
    """Ray Train does nothing but let ranks of one node see each other's GPUs, which NCCL needs."""

    share_cuda_visible_devices = True


class RankGroup(BackendConfig):  # type: ignore[misc] # Ray is untyped here
    """Tells Ray Train that the ranks join their process group themselves."""

    @property
    def backend_cls(self) -> type[Backend]:
        """What Ray Train calls around a worker group."""
        return _RanksJoinThemselves


def join(*, gpu: bool) -> torch.device:
    """Join the process group of this worker group (NCCL on GPUs, gloo on CPUs); returns this rank's device.

    Rank 0 listens on a free port and tells it to the others through Ray. Blocks until all ranks are there.
    """
    import ray
    import torch
    import torch.distributed as dist
    from ray.train import get_context
    from ray.train.collective import broadcast_from_rank_zero

    context: Any = get_context()
    rank, world_size = context.get_world_rank(), context.get_world_size()
    os.environ.update(
        RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_RANK=str(context.get_local_rank()),
        LOCAL_WORLD_SIZE=str(context.get_local_world_size()),
    )
    store = None
    if rank == 0:
        address = ray.util.get_node_ip_address()
        store = dist.TCPStore(  # type: ignore[attr-defined] # torch re-exports it without saying so
            address, 0, is_master=True, wait_for_workers=False, timeout=TIMEOUT
        )
        broadcast_from_rank_zero({"address": address, "port": store.port})
    else:
        there = broadcast_from_rank_zero(None)
        store = dist.TCPStore(  # type: ignore[attr-defined] # torch re-exports it without saying so
            there["address"], there["port"], is_master=False, timeout=TIMEOUT
        )
    device = torch.device("cpu")
    if gpu:
        from ray.train.torch import get_device

        device = torch.device(get_device())
        torch.cuda.set_device(device)
    dist.init_process_group(
        "nccl" if gpu else "gloo", store=store, rank=rank, world_size=world_size, timeout=TIMEOUT,
        device_id=device if gpu else None,
    )  # fmt: skip
    return device
