"""The wait for the gradient exchange: what a rank spends on the others, and nothing that it spends on computing."""

from __future__ import annotations

import time

import torch
from ranks import run_ranks

from lepton_ray.training.collective_time import CollectiveTime

CPU = torch.device("cpu")
LATE_S = 0.5


class Slow(torch.autograd.Function):
    """Passes its input on; its backward computes for a while on rank 1."""

    @staticmethod
    def forward(_: object, inputs: torch.Tensor) -> torch.Tensor:
        return inputs.clone()

    @staticmethod
    def backward(_: object, gradient: torch.Tensor) -> torch.Tensor:
        end = time.perf_counter() + LATE_S
        while torch.distributed.get_rank() == 1 and time.perf_counter() < end:
            gradient.square().sum()
        return gradient


def passes(strategy: str) -> tuple[float, float, float]:
    """Of one backward pass in which rank 1 computes longer: seconds waited, seconds of the pass, a second reading."""
    model: torch.nn.Module = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 8))
    if strategy == "ddp":
        model = torch.nn.parallel.DistributedDataParallel(model)
    else:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        model = fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    collective = CollectiveTime(CPU)
    inputs = torch.randn(4, 8)
    model(inputs).sum().backward()  # the first pass sets things up
    total = Slow.apply(model(inputs)).sum()
    collective.watch(total)
    torch.distributed.barrier()  # so that both passes begin together
    started = time.perf_counter()
    total.backward()
    spent = time.perf_counter() - started
    collective.done()
    return collective.take(), spent, collective.take()


def test_a_rank_waits_for_the_slower_one_and_the_slower_one_does_not() -> None:
    """The slow rank computed for as long as the fast one waited; the bounds leave room for a busy machine."""
    (fast, fast_pass, again), (slow, slow_pass, _) = run_ranks(passes, 2, "ddp")
    assert slow_pass >= LATE_S
    assert 0.5 * LATE_S < fast <= fast_pass
    assert slow < 0.5 * fast
    assert again == 0.0, "what was taken is not counted again"


def test_a_pass_without_an_exchange_waits_for_nothing() -> None:
    """Reported as it is for one process: the computing itself is never counted."""
    collective = CollectiveTime(CPU)
    layer = torch.nn.Linear(256, 256)
    shares = []
    for _ in range(5):  # the least of them: this process may be stopped for a while at any point
        total = layer(torch.randn(4096, 256)).square().sum()
        collective.watch(total)
        started = time.perf_counter()
        total.backward()
        spent = time.perf_counter() - started
        collective.done()
        shares.append(collective.take() / spent)
    assert 0.0 <= min(shares) < 0.2


def test_a_pass_that_was_not_watched_adds_nothing() -> None:
    collective = CollectiveTime(CPU)
    torch.nn.Linear(4, 4)(torch.randn(2, 4)).sum().backward()
    collective.done()
    assert collective.take() == 0.0


def hooked() -> tuple[float, float | None, float | None, list[str]]:
    """The same pass watched from inside, as a loop of one's own is: waited, read as newest, again, what was told."""
    told: list[str] = []
    collective = CollectiveTime(CPU, lambda: told.append("waiting"))
    module = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 8))
    model = torch.nn.parallel.DistributedDataParallel(module)
    model(torch.randn(4, 8)).sum().backward()  # the first pass sets things up
    module.register_full_backward_pre_hook(lambda *_: collective.inside())
    # slow before the first gradient is exchanged
    total = Slow.apply(model(torch.randn(4, 8))).sum()
    torch.distributed.barrier()
    total.backward()
    return collective.take(), collective.newest(), collective.newest(), told


def test_a_pass_is_watched_from_inside_alike() -> None:
    """Without a call before and after `backward`: the wait ends after DDP's own part of the pass."""
    (fast, newest, again, told), (slow, _, _, _) = run_ranks(hooked, 2)
    assert fast > 0.5 * LATE_S
    assert slow < 0.5 * fast
    assert newest == fast
    assert again == 0.0
    assert told == ["waiting"]
