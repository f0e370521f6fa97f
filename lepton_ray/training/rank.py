"""One rank of a task's run: model, optimiser and data, restored to where the run was."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pyarrow as pa
import torch

from lepton_ray.data.order import SampleLedger
from lepton_ray.data.sampling import plan_sampling
from lepton_ray.errors import LeptonError
from lepton_ray.monitoring.ledger import RankLedger
from lepton_ray.tasks import AnyTask, find_task
from lepton_ray.training.batches import BatchPlan, Slice
from lepton_ray.training.boundary import Boundary
from lepton_ray.training.checkpoint_writer import CheckpointWriter
from lepton_ray.training.collective_time import CollectiveTime
from lepton_ray.training.collectives import gather_bytes
from lepton_ray.training.context import RankContext
from lepton_ray.training.controls import Controls
from lepton_ray.training.feeding import Feed
from lepton_ray.training.hot_copies import HotCopies
from lepton_ray.training.initialisation import initialise
from lepton_ray.training.leaving import leave_preempted, leave_to_grow
from lepton_ray.training.newest import restore_newest, take_optimizer
from lepton_ray.training.notes import Notes
from lepton_ray.training.optimisation import WeightAverage, make_optimizer
from lepton_ray.training.parallel import wrap
from lepton_ray.training.precision import Precision, make_deterministic
from lepton_ray.training.process_group import break_off
from lepton_ray.training.state import StateCopy, copy_state
from lepton_ray.training.step_end import StepEnd, Verdict
from lepton_ray.training.transfer import Transfer

_log = logging.getLogger(__name__)
MAX_ROLL_BACKS = 10
"""Times that a run goes back in one process before it gives up: what is wrong then is not a few batches."""


class Rank:
    """Everything that the loop moves. Made by all ranks together: making it is a collective.

    Args:
        context: the rank's place in its run.
        train: rows to train on.
        held_out: rows to evaluate on.
        scratch: folder of this node for decoded rows.
    """

    def __init__(self, context: RankContext, train: pa.Table, held_out: pa.Table, scratch: Path) -> None:
        self.context, self.device = context, context.device
        self.training = training = context.training
        transforms = context.plan.transforms
        self.task: AnyTask = find_task(context.settings.task.name, context.settings.task.options)
        if training.deterministic:
            make_deterministic()
        weighs = training.sampling.weighted != "none" or training.sampling.class_weights != "none"
        labels = train[self.task.label] if weighs else None
        self._rows = train.num_rows
        self._sampling = plan_sampling(training.sampling, self._rows, training.seed, labels)
        self.feed = Feed(self.task, train, transforms, self.device, scratch)
        self.held_out = Feed(self.task, held_out, transforms, self.device, scratch, name="held_out")
        self.controls = Controls(
            training, self.task.decides, self.task.direction(training.stopping.metric or self.task.decides[0])
        )
        self.precision = Precision(training.precision, self.device)
        self.precision.apply_switches()
        self.collective = CollectiveTime(self.device, context.beat.exchanging if context.beat else None)
        if context.beat is not None:
            context.beat.waited = self.collective.newest
        self.replay_until = context.replay_until
        """Steps up to here were done before, and are done again."""
        self.metrics: dict[str, float] = {}
        """The newest evaluation."""
        self.evaluated_step = self.saved_step = 0
        """Steps of the newest evaluation, and of the newest checkpoint that was handed to the writer or restored."""
        self._learning_epoch = -1
        self._build(start=not self._begun())
        self.writer = CheckpointWriter(context.checkpoints, training.checkpoint.keep, context.recorder, self.parallel)
        self.hot = HotCopies(context, enabled=training.checkpoint.hot, sharded=self.parallel.all_write)
        self.step_end = StepEnd(context, self.writer, compares=not self.parallel.sharded)
        self._fresh = self.controls.to_json(), self.precision.to_json()
        self._restore(hot=True)
        self.notes = Notes(context, self.step, self.total_steps)

    @property
    def ledger(self) -> RankLedger:
        """The clock of this rank's phases."""
        return self.context.ledger

    @property
    def epoch(self) -> int:
        """Epochs that are complete."""
        return self.batches.epoch_after(self.step)

    @property
    def total_steps(self) -> int:
        """Steps of the whole run, unless it is stopped before."""
        return self.batches.total_steps

    def begin_epoch(self) -> None:
        """Let parameters learn that begin to at this epoch."""
        if self.epoch == self._learning_epoch:
            return
        self._learning_epoch = self.epoch
        if self.transfer.at_epoch(self.epoch):
            self.parallel.learning_changed()
            self.forward = self.precision.compiled(self.parallel.model)
            self.forward.train()

    def take(self) -> Slice:
        """This rank's rows of the step that is next, entered into the account and the log of samples."""
        step = self.step
        self.hot.account(step, self._my_samples)
        batch = self.batches.take(step)
        ids = batch.ids if batch.weight else batch.ids[:0]
        self.hot.took(step + 1, ids, self.batches.epochs_of(step, len(ids)))
        return batch

    def leave_out(self) -> None:
        """Pass over the step that is next."""
        self.hot.account(self.step, self._my_samples)
        self.step += 1
        self.hot.took(self.step, np.empty(0, np.int64), 0)

    def owes_evaluation(self) -> bool:
        """Whether an evaluation belongs to the step that is done and was not made yet."""
        if not self.step or self.evaluated_step == self.step:
            return False
        whole = self.epoch > self.batches.epoch_after(self.step - 1)
        return self.step == self.total_steps or (whole and self.epoch % self.training.evaluate_every_epochs == 0)

    def owes_checkpoint(self) -> bool:
        """Whether the state after the step that is done must be kept and was not yet."""
        if not self.step or self.saved_step == self.step:
            return False
        due = self.step_end.checkpoint_due(self.step)
        best = self.controls.best.step == self.step
        return due or best or self.step == self.total_steps or bool(self.controls.stopped)

    @property
    def ended(self) -> bool:
        """Whether there is no further step."""
        return self.step >= self.total_steps or bool(self.controls.stopped)

    def meet(self, *, saving: bool, doubtful: bool) -> Verdict:
        """At the end of a step, what the ranks found out together (see `StepEnd.meet`)."""
        return self.step_end.meet(self.step, self._equal_tensors, saving=saving, doubtful=doubtful)

    def go_back(self) -> None:
        """After too many steps in a row without finite gradients: on from the newest good checkpoint, without them."""
        nonfinite = self.controls.nonfinite
        self.context.say("went back", step=self.step, left_out=sorted(nonfinite.left_out))
        if nonfinite.roll_backs > MAX_ROLL_BACKS:
            raise LeptonError(
                f"run {self.context.run}: loss or gradients are not finite again and again (step {self.step}, went "
                f"back {MAX_ROLL_BACKS} times); lower training.optimizer.learning_rate, or set clip_norm"
            )
        self.begin_again()

    def begin_again(self) -> None:
        """On from the newest checkpoint; what came after it is dropped."""
        self.replay_until = max(self.replay_until, self.step)
        self.writer.settle()
        self.hot.forget()
        self._build(start=not self._begun())
        self._restore(hot=False)

    def save(self) -> None:
        """Hand a copy of the run's whole state to the writer; all ranks take part."""
        started = time.perf_counter()
        samples = self.gathered_samples()
        copy = copy_state(self.parallel, self.optimizer, self.average, into=self.writer.spare())
        self.writer.submit(self.step, copy, self._state(samples), self.controls.best.step)
        self.saved_step = self.step
        self.hot.share(self.step, samples)
        self.hot.agree()
        self.step_end.saved(self.step, time.perf_counter() - started)

    def leave(self) -> NoReturn:
        """Some rank will be taken away: all make this step durable and leave; raises Preempted."""
        leave_preempted(self.context, self.step, self.writer, save=self.save, keep=self._keep_whole)

    def make_room(self) -> None:
        """After a checkpoint: leave, if the ranks agreed to let a larger group follow; raises MadeRoom then."""
        if self.step_end.makes_room and not self.ended:
            leave_to_grow(self.context, self.step, self.writer, keep=self._keep_whole)

    def keep_hot(self) -> None:
        """After each step: a copy of the state in shared memory, if it is time for one."""
        self.hot.put(self.step, self._hot_copy, self._hot_state)

    def salvage(self, error: BaseException) -> None:
        """After a failure on some rank: keep the state after the newest step, if this rank has it still."""
        if isinstance(error, LeptonError):  # decided on all ranks alike
            return
        break_off()  # first, so that the ranks that wait for this one learn of it
        if self.boundary.between and self.boundary.put_back():
            self.hot.salvage(self.step, self._hot_copy, self._hot_state)

    def gathered_samples(self) -> dict[str, Any]:
        """The sample ledger of the whole run so far, on every rank."""
        merged = SampleLedger()
        for part in gather_bytes(json.dumps(self._my_samples()).encode(), self.device):
            merged.merge(SampleLedger.from_json(json.loads(part)))
        return merged.to_json()

    def close(self, *, finished: bool) -> None:
        """Let go of decoded rows and, at the end of the run, of hot copies."""
        for feed in (self.feed, self.held_out):
            feed.close(finished=finished)
        if finished:
            self.hot.remove()
        else:
            self.writer.abandon()

    def _begun(self) -> bool:
        """Whether there is a checkpoint that may be restored, so that the weights to start from are not needed."""
        found = [bool(self.context.leads and self.context.checkpoints.steps())]
        return any(json.loads(part)[0] for part in gather_bytes(json.dumps(found).encode(), self.device))

    def _build(self, *, start: bool) -> None:
        """Data position, model and optimiser, spread over the ranks; `start`: with the weights a run starts from."""
        training, context = self.training, self.context
        self.batches = BatchPlan(
            rows=self._rows, epochs=training.epochs, global_batch=training.global_batch, seed=training.seed,
            rank=context.number, world_size=context.world_size, sampling=self._sampling,
        )  # fmt: skip
        self.step = 0
        """Steps that are done."""
        self.samples = SampleLedger()
        """Rank 0: the merged sample ledger of all steps before those of this group."""
        torch.manual_seed(training.seed)  # the same weights on every rank, whatever ran before
        model = self.task.build(context.plan.transforms)
        self._started = start
        if start:
            matched = initialise(model, training.initial, context.store, self.device, context.plan.initial)
            if matched is not None:
                context.say("initialised", source=matched.source, share=matched.share, missing=matched.missing)
        self.transfer = Transfer(model, training.transfer)
        self.parallel = wrap(model, training.parallel, self.device)
        self.optimizer = make_optimizer(self.parallel.module, training.optimizer, self.transfer.learns)
        self.average = WeightAverage(self.parallel.module, training.optimizer.ema) if training.optimizer.ema else None
        self.parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        self.forward = self.precision.compiled(self.parallel.model)
        self.forward.train()
        self._learning_epoch = -1
        salvageable = None if self.parallel.all_write else self.parallel.module
        self.boundary = Boundary(salvageable, leads=self.context.leads)

    def _restore(self, *, hot: bool) -> None:
        """Restore the newest hot copy or verified checkpoint, whichever is newer."""
        context = self.context
        found = restore_newest(
            context, self.hot if hot else None, self.parallel, self.optimizer, self.average, self._planned
        )
        for reason in found.skipped:
            _log.warning("checkpoint skipped: %s", reason)
            context.say("checkpoint skipped", reason=reason)
        state = found.state
        if not state:
            if not self._started and self.training.initial.weights:  # no checkpoint held: begin as at first
                self._build(start=True)
            if self.training.initial.optimizer:
                take_optimizer(context, self.parallel, self.optimizer)
            self.controls.restore(self._fresh[0])  # it may come back to the start from later on
            self.precision.restore(self._fresh[1])
            self.metrics, self.evaluated_step, self.saved_step = {}, 0, 0
            self._begin_log(SampleLedger().to_json())
            return
        self.step, self.metrics = int(state["step"]), state["metrics"]
        if context.leads:
            self.samples = SampleLedger.from_json(state["samples"])
        self.evaluated_step = int(state["evaluated_step"])
        self.saved_step = self.step if found.source == "checkpoint" else 0
        self.controls.restore(state["controls"])
        self.precision.restore(state["precision"])
        self._begin_log(state["samples"])
        context.say("resumed", step=self.step, sample_offset=state["sample_offset"], source=found.source)

    def _begin_log(self, samples: Mapping[str, Any]) -> None:
        self.context.resumed(self.step)
        self.boundary.begin()
        self.step_end.begin(self.step)
        largest = -(-self.training.global_batch // self.context.world_size)
        self.hot.begin(self.step, largest, self._my_samples())
        self.hot.share(self.step, samples)

    def _planned(self, base: Mapping[str, Any], state: Mapping[str, Any]) -> SampleLedger:
        """The samples of all ranks in the steps after those of `base` up to `state`'s."""
        training = self.training
        whole = BatchPlan(
            rows=self._rows, epochs=training.epochs, global_batch=training.global_batch, seed=training.seed,
            rank=0, world_size=1, sampling=self._sampling,
        )  # fmt: skip
        left_out = set(state["controls"]["nonfinite"]["left_out"])
        for step in range(base["step"], state["step"]):
            if step not in left_out:
                whole.take(step)
        return whole.account()

    def _my_samples(self) -> dict[str, Any]:
        """What this rank used in this group; rank 0 adds what was used before."""
        mine = SampleLedger.from_json(self.samples.to_json())
        mine.merge(self.batches.account())
        return mine.to_json()

    def _equal_tensors(self) -> Iterator[torch.Tensor]:
        """What is the same on all ranks where each holds the whole model."""
        yield from self.parallel.module.parameters()
        for part in self.optimizer.state.values():
            yield from (value for value in part.values() if isinstance(value, torch.Tensor))
        if self.average:
            yield from self.average.state().values()

    def _keep_whole(self) -> bool:
        return self.hot.salvage(self.step, self._hot_copy, self._hot_state)

    def _hot_copy(self, into: StateCopy | None) -> StateCopy:
        return copy_state(self.parallel, self.optimizer, self.average, into=into, everywhere=True)

    def _hot_state(self) -> dict[str, Any]:
        return self._state(self._my_samples())

    def _state(self, samples: dict[str, Any]) -> dict[str, Any]:
        context = self.context
        return {
            "step": self.step, "evaluated_step": self.evaluated_step,
            "sample_offset": self.batches.samples_after(self.step), "samples": samples,
            "world_size": context.world_size, "generation": context.generation, "metrics": self.metrics,
            "table_fingerprint": context.plan.table_fingerprint, "controls": self.controls.to_json(),
            "precision": self.precision.to_json(),
        }  # fmt: skip
