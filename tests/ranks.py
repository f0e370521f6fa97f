"""Ranks without Ray: processes that share a gloo group, for tests of what a rank does."""

from __future__ import annotations

import multiprocessing
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any

LIMIT_S = 120.0


def run_ranks(
    function: Callable[..., Any], world_size: int = 2, *arguments: Any, limit_s: float = LIMIT_S
) -> list[Any]:
    """Call `function(*arguments)` in `world_size` fresh processes of one gloo group; what each returned, by rank.

    `function` must be importable (a module-level function of a test file). Fails with the first rank's traceback.
    """
    import torch.distributed as dist

    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    context = multiprocessing.get_context("spawn")
    ends: dict[Connection, int] = {}
    processes = []
    for rank in range(world_size):
        mine, theirs = context.Pipe(duplex=False)
        ends[mine] = rank
        process = context.Process(target=_rank, args=(function, rank, world_size, store.port, theirs, arguments))
        process.start()
        theirs.close()
        processes.append(process)
    results: dict[int, Any] = {}
    failure = None
    deadline = time.monotonic() + limit_s
    try:
        while ends and failure is None:
            left = deadline - time.monotonic()
            ready = wait(list(ends), timeout=max(0.0, left))
            if not ready:
                failure = f"ranks {sorted(ends.values())} gave nothing within {limit_s} s"
            for end in ready:
                rank = ends.pop(end)  # type: ignore[arg-type]
                try:
                    ok, value = end.recv()  # type: ignore[union-attr]
                except EOFError:
                    ok, value = False, "the process ended without a word"
                results[rank] = value
                if not ok:
                    failure = f"rank {rank}: {value}"
    finally:
        for process in processes:
            if failure is not None:
                process.kill()
            process.join(20)
    if failure is not None:
        raise AssertionError(failure)
    return [results[rank] for rank in range(world_size)]


def _rank(
    function: Callable[..., Any], rank: int, world_size: int, port: int, end: Connection, arguments: tuple[Any, ...]
) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", port, is_master=False)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=timedelta(seconds=60))
    try:
        end.send((True, function(*arguments)))
    except BaseException:  # noqa: BLE001 - told to the test in its own words
        end.send((False, traceback.format_exc()))
    finally:
        end.close()
        dist.destroy_process_group()


def exit_codes(function: Callable[..., None], world_size: int, *arguments: Any, limit_s: float = LIMIT_S) -> list[Any]:
    """Call `function(rank, port, *arguments)` in fresh processes, some of which may be killed; their exit codes.

    `port` is that of a store on this machine at which they can meet. One that runs on past the limit is killed (-9).
    """
    import torch.distributed as dist

    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    context = multiprocessing.get_context("spawn")
    group = [context.Process(target=function, args=(rank, store.port, *arguments)) for rank in range(world_size)]
    for process in group:
        process.start()
    deadline = time.monotonic() + limit_s
    for process in group:
        process.join(max(0.0, deadline - time.monotonic()))
    for process in group:
        process.kill()
        process.join()
    return [process.exitcode for process in group]
