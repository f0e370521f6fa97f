"""Rows weighed by class: what each row's loss counts, which rows are drawn, and that both can be computed again."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lepton_ray.data.order import SampleLedger, SampleOrder
from lepton_ray.data.sampling import BalancedOrder, expected_ledger, plan_sampling
from lepton_ray.errors import UsageError
from lepton_ray.settings.training import SamplingSettings

LABELS = pa.chunked_array([["cat"] * 6, ["dog"] * 3, ["owl"]])


def test_nothing_asked_for_is_the_plain_order() -> None:
    planned = plan_sampling(SamplingSettings(), 10, seed=3)
    assert planned.row_weights is None
    assert np.array_equal(planned.order.sample_ids(0, 30), SampleOrder(10, 3).sample_ids(0, 30))


def test_balanced_weights_give_every_class_the_same_say() -> None:
    """Rows / (classes x rows of the class): each class has the same sum, and the mean over the rows is 1."""
    weights = plan_sampling(SamplingSettings(class_weights="balanced"), 10, 0, LABELS).row_weights
    assert weights is not None
    assert weights.dtype == np.float32
    assert weights[:6].sum() == pytest.approx(weights[6:9].sum()) == pytest.approx(weights[9])
    assert weights.mean() == pytest.approx(1.0)


def test_given_weights_go_by_label() -> None:
    """Labels that are numbers are named as text; what is not named counts 1."""
    labels = pa.array([7, 7, 12, 3])
    weights = plan_sampling(SamplingSettings(class_weights={"12": 4.0, "3": 0.0}), 4, 0, labels).row_weights
    assert weights is not None
    assert weights.tolist() == [1.0, 1.0, 4.0, 0.0]


@pytest.mark.parametrize(
    ("given_weights", "labels", "message"),
    [
        ({"dgo": 2.0}, LABELS, "class_weights.dgo: no training row has this label; did you mean 'dog'"),
        ({"zebra": 2.0}, LABELS, "classes there: 'cat, dog, owl'"),
        ({"dog": -1.0}, LABELS, "expected 0 or more"),
        ({"dog": float("inf")}, LABELS, "expected 0 or more"),
        ({"cat": 0.0, "dog": 0.0, "owl": 0.0}, LABELS, "every training row has weight 0"),
        ("balanced", None, "the rows have no labels"),
        ("balanced", pa.array([0.5] * 10), "the labels are double"),
        ("balanced", pa.array(["a"] * 9 + [None]), "a row has no label"),
    ],
)
def test_what_cannot_be_weighed_is_refused(given_weights: object, labels: object, message: str) -> None:
    wanted = SamplingSettings.model_construct(class_weights=given_weights, weighted="none")
    with pytest.raises(UsageError, match=message):
        plan_sampling(wanted, 10, 0, labels)


@pytest.mark.parametrize("counts", [[600, 300, 1], [5, 5], [1, 1, 1, 1], [400]])
def test_balanced_draws_take_every_class_equally_often(counts: list[int]) -> None:
    """In each epoch to within one row; in shuffled places, so that parts of an epoch are balanced too."""
    codes = np.repeat(np.arange(len(counts)), counts)
    order = BalancedOrder(codes, seed=5)
    for epoch in range(3):
        drawn = codes[order.sample_ids(epoch * len(codes), len(codes))]
        found = np.bincount(drawn, minlength=len(counts))
        assert found.max() - found.min() <= 1
    if len(codes) > 800:
        half = np.bincount(codes[order.sample_ids(0, 450)], minlength=3) / 450
        assert np.abs(half - 1 / 3).max() < 0.06


def test_balanced_draws_take_each_row_of_a_class_with_the_same_chance() -> None:
    """With replacement: 30,000 draws of 30 rows hit each 1,000 times, give or take what chance allows (5 sigma)."""
    codes = np.array([0] * 30 + [1] * 30)
    drawn = BalancedOrder(codes, seed=1).sample_ids(0, 60_000)
    hits = np.bincount(drawn, minlength=60)
    assert np.abs(hits - 1000).max() < 5 * np.sqrt(1000)
    epoch = np.bincount(drawn[:60], minlength=60)
    assert epoch.max() > 1, "some row twice within an epoch"


@settings(max_examples=50, deadline=None)
@given(
    codes=st.lists(st.integers(0, 3), min_size=1, max_size=60),
    seed=st.integers(0, 2**63 - 1),
    offset=st.integers(0, 500),
    count=st.integers(0, 200),
)
def test_a_draw_depends_on_its_offset_alone(codes: list[int], seed: int, offset: int, count: int) -> None:
    """Asked for at once or one by one, from anywhere: a resumed run draws what the undisturbed one drew."""
    _, dense = np.unique(np.array(codes), return_inverse=True)
    order = BalancedOrder(dense.astype(np.int64), seed)
    whole = order.sample_ids(0, offset + count)
    assert np.array_equal(order.sample_ids(offset, count), whole[offset:])
    singly = [int(order.sample_ids(at, 1)[0]) for at in range(offset, offset + min(count, 5))]
    assert singly == whole[offset : offset + 5].tolist()[: len(singly)]


def test_another_seed_draws_otherwise() -> None:
    codes = np.repeat(np.arange(2), 50)
    assert not np.array_equal(BalancedOrder(codes, 1).sample_ids(0, 100), BalancedOrder(codes, 2).sample_ids(0, 100))


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 50),
    samples=st.integers(0, 180),
    gaps=st.lists(st.tuples(st.integers(0, 30), st.just(6)), max_size=4, unique_by=lambda gap: gap[0]),
    balanced=st.booleans(),
)
def test_the_expected_account_is_that_of_using_each_sample_once(
    rows: int, samples: int, gaps: list[tuple[int, int]], balanced: bool
) -> None:
    """Also for an epoch cut short, and without the batches that were left out."""
    order = BalancedOrder(np.arange(rows, dtype=np.int64) % 2 if rows > 1 else np.zeros(1, np.int64), 4)
    used = SampleLedger()
    left_out = [(number * size, (number + 1) * size) for number, size in gaps]
    chosen = order if balanced else SampleOrder(rows, 4)
    for at in range(samples):
        if not any(first <= at < last for first, last in left_out):
            used.add(chosen.epochs_of(at, 1), chosen.sample_ids(at, 1))
    assert expected_ledger(chosen, samples, left_out) == used
