"""Leaving a process group after a failure: nobody is left waiting."""

from __future__ import annotations

import os
import signal

from ranks import exit_codes

RANKS, LOST, LEARNT = 5, 2, 7


def exchange(rank: int, port: int) -> None:
    """Exchange gradients until a rank is lost; exits with LEARNT once told so, while its process lives on."""
    import sys
    import threading

    import torch
    from torch import distributed as dist

    from lepton_ray.training import process_group

    known = process_group._connections()
    store = dist.TCPStore("127.0.0.1", port, is_master=False)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=RANKS)
    opened = {name: fd for name, fd in process_group._connections().items() if name not in known}
    process_group._meeting.connections = opened
    values = torch.zeros(100_000)
    learnt = dist.TCPStore("127.0.0.1", port, is_master=False)
    try:
        for step in range(1_000_000):
            if rank == LOST and step == 20:
                os.kill(os.getpid(), signal.SIGKILL)
            dist.all_reduce(values)
    except RuntimeError:
        process_group.break_off()
        learnt.set(f"rank-{rank}", "")
        everybody = threading.Timer(60, lambda: os._exit(1))  # ends the wait below
        everybody.start()
        learnt.wait([f"rank-{other}" for other in range(RANKS) if other != LOST])  # the process, and its sockets, stay
        everybody.cancel()
        sys.exit(LEARNT)


def test_every_survivor_learns_of_a_lost_rank() -> None:
    """Those that do not exchange with it are told by those that do, though the processes of these stay."""
    assert exit_codes(exchange, RANKS) == [-9 if rank == LOST else LEARNT for rank in range(RANKS)]
