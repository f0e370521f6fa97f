"""The loop that every rank runs: load, step, note, validate, save, stop."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lepton_ray.training.batches import Slice
from lepton_ray.training.context import RankContext
from lepton_ray.training.evaluation import evaluate
from lepton_ray.training.nonfinite import poisoned
from lepton_ray.training.optimisation import add_penalty, clip
from lepton_ray.training.plan import RankPlan, TaskRows
from lepton_ray.training.rank import Rank
from lepton_ray.training.schedule import learning_rate
from lepton_ray.training.seeds import seed_torch, step_seed


def run_task(plan: RankPlan, work: TaskRows, device: torch.device, scratch: Path) -> dict[str, Any]:
    """Train a task's rows on this rank of the process group; what rank 0 returns is what the driver records."""
    import ray

    train_rows, held_out = ray.get([work.train, work.held_out])
    context = RankContext(plan, device)
    try:
        rank = Rank(context, train_rows, held_out, scratch)
        del train_rows, held_out  # the rank has them decoded: the object store may forget them
        try:
            outcome = train(rank)
        except BaseException as error:
            rank.salvage(error)
            rank.close(finished=False)
            raise
        rank.close(finished=True)
    finally:
        context.close()
    return outcome


def train(rank: Rank) -> dict[str, Any]:
    """Train from where the rank was restored to the last step; returns what rank 0 tells the driver.

    Every global batch has the same samples in the same order whatever the world size; at the same world size the
    final weights are bit for bit those of a run that was never disturbed.
    """
    controls = rank.controls
    round_off(rank)  # a run that was lost after a step may owe what belongs to it
    while rank.step < rank.total_steps and not controls.stopped:
        rank.begin_epoch()
        verdict = take_step(rank)
        if verdict == "roll_back":
            rank.ledger.switch("checkpoint")
            rank.go_back()
            continue
        round_off(rank, doubtful=verdict == "skip")
    rank.ledger.switch("checkpoint")
    rank.writer.finish()
    outcome = {
        "step": rank.step, "metrics": rank.metrics, "best": controls.best.to_json(), "stopped": controls.stopped,
        "left_out_steps": sorted(controls.nonfinite.left_out), "samples": rank.gathered_samples(),
        "generation": rank.context.generation, "devices": rank.context.devices(),
    }  # fmt: skip
    rank.ledger.finish()
    return outcome


def round_off(rank: Rank, *, doubtful: bool = False) -> None:
    """What belongs to a step that is done: at an epoch's end its evaluation, and a checkpoint where one is due.

    Then also, every so often, the ranks agree: raises Preempted where one of them will be taken away, goes back to the
    newest checkpoint where one of them has other weights than the rest. `doubtful`: the step was not finite.
    """
    if rank.owes_evaluation():
        rank.ledger.switch("validation")
        validate(rank)
        rank.ledger.switch("logging")
        rank.notes.skip()
    saving = rank.owes_checkpoint()
    verdict = rank.meet(saving=saving, doubtful=doubtful)
    if verdict == "go_on" and not saving:
        return
    rank.ledger.switch("checkpoint")
    if verdict == "diverged":
        rank.begin_again()
    elif verdict == "preempted" and not rank.ended:
        rank.leave()
    elif saving:
        rank.save()
        rank.make_room()


def take_step(rank: Rank) -> str:
    """One optimiser step over one global batch; `ok`, or `skip` or `roll_back` where it was not finite."""
    step, settings, switch = rank.step, rank.training.optimizer, rank.ledger.switch
    again = step < rank.replay_until
    if step in rank.controls.nonfinite.left_out:  # its batch made gradients that were not finite
        rank.leave_out()
        rank.ledger.step_done(rank.step, replayed=True)
        return "skip"
    switch("data_wait")
    batch = rank.take()
    losses = []
    for number, part, last in parts(batch, settings.accumulate):
        switch("data_wait")
        inputs, targets = rank.feed.take(part.ids)
        with rank.parallel.accumulating(last=last):
            switch("replayed" if again else "forward")
            # dropout: nothing to save, nothing to restore
            seed_torch(step_seed(rank.training.seed, step, rank.context.number, number), rank.device)
            with rank.precision.autocast():
                outputs = rank.forward(rank.task.augment(inputs, part.seeds))
                each = rank.task.losses(outputs, targets, label_smoothing=settings.label_smoothing)
            if part.row_weights is not None:
                each = each * torch.from_numpy(part.row_weights).to(rank.device)
            # gradients are averaged over ranks, so that this is the mean over the global batch however it is cut
            loss = poisoned(each.sum() * (part.weight * rank.context.world_size / part.global_count))
            losses.append(loss.detach())
            switch("replayed" if again else "backward")
            if rank.precision.scaler:
                loss = rank.precision.scaler.scale(loss)
            if last:
                rank.collective.watch(loss)
            loss.backward()
            if last:
                rank.collective.done()
    switch("replayed" if again else "optimizer")
    rank.boundary.leave()
    verdict, norm, rate = update(rank)
    switch("logging")
    rank.step += 1
    rank.boundary.reach()
    rank.ledger.step_done(rank.step, replayed=again)
    if verdict != "roll_back":
        switch("checkpoint")
        rank.keep_hot()
        switch("logging")
    rows = len(batch.ids) if batch.weight else 0
    if rank.notes.step(rank.step, rows, batch.global_count, loss=torch.stack(losses).sum(), again=again):
        left = rank.batches.total_samples - rank.batches.samples_after(rank.step)
        rank.notes.interval(
            rank.step, rank.epoch, left, collective_s=rank.collective.take(), learning_rate=rate, gradient_norm=norm
        )
    return verdict


def update(rank: Rank) -> tuple[str, float, float]:
    """Move the weights by the gradients that are there, unless these are not finite; verdict, their norm, the rate."""
    settings, scaler = rank.training.optimizer, rank.precision.scaler
    if scaler:
        scaler.unscale_(rank.optimizer)
    add_penalty(rank.parameters, settings.l1, settings.l2)
    norm = float(clip(rank.parameters, settings))
    finite = math.isfinite(norm)  # the same on all ranks, so all decide alike
    verdict = rank.controls.nonfinite.seen(rank.step, finite or rank.precision.searching())
    steps_per_epoch = rank.batches.rows / rank.training.global_batch
    rate = learning_rate(settings, rank.step, rank.total_steps, steps_per_epoch, rank.controls.plateau.factor)
    if finite:
        for group in rank.optimizer.param_groups:
            group["lr"] = rate * group["factor"]
        scaler.step(rank.optimizer) if scaler else rank.optimizer.step()
        if rank.average:
            rank.average.update()
    else:
        rank.notes.nonfinite()
        rank.parallel.step_skipped()
    if scaler:
        scaler.update()
    rank.optimizer.zero_grad(set_to_none=True)
    return verdict, norm, rate


def parts(batch: Slice, count: int) -> Iterator[tuple[int, Slice, bool]]:
    """A rank's share of a global batch in `count` parts: number, part, and whether it is the last.

    The number of parts is the same on every rank, so that their collectives meet; a part without rows has one row of
    weight 0.
    """
    if count == 1:
        yield 0, batch, True
        return
    for number, chosen in enumerate(np.array_split(np.arange(len(batch.ids)), count)):
        rows = chosen if len(chosen) else np.zeros(1, np.int64)
        weights = None if batch.row_weights is None else batch.row_weights[rows]
        part = replace(
            batch, ids=batch.ids[rows], seeds=batch.seeds[rows], row_weights=weights,
            weight=batch.weight if len(chosen) else 0.0,
        )  # fmt: skip
        yield number, part, number == count - 1


def validate(rank: Rank) -> None:
    """Evaluate the held-out rows on all ranks, and let the run's controls decide."""
    context = rank.context
    averaged = rank.average.applied() if rank.average else contextlib.nullcontext()
    with averaged, rank.parallel.evaluating() as model:
        found = evaluate(
            rank.task, model, rank.held_out, context.plan.transforms, rank.device, autocast=rank.precision.autocast
        )
    rank.metrics = found.metrics
    if context.leads:
        for name, value in rank.metrics.items():
            context.recorder.set("lepton_training_evaluation", value, metric=name)
        context.history.evaluated(rank.step, rank.epoch, rank.metrics, found.tables)
        context.history.write()
    rank.controls.evaluated(rank.step, rank.metrics)
    rank.evaluated_step = rank.step
