"""Which samples make up a step: the same whatever the number of ranks, each row once per epoch."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lepton_ray.data.order import SampleLedger
from lepton_ray.data.sampling import Sampling, plan_sampling
from lepton_ray.settings.training import SamplingSettings
from lepton_ray.training.batches import STEPS_PER_BLOCK, BatchPlan, samples_as_planned


def plans(rows: int, epochs: int, batch: int, world_size: int, seed: int = 7) -> list[BatchPlan]:
    return [
        BatchPlan(rows=rows, epochs=epochs, global_batch=batch, seed=seed, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]


def batch_of(ranks: list[BatchPlan], step: int) -> tuple[np.ndarray, np.ndarray]:
    parts = [plan.take(step) for plan in ranks]
    return (
        np.concatenate([part.ids for part in parts if part.weight]),
        np.concatenate([part.seeds for part in parts if part.weight]),
    )


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 300),
    epochs=st.integers(1, 4),
    batch=st.integers(1, 70),
    world_size=st.sampled_from([1, 2, 3, 7]),
)
def test_world_size_changes_nothing_about_a_step(rows: int, epochs: int, batch: int, world_size: int) -> None:
    """The ranks' slices side by side are the batch that one rank would take, augmentation seeds included."""
    alone, ranks = plans(rows, epochs, batch, 1), plans(rows, epochs, batch, world_size)
    for step in range(alone[0].total_steps):
        ids, seeds = batch_of(ranks, step)
        expected_ids, expected_seeds = batch_of(alone, step)
        assert np.array_equal(ids, expected_ids)
        assert np.array_equal(seeds, expected_seeds)


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 300), epochs=st.integers(1, 4), batch=st.integers(1, 70), world_size=st.sampled_from([1, 2, 5])
)
def test_each_epoch_uses_every_row_once(rows: int, epochs: int, batch: int, world_size: int) -> None:
    ranks = plans(rows, epochs, batch, world_size)
    used = np.concatenate([batch_of(ranks, step)[0] for step in range(ranks[0].total_steps)])
    for epoch in used.reshape(epochs, rows):
        assert np.array_equal(np.sort(epoch), np.arange(rows))
    ledger = ranks[0].account()
    for plan in ranks[1:]:
        ledger.merge(plan.account())
    assert ledger.epochs() == list(range(epochs))
    assert all(ledger.used_exactly_once(epoch, rows) for epoch in range(epochs))


def test_a_plan_entered_in_the_middle_agrees_with_the_whole() -> None:
    """A resumed rank asks for steps from anywhere; blocks of steps must not show."""
    whole, resumed = plans(1000, 9, 8, 2), plans(1000, 9, 8, 2)
    expected = {step: batch_of(whole, step)[0] for step in range(3 * STEPS_PER_BLOCK)}
    for step in (2 * STEPS_PER_BLOCK - 1, 2 * STEPS_PER_BLOCK, 5, STEPS_PER_BLOCK):
        assert np.array_equal(batch_of(resumed, step)[0], expected[step])


def test_a_rank_without_rows_keeps_step_with_weight_zero() -> None:
    """The last batch may have fewer rows than there are ranks; all of them still meet in the collective."""
    ranks = plans(rows=9, epochs=1, batch=4, world_size=3)
    last = [plan.take(2) for plan in ranks]
    assert [part.global_count for part in last] == [1, 1, 1]
    assert sum(part.weight for part in last) == 1
    assert all(len(part.ids) == 1 for part in last)


@pytest.mark.parametrize(("step", "epoch", "samples"), [(0, 0, 0), (2, 0, 8), (3, 1, 12), (5, 2, 20)])
def test_position_is_one_integer(step: int, epoch: int, samples: int) -> None:
    plan = plans(rows=10, epochs=2, batch=4, world_size=1)[0]
    assert (plan.epoch_after(step), plan.samples_after(step)) == (epoch, samples)


def test_another_seed_gives_another_order_and_other_augmentation() -> None:
    first, second = plans(100, 1, 50, 1, seed=1), plans(100, 1, 50, 1, seed=2)
    for one, other in zip(batch_of(first, 0), batch_of(second, 0), strict=True):
        assert not np.array_equal(one, other)


LABELS = pa.array(["rare"] * 5 + ["common"] * 45)


def weighed(rank: int, world_size: int, **sampling: str) -> tuple[BatchPlan, Sampling]:
    planned = plan_sampling(SamplingSettings(**sampling), 50, 7, LABELS)  # type: ignore[arg-type]
    return BatchPlan(50, 3, 8, seed=7, rank=rank, world_size=world_size, sampling=planned), planned


@pytest.mark.parametrize("sampling", [{"weighted": "balanced"}, {"class_weights": "balanced"}])
def test_world_size_changes_nothing_about_a_weighed_step(sampling: dict[str, str]) -> None:
    """Rows and their weights of 3 ranks side by side are those of one; each row has the weight of its class."""
    alone, ranks = weighed(0, 1, **sampling)[0], [weighed(rank, 3, **sampling)[0] for rank in range(3)]
    balanced = {"rare": 5.0, "common": 50 / 90}
    for step in range(alone.total_steps):
        whole, parts = alone.take(step), [plan.take(step) for plan in ranks]
        assert np.array_equal(np.concatenate([part.ids for part in parts if part.weight]), whole.ids)
        if "class_weights" in sampling:
            assert whole.row_weights is not None
            assert whole.row_weights.tolist() == pytest.approx([balanced[LABELS[int(i)].as_py()] for i in whole.ids])
            assert np.array_equal(
                np.concatenate([part.row_weights for part in parts if part.weight]), whole.row_weights
            )
        else:
            assert whole.row_weights is None


@pytest.mark.parametrize("sampling", [{}, {"weighted": "balanced"}])
@pytest.mark.parametrize(("steps", "left_out"), [(19, []), (11, []), (19, [2, 3]), (13, [12, 0])])
def test_what_a_run_used_is_compared_with_its_plan(sampling: dict[str, str], steps: int, left_out: list[int]) -> None:
    """To the end, stopped early, or with batches left out; one batch more or less does not pass."""
    ranks = [weighed(rank, 2, **sampling) for rank in range(2)]
    ledger = SampleLedger()
    for plan, _ in ranks:
        for step in range(steps):
            if step not in left_out:
                plan.take(step)
        ledger.merge(plan.account())
    samples = ledger.to_json()

    def agrees(**changed: Any) -> bool:
        asked = {"epochs": 3, "global_batch": 8, "steps": steps, "left_out": left_out, **changed}
        return samples_as_planned(samples, ranks[0][1], **asked)

    assert agrees()
    assert not agrees(left_out=[*left_out, 5])
    assert not agrees(steps=steps - 2)
