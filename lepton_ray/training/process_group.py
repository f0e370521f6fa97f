"""The ranks' process group, made by the ranks themselves.

Ray Train's own torch backend would import torch in the driver and in the controller too: 0.4 GB and some seconds each
for processes that compute nothing, and it waits for dead ranks when a group is torn down.
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ray.train.backend import Backend, BackendConfig

if TYPE_CHECKING:
    import torch

TIMEOUT = timedelta(seconds=300)
"""A collective that takes longer has lost a rank."""
_LOST = ("gloo", "Connection closed by", "Connection reset by", "Broken pipe", "Failed to recv", "failed to connect")
"""What torch says where a peer is gone."""


class _RanksJoinThemselves(Backend):  # type: ignore[misc] # Ray is untyped here
    """Tells the ranks where to meet, and lets those of one node see each other's GPUs, which NCCL needs."""

    share_cuda_visible_devices = True

    def on_start(self, worker_group: Any, backend_config: BackendConfig) -> None:
        """Called in the controller once the ranks' processes are there: two short calls, none of them needs torch."""
        address, port = worker_group.execute_single(0, listen)
        worker_group.execute(meet_at, address, port)


class RankGroup(BackendConfig):  # type: ignore[misc] # Ray is untyped here
    """Tells Ray Train that the ranks join their process group themselves."""

    @property
    def backend_cls(self) -> type[Backend]:
        """What Ray Train calls around a worker group."""
        return _RanksJoinThemselves


@dataclass
class _Meeting:
    """Where the ranks of this process's worker group meet."""

    address: str = ""
    port: int = 0
    socket: socket.socket | None = None
    """Rank 0 listens on it from the moment the port is known: no other process can take it."""
    connections: dict[str, int] = field(default_factory=dict)
    """What the process group opened on a CPU: sockets by name, with their file descriptors."""


_meeting = _Meeting()


def listen() -> tuple[str, int]:
    """Rank 0: open the port at which the ranks meet; returns this node's address and the port."""
    import ray

    address: str = ray.util.get_node_ip_address()
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    _meeting.socket = socket.create_server((address, 0), family=family, backlog=2048)
    return address, _meeting.socket.getsockname()[1]


def meet_at(address: str, port: int) -> None:
    """Every rank: keep in mind where the ranks meet."""
    _meeting.address, _meeting.port = address, port


def join(*, gpu: bool) -> torch.device:
    """Join the process group of this worker group (NCCL on GPUs, gloo on CPUs); returns this rank's device.

    The ranks meet at a store that rank 0 holds. Blocks until all ranks are there.
    """
    import torch
    import torch.distributed as dist
    from ray.train import get_context

    context: Any = get_context()
    rank, world_size = context.get_world_rank(), context.get_world_size()
    os.environ.update(
        RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_RANK=str(context.get_local_rank()),
        LOCAL_WORLD_SIZE=str(context.get_local_world_size()),
    )
    store = dist.TCPStore(  # type: ignore[attr-defined] # torch re-exports it without saying so
        _meeting.address, _meeting.port, is_master=rank == 0, wait_for_workers=False, timeout=TIMEOUT,
        master_listen_fd=_meeting.socket.detach() if rank == 0 and _meeting.socket else None,
    )  # fmt: skip
    device = torch.device("cpu")
    if gpu:
        from ray.train.torch import get_device

        device = torch.device(get_device())
        torch.cuda.set_device(device)
    _meeting.connections = {}
    with connections_noted():
        dist.init_process_group(
            "nccl" if gpu else "gloo", store=store, rank=rank, world_size=world_size, timeout=TIMEOUT,
            device_id=device if gpu else None,
        )  # fmt: skip
    if gpu:  # NCCL's connections are its own
        _meeting.connections = {}
    return device


@contextlib.contextmanager
def connections_noted() -> Iterator[None]:
    """Note the connections that are opened in the block: those of a process group, which `break_off` closes."""
    others = _connections()
    yield
    _meeting.connections |= {name: fd for name, fd in _connections().items() if name not in others}


def lost_peer(error: BaseException) -> bool:
    """Whether a rank failed for no other reason than that another one was gone."""
    words = str(error)
    return isinstance(error, RuntimeError | OSError) and any(part in words for part in _LOST)


def leave() -> None:
    """Leave the process group at the end of the run."""
    import torch.distributed as dist

    if dist.is_initialized():
        dist.destroy_process_group()


def break_off() -> None:
    """Leave the process group after a failure: close its connections, so that who waits for this rank learns of it.

    torch closes them when the last object that uses the group is gone, which the error itself keeps alive. Ranks that
    have no connection to the lost one in their collective would wait for those that have, and these have left.
    """
    for name, descriptor in _meeting.connections.items():
        if _name(descriptor) == name:
            with contextlib.suppress(OSError), socket.socket(fileno=os.dup(descriptor)) as connection:
                if not connection.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):  # gloo aborts without its own
                    connection.shutdown(socket.SHUT_RDWR)
    _meeting.connections = {}
    leave()


def _connections() -> dict[str, int]:
    """The TCP sockets of this process by the kernel's name for them."""
    found = {}
    for entry in Path("/proc/self/fd").iterdir():
        descriptor = int(entry.name)
        name = _name(descriptor)
        if name.startswith("socket:"):
            with contextlib.suppress(OSError), socket.socket(fileno=os.dup(descriptor)) as one:
                if one.family in (socket.AF_INET, socket.AF_INET6) and one.type == socket.SOCK_STREAM:
                    found[name] = descriptor
    return found


def _name(descriptor: int) -> str:
    try:
        return str(Path(f"/proc/self/fd/{descriptor}").readlink())
    except OSError:  # closed meanwhile
        return ""
