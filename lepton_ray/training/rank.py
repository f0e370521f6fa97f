"""One rank of a task's run: model, optimiser and data, restored to where the run was."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch

from lepton_ray.data.order import SampleLedger
from lepton_ray.data.sampling import plan_sampling
from lepton_ray.errors import LeptonError
from lepton_ray.monitoring.ledger import RankLedger
from lepton_ray.tasks import AnyTask, find_task
from lepton_ray.training.batches import BatchPlan
from lepton_ray.training.checkpoint_writer import CheckpointWriter
from lepton_ray.training.collective_time import CollectiveTime
from lepton_ray.training.collectives import gather_bytes
from lepton_ray.training.context import RankContext
from lepton_ray.training.controls import Controls
from lepton_ray.training.feeding import Feed
from lepton_ray.training.hot_copies import HotCopies
from lepton_ray.training.initialisation import initialise
from lepton_ray.training.newest import restore_newest, take_optimizer
from lepton_ray.training.notes import Notes
from lepton_ray.training.optimisation import WeightAverage, make_optimizer
from lepton_ray.training.parallel import wrap
from lepton_ray.training.precision import Precision, make_deterministic
from lepton_ray.training.state import StateCopy, copy_state
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
        self.collective = CollectiveTime(self.device)
        self.replay_until = context.replay_until
        """Steps up to here were done before, and are done again."""
        self.metrics: dict[str, float] = {}
        """The newest evaluation."""
        self._learning_epoch = -1
        self._build(start=not self._begun())
        self.writer = CheckpointWriter(context.checkpoints, training.checkpoint.keep, context.recorder, self.parallel)
        self.hot = HotCopies(context, enabled=training.checkpoint.hot, sharded=self.parallel.all_write)
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

    def go_back(self) -> None:
        """After too many steps in a row without finite gradients: on from the newest good checkpoint, without them."""
        nonfinite = self.controls.nonfinite
        self.context.say("went back", step=self.step, left_out=sorted(nonfinite.left_out))
        if nonfinite.roll_backs > MAX_ROLL_BACKS:
            raise LeptonError(
                f"run {self.context.run}: loss or gradients are not finite again and again (step {self.step}, went "
                f"back {MAX_ROLL_BACKS} times); lower training.optimizer.learning_rate, or set clip_norm"
            )
        self.replay_until = max(self.replay_until, self.step)
        self.writer.settle()
        self.hot.forget()
        self._build(start=not self._begun())
        self._restore(hot=False)

    def save(self) -> None:
        """Hand a copy of the run's whole state to the writer; all ranks take part."""
        samples = self.gathered_samples()
        copy = copy_state(self.parallel, self.optimizer, self.average, into=self.writer.spare())
        self.writer.submit(self.step, copy, self._state(samples), self.controls.best.step)
        self.hot.agree()

    def keep_hot(self) -> None:
        """After each step: a copy of the state in shared memory, if it is time for one."""
        self.hot.put(self.step, self._hot_copy, self._hot_state)

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

    def _restore(self, *, hot: bool) -> None:
        """Restore the newest hot copy or verified checkpoint, whichever is newer."""
        context = self.context
        found = restore_newest(context, self.hot if hot else None, self.parallel, self.optimizer, self.average)
        for reason in found.skipped:
            _log.warning("checkpoint skipped: %s", reason)
            context.say("checkpoint skipped", reason=reason)
        state = found.state
        if not state:
            if not self._started and self.training.initial.weights:  # no checkpoint held: begin as at first
                self._build(start=True)
            if self.training.initial.optimizer:
                take_optimizer(context, self.parallel, self.optimizer)
            return
        self.step, self.metrics = int(state["step"]), state["metrics"]
        if context.leads:
            self.samples = SampleLedger.from_json(state["samples"])
        self.controls.restore(state["controls"])
        self.precision.restore(state["precision"])
        context.say("resumed", step=self.step, sample_offset=state["sample_offset"], source=found.source)

    def _my_samples(self) -> dict[str, Any]:
        """What this rank used in this group; rank 0 adds what was used before."""
        mine = SampleLedger.from_json(self.samples.to_json())
        mine.merge(self.batches.account())
        return mine.to_json()

    def _hot_copy(self, into: StateCopy | None) -> StateCopy:
        return copy_state(self.parallel, self.optimizer, self.average, into=into, everywhere=True)

    def _hot_state(self) -> dict[str, Any]:
        return self._state(self._my_samples())

    def _state(self, samples: dict[str, Any]) -> dict[str, Any]:
        context = self.context
        return {
            "step": self.step, "sample_offset": self.batches.samples_after(self.step), "samples": samples,
            "world_size": context.world_size, "generation": context.generation, "metrics": self.metrics,
            "table_fingerprint": context.plan.table_fingerprint, "controls": self.controls.to_json(),
            "precision": self.precision.to_json(),
        }  # fmt: skip
