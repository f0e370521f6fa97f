"""The memory of a search: what is written can be gone on with, by one driver at a time."""

from __future__ import annotations

import json
import math

import pytest

from lepton_ray.errors import IntegrityError, RefusedError, UsageError
from lepton_ray.settings import Settings, parse_settings
from lepton_ray.storage import Store
from lepton_ray.tuning.journal import Journal, known_table_version
from lepton_ray.tuning.trials import (
    FAILED,
    FINISHED,
    RUNNING,
    STOPPED,
    WORST,
    Evaluation,
    Segment,
    Trial,
    best_of,
    objective,
    run_name,
)

FACTS = {"metric": "accuracy", "direction": "max", "table_version": 4}


def settings(seed: int = 0) -> Settings:
    space = {"training.optimizer.learning_rate": {"choice": [0.1, 0.2]}}
    return parse_settings({"run": "search", "tuning": {"trials": 2, "seed": seed, "space": space}})


def trial(number: int, value: float | None = None, state: str = FINISHED) -> Trial:
    return Trial(number, (Segment(run_name("search", number), {"x": 1}),), state, value=value)


def test_what_was_written_is_read_by_the_next_driver(store: Store) -> None:
    """On files and on S3; a metric that is no number comes back as one that is none."""
    first = Journal(store, "search")
    assert first.open(settings()) is False
    first.begin(settings(), **FACTS)
    segments = (Segment("search-t000", {"x": 0.1}), Segment("search-t000-p2", {"x": [1, None]}, 2, "search-t001"))
    evaluations = (Evaluation(1, {"accuracy": 0.5, "loss": math.nan}), Evaluation(2, {"accuracy": 0.75, "loss": 1.0}))
    first.keep(Trial(0, segments[:1]))
    first.keep(Trial(0, segments, RUNNING, evaluations, 0.75, None, 1.5))
    first.keep(trial(1, None, FAILED))

    second = Journal(store, "search")
    assert second.open(settings()) is True
    assert [each.name for each in second.in_order()] == ["t000", "t001"]
    found = second.trials[0]
    assert found.segments == segments
    assert (found.run, found.epoch, found.value, found.seconds) == ("search-t000-p2", 2, 0.75, 1.5)
    assert math.isnan(found.evaluations[0].metrics["loss"])
    assert found.evaluations[1] == evaluations[1]
    assert known_table_version(store, "search") == 4
    assert known_table_version(store, "other") is None
    for entry in store.list("tunings/search"):
        json.loads(store.get(entry.key), parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))


def test_a_search_with_other_settings_is_refused(file_store: Store) -> None:
    Journal(file_store, "search").begin(settings(), **FACTS)
    with pytest.raises(UsageError, match=r"tuning search was started otherwise: tuning.seed was 0, is 1"):
        Journal(file_store, "search").open(settings(seed=1))


def test_two_drivers_do_not_write_one_journal(file_store: Store) -> None:
    """The first one's next word is refused once a second one has begun."""
    first, second = Journal(file_store, "search"), Journal(file_store, "search")
    first.begin(settings(), **FACTS)
    second.open(settings())
    second.begin(settings())
    second.keep(trial(0))
    with pytest.raises(RefusedError, match="another driver"):
        first.keep(trial(0))
    with pytest.raises(RefusedError, match="another driver"):
        first.update(state="finished")


@pytest.mark.parametrize("content", [b"{", b"[]", b'{"number": 0}', b'{"number": "x", "segments": []}'])
def test_a_damaged_file_is_named(file_store: Store, content: bytes) -> None:
    Journal(file_store, "search").begin(settings(), **FACTS)
    file_store.put("tunings/search/trials/t000.json", content)
    with pytest.raises(IntegrityError, match=r"tunings/search/trials/t000.json"):
        Journal(file_store, "search").open(settings())


def test_the_best_is_a_finished_trial_in_the_metric_s_direction() -> None:
    """Stopped, failed and worthless ones are out, and of equals the first wins."""
    trials = [trial(0, 0.5), trial(1, 0.9), trial(2, 0.9), trial(3, 0.99, STOPPED), trial(4, None, FAILED)]
    best, least = best_of(trials, "max"), best_of(trials, "min")
    assert best is not None
    assert least is not None
    assert (best.number, least.number) == (1, 0)
    assert best_of(trials[3:], "max") is None


@pytest.mark.parametrize(("direction", "worst"), [("max", -WORST), ("min", WORST)])
def test_a_value_that_is_no_number_counts_as_the_worst(direction: str, worst: float) -> None:
    assert objective(math.nan, direction) == worst  # type: ignore[arg-type]
    assert objective(math.inf, direction) == worst  # type: ignore[arg-type]
    assert objective(0.25, direction) == 0.25  # type: ignore[arg-type]


def test_run_names_fit_the_rule_for_names() -> None:
    assert run_name("digits", 7) == "digits-t007"
    assert run_name("digits", 1234, 2) == "digits-t1234-p2"
    assert len(run_name("a" * 58, 1)) == 63
    with pytest.raises(UsageError, match="shorten it"):
        run_name("a" * 59, 1)
