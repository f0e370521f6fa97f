"""How many ranks a cluster has room for, and when an elastic run grows."""

from __future__ import annotations

import pytest

from lepton_ray.cluster import Cluster
from lepton_ray.errors import UsageError
from lepton_ray.settings.loading import parse_settings
from lepton_ray.training.launch import check_resources, first_workers
from lepton_ray.training.room import Growth, ranks_that_fit

ONE = {"CPU": 1.0}


@pytest.mark.parametrize(
    ("free", "held", "resources", "fits"),
    [
        ({"a": {"CPU": 2.0}, "b": {"CPU": 3.9}}, {}, ONE, 5),
        ({"a": {"CPU": 0.0}, "b": {"CPU": 1.0}}, {"a": 2}, ONE, 3),
        ({"b": {"CPU": 1.0}}, {"a": 2}, ONE, 1),
        ({"a": {"CPU": 8.0, "GPU": 3.0}}, {}, {"CPU": 2.0, "GPU": 1.0}, 3),
        ({"a": {"CPU": 8.0}}, {}, {"CPU": 2.0, "GPU": 1.0}, 0),
        ({"a": {"CPU": 0.9999999}}, {}, ONE, 1),
        ({}, {"a": 4}, ONE, 0),
    ],
)
def test_ranks_that_fit(
    free: dict[str, dict[str, float]], held: dict[str, int], resources: dict[str, float], fits: int
) -> None:
    """Each node holds whole ranks; what the run has there counts, unless the node is gone."""
    assert ranks_that_fit(free, held, resources) == fits


def test_growth_needs_room_without_a_break() -> None:
    """A run grows into what was there all along, and never beyond its most."""
    growth = Growth(most=6, hold_s=10.0)
    assert growth.seen(0.0, 2, 8) is None
    assert growth.seen(9.0, 2, 4) is None
    assert growth.seen(10.0, 2, 9) == 4
    growth.forget()
    assert growth.seen(11.0, 2, 9) is None
    assert growth.seen(20.0, 2, 2) is None
    assert growth.seen(21.0, 2, 9) is None
    assert growth.seen(31.0, 2, 9) == 6


def test_growth_ends_at_the_most() -> None:
    """There is no growth beyond the most, whatever room there is."""
    growth = Growth(most=2, hold_s=0.0)
    assert growth.seen(0.0, 2, 8) is None


def test_the_range_is_checked_against_the_cluster() -> None:
    """A run of 1 to 8 starts on a cluster of 3; one of 4 to 8 is refused, with the number that fits."""
    wide = parse_settings({"training": {"workers": {"min": 1, "max": 8}}}).training
    check_resources(wide, Cluster(local=True), {"CPU": 3.0})
    narrow = parse_settings({"training": {"workers": {"min": 4, "max": 8}}}).training
    with pytest.raises(UsageError, match=r"training\.workers\.min is 4: needs 4 CPU, this machine has 3 CPU; set .* 3"):
        check_resources(narrow, Cluster(local=True), {"CPU": 3.0})


@pytest.mark.parametrize(("room", "first"), [(0, 2), (1, 2), (3, 3), (9, 4)])
def test_a_run_starts_with_what_fits(monkeypatch: pytest.MonkeyPatch, room: int, first: int) -> None:
    """The first group has what there is room for, within the range."""
    monkeypatch.setattr("lepton_ray.training.launch.cluster_room", lambda _: room)
    training = parse_settings({"training": {"workers": {"min": 2, "max": 4}}}).training
    assert first_workers(training, ONE) == first


@pytest.mark.parametrize(
    ("workers", "said"),
    [
        ({"min": 5, "max": 4}, "training.workers is {'min': 5, 'max': 4}: min is 5, more than max (4); lower it"),
        (
            {"maxx": 3},
            "training.workers.max: missing; give it a value; training.workers.maxx: unknown key; did you mean 'max'?",
        ),
        (0, "training.workers is 0: should be greater than or equal to 1"),
        ("two", "training.workers is 'two': should be a valid integer"),
    ],
)
def test_wrong_ranges_are_told_by_their_keys(workers: object, said: str) -> None:
    """No part of the message names anything that is not in the config."""
    with pytest.raises(UsageError) as error:
        parse_settings({"training": {"workers": workers}})
    assert str(error.value) == f"config: {said}"
