"""The loop that every rank runs: load, forward, backward, step, note, save, validate."""

from __future__ import annotations

import json
import math
import time
from typing import Any

import numpy as np
import torch

from lepton_ray.data.order import SampleLedger, mix64
from lepton_ray.training.collectives import gather_bytes, sum_over_ranks
from lepton_ray.training.history import PARTS
from lepton_ray.training.rank import Rank
from lepton_ray.training.schedule import learning_rate
from lepton_ray.training.state import copy_state

NOTE_EVERY_STEPS = 10
"""Steps between two readings of the loss: on a GPU each one waits for the device."""
EVALUATION_BATCH = 256


def train(rank: Rank) -> dict[str, Any]:
    """Train from where the rank was restored to the last step; returns what rank 0 tells the driver.

    Every global batch has the same samples in the same order whatever the world size; at the same world size the
    final weights are bit for bit those of a run that was never disturbed.
    """
    settings, batches, switch = rank.training, rank.batches, rank.ledger.switch
    total, notes = batches.total_steps, Notes(rank)
    parameters = list(rank.model.parameters())
    rank.ddp.train()
    for step in range(rank.start_step, total):
        replayed = step < rank.replay_until
        switch("data_wait")
        part = batches.take(step)
        ids = torch.from_numpy(part.ids).to(rank.device)
        inputs = rank.task.augment(rank.inputs[ids], part.seeds)
        targets = rank.targets[ids]

        switch("replayed" if replayed else "forward")
        torch.manual_seed(step_seed(settings.seed, step, rank.number))  # dropout: nothing to save, nothing to restore
        losses = rank.task.losses(rank.ddp(inputs), targets, label_smoothing=settings.optimizer.label_smoothing)
        # DDP averages over ranks, so that this is the mean over the global batch however it is cut
        loss = losses.sum() * (part.weight * rank.world_size / part.global_count)

        switch("replayed" if replayed else "backward")
        loss.backward()

        switch("replayed" if replayed else "optimizer")
        norm = torch.nn.utils.clip_grad_norm_(parameters, settings.optimizer.clip_norm or math.inf, foreach=True)
        finite = math.isfinite(norm)  # the gradients are the same on all ranks, so all decide alike
        if finite:
            for group in rank.optimizer.param_groups:
                group["lr"] = learning_rate(settings.optimizer, step, total)
            rank.optimizer.step()
        rank.optimizer.zero_grad(set_to_none=True)

        switch("logging")
        done = step + 1
        rank.ledger.step_done(done, replayed=replayed)
        notes.step(done, loss.detach(), float(norm), rows=len(ids) if part.weight else 0, finite=finite, again=replayed)
        if batches.epoch_after(done) > batches.epoch_after(step):
            switch("validation")
            evaluate(rank, done)
            switch("logging")
            notes.skip()
        if done % settings.checkpoint.every_steps == 0 or done == total:
            switch("checkpoint")
            save(rank, done)
    switch("checkpoint")
    rank.writer.finish()
    samples = json.loads(gather_samples(rank))
    rank.ledger.finish()
    return {"step": total, "metrics": rank.metrics, "samples": samples, "generation": rank.generation}


def step_seed(seed: int, step: int, rank: int) -> int:
    """The seed of a rank's random numbers in one step."""
    mixed = mix64(mix64(np.array([seed], np.uint64)) ^ np.uint64((step << 20) ^ rank))
    return int(mixed[0] >> np.uint64(1))


@torch.inference_mode()
def evaluate(rank: Rank, done: int) -> None:
    """The task's metrics over the held-out rows, each row counted once, on all ranks."""
    rank.model.eval()
    inputs, targets = rank.held_out
    sums: dict[str, float] = {}
    for at in range(0, len(inputs), EVALUATION_BATCH):
        outputs = rank.model(inputs[at : at + EVALUATION_BATCH])
        for name, values in rank.task.scores(outputs, targets[at : at + EVALUATION_BATCH]).items():
            sums[name] = sums.get(name, 0.0) + float(values.sum())
    # a rank without held-out rows still takes part: the names are those of an empty batch
    names = sorted(sums or rank.task.scores(rank.model(rank.inputs[:1]), rank.targets[:1]))
    figures = torch.tensor([float(len(inputs)), *(sums.get(n, 0.0) for n in names)], dtype=torch.float64)
    count, *means = sum_over_ranks(figures.to(rank.device)).tolist()
    rank.model.train()
    rank.metrics = {name: value / count for name, value in zip(names, means, strict=True)}
    if rank.leads:
        for name, value in rank.metrics.items():
            rank.recorder.set("lepton_training_evaluation", value, metric=name)
        rank.history.evaluated(done, rank.batches.epoch_after(done), rank.metrics)
        rank.history.write()


def save(rank: Rank, done: int) -> None:
    """Hand a copy of the run's whole state to the writer; all ranks take part, rank 0 writes."""
    samples = gather_samples(rank)
    if rank.leads:
        state = {
            "step": done, "sample_offset": rank.batches.samples_after(done), "samples": json.loads(samples),
            "world_size": rank.world_size, "generation": rank.generation, "metrics": rank.metrics,
            "table_fingerprint": rank.plan.table_fingerprint,
        }  # fmt: skip
        rank.writer.submit(done, *copy_state(rank.model, rank.optimizer), state)


def gather_samples(rank: Rank) -> bytes:
    """The sample ledger of the whole run so far, as JSON on every rank."""
    mine = SampleLedger.from_json(rank.samples.to_json())
    mine.merge(rank.batches.account())
    merged = SampleLedger()
    for part in gather_bytes(json.dumps(mine.to_json()).encode(), rank.device):
        merged.merge(SampleLedger.from_json(json.loads(part)))
    return json.dumps(merged.to_json()).encode()


class Notes:
    """The figures of one rank, read from the device every few steps."""

    def __init__(self, rank: Rank) -> None:
        self._rank = rank
        self._recorder = rank.recorder
        self._last = self._since = time.perf_counter()
        self._losses: list[torch.Tensor] = []
        self._parts = rank.ledger.clock.totals()
        if rank.leads:
            rank.recorder.set("lepton_training_world_size", rank.world_size)
            rank.recorder.set("lepton_training_total_steps", rank.batches.total_steps)
            rank.recorder.set("lepton_training_step", rank.start_step)
            if rank.restart_cause:
                rank.recorder.count("lepton_training_restarts_total", cause=rank.restart_cause)

    def step(self, done: int, loss: torch.Tensor, norm: float, *, rows: int, finite: bool, again: bool) -> None:
        """Note one step; every few steps also the loss and the share of each part."""
        now = time.perf_counter()
        self._recorder.step(done, now - self._last, rows, replayed=again)
        self._last = now
        if not self._rank.leads:
            return
        if not finite:
            self._recorder.count("lepton_training_nonfinite_steps_total")
        self._losses.append(loss)
        if done % NOTE_EVERY_STEPS == 0 or done == self._rank.batches.total_steps:
            self._interval(done, norm, now)

    def skip(self) -> None:
        """Leave the time since the last step (an evaluation) out of the step times."""
        now = time.perf_counter()
        self._since += now - self._last
        self._last = now

    def _interval(self, done: int, norm: float, now: float) -> None:
        rank, recorder, steps = self._rank, self._recorder, len(self._losses)
        batches = rank.batches
        # rank 0's own share of the batch, scaled so that its expectation is the loss of the global batch
        loss = float(torch.stack(self._losses).mean())
        rate = learning_rate(rank.training.optimizer, done - 1, batches.total_steps)
        speed = steps * rank.training.global_batch / max(now - self._since, 1e-9)
        recorder.set("lepton_training_loss", loss)
        recorder.set("lepton_training_learning_rate", rate)
        recorder.set("lepton_training_gradient_norm", norm)
        recorder.set("lepton_training_samples_per_second", speed)
        recorder.set("lepton_training_epoch", batches.epoch_after(done))
        recorder.set("lepton_training_eta_seconds", (batches.total_samples - batches.samples_after(done)) / speed)
        parts = rank.ledger.clock.totals()
        figures = {name: (parts[name] - self._parts[name]) / steps for name in PARTS}
        figures.update(loss=loss, learning_rate=rate, gradient_norm=norm, samples_per_second=speed)
        rank.history.note(done, batches.epoch_after(done), figures)
        self._losses, self._parts, self._since = [], parts, now
