"""How a model is spread over the ranks: DDP (a whole model each) or FSDP2 (a shard each), behind one interface.

In both, the gradients that the optimiser sees are the mean over the ranks, and a start at the same step with the same
state computes the same bits: the layout of DDP's buckets is settled before the first step (see `_settle_buckets`).
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.nn.parallel import DistributedDataParallel

from lepton_ray.settings.training import ParallelSettings
from lepton_ray.training.powersgd import PowerSgd

_log = logging.getLogger(__name__)

DDP_BUCKET_MB = 25.0
"""DDP's default bucket."""

Hook = Callable[[Any, Any], torch.futures.Future[torch.Tensor]]
"""A DDP communication hook: of its state and a bucket (`dist.GradBucket`) the future of the mean over the ranks."""
Around = Callable[[Hook], Hook]
"""Puts something (a clock) around a hook."""


class Parallel:
    """A model on all ranks. Make it with `wrap`; the optimiser comes after, over `module`'s parameters."""

    model: nn.Module
    """What is called forward in a training step."""
    module: nn.Module
    """The bare model: its names are those of the task's model, its parameters those the optimiser moves."""

    def __init__(
        self, model: nn.Module, settings: ParallelSettings, device: torch.device, around: Around | None
    ) -> None:
        self.settings, self.device = settings, device
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self._around = around
        self._powersgd: PowerSgd | None = None
        if settings.strategy == "fsdp":
            from lepton_ray.training import fsdp  # half a second to import, spared to all other runs

            self.module = self.model = fsdp.shard(model, device, reshard_after_forward=settings.reshard_after_forward)
        else:
            self.module = model.to(device)
            self._wrap_ddp()

    @property
    def sharded(self) -> bool:
        """Whether each rank holds a part of the model only."""
        return self.settings.strategy == "fsdp"

    @property
    def all_write(self) -> bool:
        """Whether every rank holds a part of the run's state that no other has, so that every rank writes."""
        return self.sharded or self._powersgd is not None

    def accumulating(self, *, last: bool) -> AbstractContextManager[None]:
        """Around forward and backward of one part of a global batch: gradients travel with the last part only."""
        if self.sharded:
            cast("Any", self.module).set_requires_gradient_sync(last)  # fully_shard made it an FSDPModule
            return contextlib.nullcontext()
        if last or not isinstance(self.model, DistributedDataParallel):
            return contextlib.nullcontext()
        unsynchronised: AbstractContextManager[None] = self.model.no_sync()
        return unsynchronised

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[nn.Module]:
        """The bare model in evaluation mode; back in training mode after.

        With `fsdp`, a forward is a collective: run it under `torch.no_grad` (not `inference_mode`, whose tensors the
        gathered weights would become) and equally often on each rank: see `rounds`.
        """
        self._reshard()
        self.module.eval()
        try:
            yield self.module
        finally:
            self._reshard()  # weights that stay gathered would outlive a change of the shards (an average swapped out)
            self.module.train()

    def rounds(self, mine: int) -> int:
        """How often this rank must call forward while evaluating, having `mine` batches of its own.

        With `fsdp` the most of any rank: the others call it with any batch and drop the outcome. A collective there.
        """
        if not self.sharded:
            return mine
        most = torch.tensor([mine], device=self.device)
        dist.all_reduce(most, op=dist.ReduceOp.MAX)
        return int(most)

    def learning_changed(self) -> None:
        """Take note that other parameters than before require gradients; `model` may be another object after it.

        FSDP2 looks at each gather which ones do; DDP is wrapped anew, and PowerSGD begins afresh.
        """
        if self.sharded:
            self._reshard()
        else:
            self._wrap_ddp()

    def step_skipped(self) -> None:
        """All ranks skipped a step whose gradients were not finite: forget what compression remembers of it."""
        if self._powersgd is not None:
            self._powersgd.forget()

    def memory(self) -> dict[str, torch.Tensor]:
        """What this rank alone remembers (PowerSGD's errors and factors); empty without such a thing."""
        return {} if self._powersgd is None else self._powersgd.memory()

    def load_memory(self, memory: dict[str, torch.Tensor] | None) -> None:
        """Go on from what `memory` gave; None (it was written by another number of ranks) starts afresh, warned."""
        if self._powersgd is None:
            return
        if memory is None or not self._powersgd.load(memory):
            _log.warning("PowerSGD's memory is of another number of ranks: dropped, its errors are not fed back")

    def _reshard(self) -> None:
        if self.sharded:
            from lepton_ray.training import fsdp

            fsdp.reshard(self.module)

    def _wrap_ddp(self) -> None:
        settings = self.settings
        model = DistributedDataParallel(
            self.module,
            gradient_as_bucket_view=True,
            forward_sync_buffers=False,
            # None is DDP's own 25 MB with a small first bucket, which leaves while the backward is still young
            bucket_cap_mb=None if settings.bucket_mb == DDP_BUCKET_MB else settings.bucket_mb,
            static_graph=settings.static_graph,
        )
        _settle_buckets(model)
        self._powersgd = None
        state: Any = None
        hook: Hook | None = None
        if settings.compression == "bf16":
            hook = default_hooks.bf16_compress_hook
        elif settings.compression == "powersgd":
            self._powersgd = PowerSgd(settings.powersgd_rank, settings.powersgd_start_step, self.device)
            state, hook = self._powersgd.state, self._powersgd.hook
        elif self._around is not None:
            hook = default_hooks.allreduce_hook
        if hook is not None:
            model.register_comm_hook(state, _plain(self._around(hook) if self._around is not None else hook))
        self.model = model


def wrap(model: nn.Module, settings: ParallelSettings, device: torch.device, around: Around | None = None) -> Parallel:
    """Spread a model over the ranks of the default process group; all ranks call it, with the same settings.

    Args:
        model: the same architecture on each rank, on the CPU or on `device`; rank 0's values become everyone's.
        settings: `training.parallel`.
        device: where this rank computes. Beyond one GPU's memory the model should come on the CPU: with `fsdp` it is
            moved block by block.
        around: put around DDP's communication hook, e.g. to time it.
    """
    return Parallel(model, settings, device, around)


def _plain(hook: Hook) -> Hook:
    """The hook without annotations: DDP compares them with classes, and refuses those that are still strings."""

    def called(state: Any, bucket: Any) -> torch.futures.Future[torch.Tensor]:
        return hook(state, bucket)

    called.__annotations__.clear()
    return called


def _settle_buckets(model: DistributedDataParallel) -> None:
    """Let DDP lay out its buckets now, and in an order that depends on the model only.

    DDP lays them out anew after its first backward. A resumed run would thus compute its first step with other buckets
    than the undisturbed run did, and with three and more ranks sum the gradients in another order: other bits. One
    backward of zeros, parameters in reverse order of registration as in a usual model, brings that forward. With a
    static graph it is also what DDP records: each parameter gets its gradient once per backward.
    """
    module = model.module
    before = module.__dict__.get("forward")

    def zero() -> torch.Tensor:
        learning = [parameter for parameter in module.parameters() if parameter.requires_grad]
        return torch.stack([(parameter.flatten()[:1] * 0.0).sum() for parameter in learning]).sum()

    module.__dict__["forward"] = zero
    try:
        model().backward()
    finally:
        if before is None:
            del module.__dict__["forward"]
        else:
            module.__dict__["forward"] = before
    model.zero_grad(set_to_none=True)
