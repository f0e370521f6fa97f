"""What a training function of one's own is given on each rank: `lepton_ray.training.session()`.

The function keeps its own model, optimiser and loop. The session wraps the model, hands out batches by position, and
between two batches does what the framework's own loop does: count the step, note figures, keep checkpoints.
"""

from __future__ import annotations

import contextlib
import json
import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import Subset

from lepton_ray.errors import LeptonError, UsageError, shown
from lepton_ray.monitoring.ledger import PHASES
from lepton_ray.training.collective_time import CollectiveTime
from lepton_ray.training.collectives import sum_over_ranks
from lepton_ray.training.context import RankContext
from lepton_ray.training.notes import Notes
from lepton_ray.training.own_batches import EpochPlan, length_of, load
from lepton_ray.training.own_state import OwnState
from lepton_ray.training.parallel import Parallel, wrap
from lepton_ray.training.plan import OwnFunction, RankPlan
from lepton_ray.training.precision import Precision, make_deterministic
from lepton_ray.training.process_group import break_off
from lepton_ray.training.seeds import seed_torch, step_seed

_current: Session | None = None


def current_session() -> Session:
    """The session of the training function that runs in this process.

    Raises UsageError outside of `run_distributed`.
    """
    if _current is None:
        raise UsageError("session(): there is none here; call it inside the function given to run_distributed")
    return _current


def run_own_loop(plan: RankPlan, work: OwnFunction, device: torch.device) -> dict[str, Any]:
    """Call the training function on this rank of the process group; what rank 0 returns the driver records."""
    global _current  # noqa: PLW0603 - one process is one rank of one run
    context = RankContext(plan, device)
    try:
        _current = session = Session(context)
        torch.manual_seed(plan.settings.training.seed)  # the same weights on every rank, whatever ran before
        random.seed(plan.settings.training.seed)
        np.random.seed(plan.settings.training.seed % 2**32)  # noqa: NPY002 - what training scripts use
        try:
            value = work.call()
            return session.finish(value)
        except BaseException as error:
            session.salvage(error)
            raise
    finally:
        _current = None
        context.close()


class Session:
    """One rank of a run whose loop is the user's."""

    def __init__(self, context: RankContext) -> None:
        self._context = context
        self.rank, self.world_size = context.number, context.world_size
        """This rank, and how many there are."""
        self.local_rank = context.local_rank
        """Number of this rank on its node."""
        self.device = context.device
        """Where this rank computes."""
        self.epoch = 0
        """The epoch that runs, from 0."""
        self.step = 0
        """Optimiser steps that are done over the whole run; one batch is one step."""
        self.metrics: dict[str, float] = {}
        """The newest evaluation."""
        self._training = context.training
        if self._training.deterministic:
            make_deterministic()
        self._precision = Precision(self._training.precision, self.device)
        self._precision.apply_switches()
        self._state = OwnState(context)
        self._index = 0
        self._epochs: int | None = None
        self._plan: EpochPlan | None = None
        self._notes: Notes | None = None
        self._figures: dict[str, Any] = {}
        self._weight = 1.0
        self._restored = self._wanted = False
        self._collective: CollectiveTime | None = None
        if context.beat is not None and not self._training.precision.compile:
            self._collective = CollectiveTime(self.device, context.beat.exchanging)
            context.beat.waited = self._collective.newest

    # --- what is kept

    def prepare(self, *parts: Any) -> Any:
        """Put the model on this rank's device and spread it over the ranks; keep the other parts in checkpoints.

        Args:
            parts: the model, and anything with `state_dict` and `load_state_dict`: optimisers, schedulers, averages.
                With `training.parallel.strategy: fsdp` make the optimiser after the model was prepared, and prepare it
                in a second call.

        Returns the parts in their order (a single one as it is), the model wrapped.
        """
        made = tuple(self._prepared(part) for part in parts)
        return made[0] if len(made) == 1 else made

    def _prepared(self, part: Any) -> Any:
        if isinstance(part, torch.nn.Module):
            if self._state.parallel is not None:
                raise UsageError("prepare: a second model; put both into one nn.Module (an nn.ModuleDict will do)")
            part.register_forward_hook(self._weigh)
            parallel: Parallel = wrap(part, self._training.parallel, self.device)
            parallel.module.register_full_backward_pre_hook(lambda *_: self._backward())
            self._state.parallel = parallel
            return self._precision.compiled(parallel.model)
        if not (hasattr(part, "state_dict") and hasattr(part, "load_state_dict")):
            raise UsageError(
                f"prepare: {shown(type(part).__name__)} has no state_dict and load_state_dict; give the model, "
                "optimisers and schedulers"
            )
        self._state.keep(part)
        if isinstance(part, torch.optim.Optimizer):
            part.register_step_pre_hook(lambda *_: self._switch("optimizer"))
            part.register_step_post_hook(lambda *_: self._switch("logging"))
        return part

    def restore(self) -> int:
        """Restore what was prepared from the newest verified checkpoint; returns the steps that are done.

        Called by `epochs` and `batches` on their own; call it where the step is needed earlier.
        """
        if not self._restored:
            self._restored = True
            self.step, self.epoch, self._index, self.metrics = self._state.restore()
        return self.step

    def save(self) -> None:
        """Keep a checkpoint at the end of this step, whatever `training.checkpoint.every_steps` says."""
        self._wanted = True

    # --- the loop

    def epochs(self, count: int | None = None) -> Iterator[int]:
        """The epochs that are still to be run, numbered from 0; `count` of them in all (None: `training.epochs`).

        What the loop does after an epoch's batches (an evaluation, a scheduler's step) belongs to that epoch: a run
        that is interrupted in it resumes before it.
        """
        self.restore()
        self._epochs = count or self._training.epochs
        while self.epoch < self._epochs:
            yield self.epoch
            self.epoch, self._index = self.epoch + 1, 0
            self._state.keep_hot(self.step, self.epoch, self._index, self.metrics)
            self._round_off()

    def batches(
        self,
        dataset: Any,
        batch_size: int | None = None,
        *,
        epochs: int | None = None,
        collate: Callable[[list[Any]], Any] | None = None,
        workers: int = 0,
        drop_last: bool = False,
    ) -> Iterator[Any]:
        """This rank's batches: those of the epoch that `epochs()` is at, or of `epochs` epochs outside of it.

        The next batch is asked for when the step of the one before is done. Which samples make up a step depends on
        seed, epoch and step alone, not on the ranks or on what was interrupted.

        Args:
            dataset: samples by number (`__len__`, `__getitem__`), the same on all ranks.
            batch_size: samples per step over all ranks; None takes `training.global_batch`.
            epochs: passes over the dataset where `epochs()` is not used.
            collate: joins samples to a batch, as torch's DataLoader has it.
            workers: processes that load ahead; 0 loads in the rank.
            drop_last: leave out the smaller last batch of each epoch.
        """
        size = batch_size or self._training.global_batch
        if self._epochs is None:
            for _ in self.epochs(epochs):
                yield from self._epoch(dataset, size, collate, workers, drop_last=drop_last)
        else:
            yield from self._epoch(dataset, size, collate, workers, drop_last=drop_last)

    def log(self, **figures: Any) -> None:
        """Note figures of this step: numbers or tensors of one value, `loss` among them. Read every few steps."""
        self._figures |= figures

    def evaluated(self, **metrics: float) -> None:
        """Note the metrics of an evaluation, the same on all ranks."""
        self.metrics = {name: float(value) for name, value in metrics.items()}
        context = self._context
        if context.leads:
            for name, value in self.metrics.items():
                context.recorder.set("lepton_training_evaluation", value, metric=name)
            context.history.evaluated(self.step, self.epoch, self.metrics)
            context.history.write()

    def share(self, dataset: Any) -> Subset[Any]:
        """This rank's samples of a dataset, each sample on one rank: for an evaluation."""
        return Subset(dataset, range(self.rank, len(dataset), self.world_size))

    def sum(self, *values: float) -> list[float]:
        """The sums of some numbers over all ranks, on all ranks."""
        return sum_over_ranks(torch.tensor(values, dtype=torch.float64, device=self.device)).tolist()

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Charge what happens inside to a phase of the goodput ledger, e.g. `validation`."""
        if name not in PHASES:
            raise UsageError(f"phase {shown(name)}: expected one of {', '.join(PHASES)}")
        before = self._context.ledger.clock.phase
        self._context.ledger.switch(name)
        try:
            yield
        finally:
            self._context.ledger.switch(before)

    def salvage(self, error: BaseException) -> None:
        """After a failure on some rank: keep the state after the newest step, if this rank has it still."""
        if not isinstance(error, LeptonError):  # those are decided on all ranks alike
            break_off()  # first, so that the ranks that wait for this one learn of it
            self._state.salvage(self.step, self.epoch, self._index, self.metrics)

    def finish(self, value: Any) -> dict[str, Any]:
        """End of the training function: the last checkpoint, and what the driver is told."""
        if self._state.parallel is None:
            raise UsageError("the training function prepared no model; call session().prepare(model)")
        context = self._context
        self.restore()
        if self._state.saved_step != self.step:
            self._state.meet(self.step, saving=True)
            self._save()
        self._state.finish(finished=True)
        samples = self._state.gathered()
        outcome = {
            "step": self.step, "metrics": self.metrics, "best": None, "stopped": None, "left_out_steps": [],
            "samples": samples, "generation": context.generation, "value": _plain(value),
            "devices": context.devices(),
        }  # fmt: skip
        outcome["samples_exact"] = self._plan is not None and self._state.exact(
            self._plan, self.epoch, self._index, samples
        )
        context.ledger.finish()
        return outcome

    # --- one step

    def _epoch(
        self,
        dataset: Any,
        size: int,
        collate: Callable[[list[Any]], Any] | None,
        workers: int,
        *,
        drop_last: bool,
    ) -> Iterator[Any]:
        plan = self._planned(EpochPlan(
            length_of(dataset), size, self._training.seed, self.rank, self.world_size, drop_last=drop_last
        ))  # fmt: skip
        self._switch("data_wait", replayed=False)
        for batch in load(dataset, plan, self.epoch, self._index, collate=collate, workers=workers):
            self._weight = plan.slice(self.epoch, self._index)[1]
            seed = step_seed(self._training.seed, self.step, self.rank)
            seed_torch(seed, self.device)
            random.seed(seed)
            self._switch("forward")
            self._state.took(plan, self.epoch, self._index, self.step + 1)
            yield batch
            self._step_done(plan)
            if self._index < plan.steps:
                self._round_off()
            self._switch("data_wait", replayed=False)
        self._switch("validation", replayed=False)

    def _planned(self, plan: EpochPlan) -> EpochPlan:
        """The run's one plan. Raises UsageError where batches of another kind were asked for before."""
        if self._state.parallel is None:
            raise UsageError("batches: prepare the model first (session().prepare(model, optimizer))")
        if self._plan is None:
            self._plan = plan
            total = (self._epochs or 1) * plan.steps
            self._notes = Notes(self._context, self.step, total)
            self._state.begin_log(self.step, self.epoch, self._index, plan)
        elif (plan.rows, plan.global_batch, plan.used) != (self._plan.rows, self._plan.global_batch, self._plan.used):
            raise UsageError(
                f"batches: {plan.rows} samples in batches of {plan.global_batch}, before it was {self._plan.rows} in "
                f"{self._plan.global_batch}; a run trains on one dataset (load others with a DataLoader)"
            )
        return self._plan

    def _step_done(self, plan: EpochPlan) -> None:
        self._state.account(plan, self.epoch, self._index)
        count = min(plan.global_batch, plan.used - self._index * plan.global_batch)
        self.step += 1
        self._index += 1
        self._state.boundary.reach()
        again = self.step <= self._context.replay_until
        self._context.ledger.switch("logging")
        self._context.ledger.step_done(self.step, replayed=again)
        loss = self._figures.pop("loss", None)
        if loss is not None:
            loss = torch.as_tensor(loss, dtype=torch.float32).detach().reshape(())
        rows = count * (self.rank + 1) // self.world_size - count * self.rank // self.world_size
        notes = self._notes
        if notes is not None and notes.step(self.step, rows, count, loss=loss, again=again):
            left = ((self._epochs or 1) - self.epoch) * plan.used - self._index * plan.global_batch
            figures = {name: float(value) for name, value in self._figures.items()}
            epoch = self.epoch + (self._index == plan.steps)
            notes.interval(self.step, epoch, max(0, left), **figures)
        self._figures.clear()
        if self._index < plan.steps:  # at an epoch's end the loop's own work comes first: see epochs()
            self._context.ledger.switch("checkpoint")
            self._state.keep_hot(self.step, self.epoch, self._index, self.metrics)

    def _round_off(self) -> None:
        """What belongs to a step that is done: every so often the ranks agree, and a checkpoint where one is due."""
        saving = self._wanted or self._state.owes_checkpoint(self.step)
        preempted = self._state.meet(self.step, saving=saving)
        if preempted and (self._epochs is None or self.epoch < self._epochs):
            self._switch("checkpoint", replayed=False)
            self._state.leave(self.step, self.epoch, self._index, self.metrics)
        if saving:
            self._save()
            if self._epochs is None or self.epoch < self._epochs:
                self._state.make_room(self.step, self.epoch, self._index, self.metrics)

    def _save(self) -> None:
        self._switch("checkpoint", replayed=False)
        self._wanted = False
        self._state.save(self.step, self.epoch, self._index, self.metrics)

    def _backward(self) -> None:
        """Called by autograd as a backward pass begins."""
        self._switch("backward")
        if self._collective is not None:
            self._collective.inside()

    def _switch(self, phase: str, *, replayed: bool | None = None) -> None:
        """Begin a phase; forward, backward and optimiser of a repeated step are charged to `replayed`."""
        again = self.step < self._context.replay_until if replayed is None else replayed
        self._context.ledger.switch("replayed" if again and phase != "logging" else phase)

    def _weigh(self, _module: torch.nn.Module, _inputs: Any, outputs: Any) -> None:
        """Scale the gradients of a rank whose share of the batch is smaller or larger than the others'."""
        if self._weight == 1.0 or not torch.is_grad_enabled():
            return
        weight = self._weight
        for output in _tensors(outputs):
            if output.requires_grad:
                output.register_hook(lambda gradient: gradient * weight)


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    """The tensors in what a model returns."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, tuple | list):
        for item in value:
            yield from _tensors(item)


def _plain(value: Any) -> Any:
    """What the function returned, where JSON has it; else its text."""
    try:
        return json.loads(json.dumps(value))
    except (TypeError, ValueError):
        return shown(value)
