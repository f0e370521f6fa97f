"""What a run with a loop of one's own keeps: the model, whatever else was prepared, and the account of samples."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping
from typing import Any, NoReturn, cast

import torch

from lepton_ray.data.order import SampleLedger
from lepton_ray.errors import IntegrityError, UsageError
from lepton_ray.training.boundary import Boundary
from lepton_ray.training.checkpoint_writer import CheckpointWriter
from lepton_ray.training.collectives import gather_bytes
from lepton_ray.training.context import RankContext
from lepton_ray.training.divergence import Diverged
from lepton_ray.training.hot_copies import HotCopies
from lepton_ray.training.leaving import leave_preempted, leave_to_grow
from lepton_ray.training.newest import restore_newest
from lepton_ray.training.own_batches import EpochPlan
from lepton_ray.training.parallel import Parallel
from lepton_ray.training.part_state import AllOptimizers, as_json, from_json
from lepton_ray.training.state import StateCopy, copy_state
from lepton_ray.training.step_end import StepEnd

_log = logging.getLogger(__name__)


class OwnState:
    """The model and the other prepared parts of one rank, saved and restored together."""

    def __init__(self, context: RankContext) -> None:
        self._context = context
        self.parallel: Parallel | None = None
        """The prepared model."""
        self.saved_step = 0
        """Step of the newest checkpoint that was handed to the writer, or restored."""
        self._optimizers: list[torch.optim.Optimizer] = []
        self._parts: list[Any] = []
        self._before = SampleLedger()
        self._samples = SampleLedger()
        self._began = False
        self._plan: EpochPlan | None = None
        self._common: dict[str, Any] = SampleLedger().to_json()
        self.boundary = Boundary(None)
        """Whether the weights stand between two steps; the buffers as they were there."""

    def keep(self, part: Any) -> None:
        """Keep an optimiser, or another part with `state_dict` and `load_state_dict`."""
        if self._began:
            raise UsageError("prepare: training has begun; prepare everything before epochs() or batches()")
        if isinstance(part, torch.optim.Optimizer):
            part.register_step_pre_hook(lambda *_: self.boundary.leave())
            self._optimizers.append(part)
        else:
            self._parts.append(part)

    def restore(self) -> tuple[int, int, int, dict[str, float]]:
        """Restore everything from the newest checkpoint, if there is one; a collective.

        Returns steps that are done, epoch, batches done in it, and the newest evaluation.
        """
        parallel = self._ready()
        context = self._context
        self._began = True
        self._optimizer = AllOptimizers(self._optimizers)
        self._writer = CheckpointWriter(
            context.checkpoints, context.training.checkpoint.keep, context.recorder, parallel
        )
        self._hot = HotCopies(context, enabled=context.training.checkpoint.hot, sharded=parallel.all_write)
        self._end = StepEnd(context, self._writer, compares=not parallel.sharded)
        found = restore_newest(context, self._hot, parallel, self._moved, None, self._planned)
        self._end.begin(int(found.state["step"]) if found.state else 0)
        self.boundary = Boundary(None if parallel.all_write else parallel.module, leads=context.leads)
        for reason in found.skipped:
            _log.warning("checkpoint skipped: %s", reason)
            context.say("checkpoint skipped", reason=reason)
        state = found.state
        if not state:
            return 0, 0, 0, {}
        if len(state["parts"]) != len(self._parts) or len(state["groups"]) != len(self._optimizer.param_groups):
            raise IntegrityError(
                f"run {context.run}: its checkpoint has {len(state['parts'])} parts beside the model and "
                f"{len(state['groups'])} groups of parameters, prepared are {len(self._parts)} and "
                f"{len(self._optimizer.param_groups)}; prepare the same, or name another run"
            )
        self._optimizer.load_hyperparameters(state["groups"])
        for part, plain in zip(self._parts, state["parts"], strict=True):
            part.load_state_dict(from_json(plain))
        self._common = state["samples"]
        if context.leads:
            self._before = SampleLedger.from_json(state["samples"])
        self.saved_step = int(state["step"])
        context.resumed(self.saved_step)
        context.say("resumed", step=state["step"], epoch=state["epoch"], source=found.source)
        return state["step"], state["epoch"], state["index"], state["metrics"]

    def save(self, step: int, epoch: int, index: int, metrics: dict[str, float]) -> None:
        """Hand a copy of everything to the writer; all ranks take part."""
        started = time.perf_counter()
        state = self._state(step, epoch, index, metrics, self.gathered())
        copy = copy_state(self._ready(), self._moved, into=self._writer.spare())
        self._writer.submit(step, copy, state)
        self._share(step, epoch, index, state["samples"])
        self._hot.agree()
        self.saved_step = step
        self._end.saved(step, time.perf_counter() - started)

    def owes_checkpoint(self, step: int) -> bool:
        """Whether `training.checkpoint.every_steps` asks for a checkpoint after this step."""
        every = self._context.training.checkpoint.every_steps
        if every == "auto":
            return self._end.checkpoint_due(step)
        return step // every > self.saved_step // every

    def meet(self, step: int, *, saving: bool) -> bool:
        """At the end of a step (see `StepEnd.meet`); whether some rank will be taken away.

        Raises Diverged, on all ranks, where one has other weights than the rest: a loop of one's own cannot be taken
        back, so a new worker group goes on from the newest checkpoint. Only the model's parameters are compared, since
        an optimiser of one's own may keep what is its rank's alone.
        """
        verdict = self._end.meet(step, self._ready().module.parameters, saving=saving)
        if verdict == "diverged":
            self._hot.forget()
            raise Diverged(
                f"run {self._context.run}: after step {step} the ranks' weights are not equal bit for bit; the run "
                "goes on from its newest checkpoint"
            )
        return verdict == "preempted"

    def leave(self, step: int, epoch: int, index: int, metrics: dict[str, float]) -> NoReturn:
        """Some rank will be taken away: all make this step durable and leave; raises Preempted."""
        leave_preempted(
            self._context, step, self._writer, save=lambda: self.save(step, epoch, index, metrics),
            keep=lambda: self._keep_whole(step, epoch, index, metrics),
        )  # fmt: skip

    def make_room(self, step: int, epoch: int, index: int, metrics: dict[str, float]) -> None:
        """After a checkpoint: leave, if the ranks agreed to let a larger group follow; raises MadeRoom then."""
        if self._end.makes_room:
            leave_to_grow(self._context, step, self._writer, keep=lambda: self._keep_whole(step, epoch, index, metrics))

    def keep_hot(self, step: int, epoch: int, index: int, metrics: dict[str, float]) -> None:
        """After each step: a copy of everything in shared memory, if it is time for one."""

        def copied(into: StateCopy | None) -> StateCopy:
            return copy_state(self._ready(), self._moved, into=into, everywhere=True)

        self._hot.put(step, copied, lambda: self._state(step, epoch, index, metrics, self._mine().to_json()))

    def begin_log(self, step: int, epoch: int, index: int, plan: EpochPlan) -> None:
        """Begin the log of samples, `step` steps being done, `index` of them in this epoch."""
        self._plan = plan
        self._share(step, epoch, index, self._common)
        self.boundary.begin()
        self._hot.begin(step, plan.largest, self._mine().to_json())

    def _share(self, step: int, epoch: int, index: int, samples: dict[str, Any]) -> None:
        """Keep the account of all ranks on this node, in case another node is lost."""
        plan = self._plan
        if plan is not None:
            at = {"epoch": epoch, "index": index}
            size = {"rows": plan.rows, "global_batch": plan.global_batch, "drop_last": plan.used < plan.rows}
            self._hot.share(step, samples, {**at, **size})

    def _planned(self, base: Mapping[str, Any], state: Mapping[str, Any]) -> SampleLedger:
        """The samples of all ranks in the steps after those of `base` up to `state`'s."""
        plan, ledger = base["plan"], SampleLedger()
        whole = EpochPlan(
            plan["rows"], plan["global_batch"], self._context.training.seed, 0, 1, drop_last=plan["drop_last"]
        )
        epoch, index = plan["epoch"], plan["index"]
        while (epoch, index) < (state["epoch"], state["index"]):
            last = state["index"] if epoch == state["epoch"] else whole.steps
            whole.account(ledger, epoch, index, last)
            epoch, index = epoch + 1, 0
        return ledger

    def took(self, plan: EpochPlan, epoch: int, index: int, step: int) -> None:
        """Before a step that brings the run to `step` steps: this rank's samples of it go into the log."""
        self._hot.account(step - 1, lambda: self._mine().to_json())
        self._hot.took(step, plan.ids(epoch, index), epoch)

    def salvage(self, step: int, epoch: int, index: int, metrics: dict[str, float]) -> None:
        """After a failure on some rank: keep the state after the newest step, if this rank has it still."""
        if not self._began:
            return
        self._writer.abandon()
        if not (self.boundary.between and self.boundary.put_back()):
            return
        self._keep_whole(step, epoch, index, metrics)

    def _keep_whole(self, step: int, epoch: int, index: int, metrics: dict[str, float]) -> bool:
        def copied(into: StateCopy | None) -> StateCopy:
            return copy_state(self._ready(), self._moved, into=into, everywhere=True)

        return self._hot.salvage(step, copied, lambda: self._state(step, epoch, index, metrics, {}))

    def finish(self, *, finished: bool) -> None:
        """Wait for the last checkpoint; hot copies are not needed any more once the run is finished."""
        if self._began:
            self._writer.finish()
            if finished:
                self._hot.remove()

    def account(self, plan: EpochPlan, epoch: int, index: int) -> None:
        """Enter this rank's samples of a batch into the sample ledger."""
        plan.account(self._samples, epoch, index, index + 1)

    def gathered(self) -> dict[str, Any]:
        """The sample ledger of the whole run so far, on every rank."""
        merged = SampleLedger()
        for part in gather_bytes(json.dumps(self._mine().to_json()).encode(), self._context.device):
            merged.merge(SampleLedger.from_json(json.loads(part)))
        return merged.to_json()

    def exact(self, plan: EpochPlan, epochs: int, index: int, samples: Any) -> bool:
        """Whether `samples` is the ledger of `epochs` whole epochs and `index` batches of the next."""
        expected = SampleLedger()
        whole = EpochPlan(
            plan.rows, plan.global_batch, self._context.training.seed, 0, 1, drop_last=plan.used < plan.rows
        )
        for epoch in range(epochs):
            whole.account(expected, epoch, 0, whole.steps)
        whole.account(expected, epochs, 0, index)
        return expected == SampleLedger.from_json(samples)

    @property
    def _moved(self) -> torch.optim.Optimizer:
        return cast("torch.optim.Optimizer", self._optimizer)

    def _ready(self) -> Parallel:
        if self.parallel is None:
            raise UsageError("session: prepare the model first (session().prepare(model, optimizer))")
        return self.parallel

    def _mine(self) -> SampleLedger:
        mine = SampleLedger.from_json(self._before.to_json())
        mine.merge(self._samples)
        return mine

    def _state(
        self, step: int, epoch: int, index: int, metrics: dict[str, float], samples: dict[str, Any]
    ) -> dict[str, Any]:
        context = self._context
        return {
            "step": step, "epoch": epoch, "index": index, "metrics": metrics, "samples": samples,
            "world_size": context.world_size, "generation": context.generation,
            "groups": self._optimizer.hyperparameters(),
            "parts": [
                as_json(part.state_dict(), f"part {number} ({type(part).__name__})")
                for number, part in enumerate(self._parts)
            ],
        }  # fmt: skip
