"""Snapshots: what is damaged or foreign is left out, what fits is added up."""

from __future__ import annotations

import copy
import json
import math

import pytest

from lepton_ray.monitoring.catalogue import LABELS
from lepton_ray.monitoring.recorder import Recorder
from lepton_ray.monitoring.snapshot import Distribution, Joined, parse_snapshot

RUN = {"run": "digits"}


def snapshot(rank: int = 0, steps: int = 3, **labels: str) -> dict:
    """A snapshot as it comes back from the store."""
    recorder = Recorder("file:///nowhere", "k", {"run": "digits", "rank": str(rank), **labels})
    for step in range(steps):
        recorder.step(step, 0.02, 32)
    recorder.set("lepton_training_loss", math.nan)
    recorder.set("lepton_training_evaluation", 0.9, metric="accuracy")
    return json.loads(json.dumps(recorder.snapshot()))


def test_round_trip_keeps_every_value():
    parsed = parse_snapshot(snapshot(), RUN)
    assert parsed.dropped == ()
    assert parsed.samples["lepton_training_steps_total", ("digits",)] == 3.0
    assert parsed.samples["lepton_training_evaluation", ("digits", "accuracy")] == 0.9
    assert math.isnan(parsed.samples["lepton_training_loss", ("digits",)])
    times = parsed.samples["lepton_training_step_seconds", ("digits", "0")]
    assert isinstance(times, Distribution)
    assert (sum(times.counts), round(times.total, 9), times.bounds[-1]) == (3, 0.06, math.inf)


@pytest.mark.parametrize(
    "value",
    [
        None,
        [],
        {},
        {"version": 2, "labels": {}, "families": [], "written_at": 1.0},
        {"version": 1, "labels": [], "families": [], "written_at": 1.0},
        {"version": 1, "labels": {}, "families": {}, "written_at": 1.0},
        {"version": 1, "labels": {}, "families": [], "written_at": "now"},
        {"version": 1, "labels": {}, "families": [], "written_at": -1},
        {"version": 1, "labels": {}, "families": [], "written_at": "NaN"},
    ],
)
def test_foreign_json_is_no_snapshot(value):
    with pytest.raises((ValueError, TypeError)):
        parse_snapshot(value, RUN)


def damage(change) -> dict:
    value = copy.deepcopy(snapshot())
    change({family["name"]: family for family in value["families"]})
    return value


@pytest.mark.parametrize(
    ("family", "change"),
    [
        ("lepton_training_steps_total", lambda it: it.update(name="rm_rf_total")),
        ("lepton_training_steps_total", lambda it: it.update(kind="gauge")),
        ("lepton_training_steps_total", lambda it: it.update(samples="many")),
        ("lepton_training_steps_total", lambda it: it["samples"][0].update(value=-1)),
        ("lepton_training_steps_total", lambda it: it["samples"][0].update(value="NaN")),
        ("lepton_training_steps_total", lambda it: it["samples"][0].update(value="many")),
        ("lepton_training_steps_total", lambda it: it["samples"][0].update(value=True)),
        ("lepton_training_steps_total", lambda it: it["samples"].__setitem__(0, 7)),
        ("lepton_training_evaluation", lambda it: it["samples"][0].update(labels={})),
        ("lepton_training_evaluation", lambda it: it["samples"][0].pop("labels")),
        ("lepton_training_step_seconds", lambda it: it["samples"][0].update(buckets=[[1, 2]])),
        ("lepton_training_step_seconds", lambda it: it["samples"][0].update(sum=-1)),
        ("lepton_training_step_seconds", lambda it: it["samples"][0]["buckets"][0].__setitem__(1, -5)),
        ("lepton_training_step_seconds", lambda it: it["samples"][0].pop("buckets")),
    ],
)
def test_damaged_family_is_left_out_alone(family, change):
    """The fault is named, and everything else of the snapshot is there."""
    whole = parse_snapshot(snapshot(), RUN).samples
    parsed = parse_snapshot(damage(lambda families: change(families[family])), RUN)
    assert parsed.dropped
    assert {name for name, _ in whole} - {name for name, _ in parsed.samples} == {family}


def test_place_decides_the_run_label():
    """A snapshot that claims to be another run's is shown under the run whose folder it lies in."""
    value = snapshot(run="somebody-else")
    for family in value["families"]:
        for sample in family["samples"]:
            sample["labels"]["run"] = "a-third"
    parsed = parse_snapshot(value, RUN)
    assert {labels[0] for name, labels in parsed.samples if name.startswith("lepton_training")} == {"digits"}


def test_counters_add_and_newest_gauge_wins():
    older, newer = parse_snapshot(snapshot(steps=3), RUN), parse_snapshot(snapshot(steps=5), RUN)
    key = ("lepton_training_step", ("digits",))
    joined = Joined()
    for each in (newer, older):
        joined.add(each, live=True)
    assert joined.samples["lepton_training_steps_total", ("digits",)] == 8.0
    assert joined.samples[key] == newer.samples[key] == 4.0
    times = joined.samples["lepton_training_step_seconds", ("digits", "0")]
    assert isinstance(times, Distribution)
    assert sum(times.counts) == 8


def test_dead_process_leaves_counters_only():
    """The memory of a process that no longer reports is gone; what it counted stays."""
    joined = Joined()
    joined.add(parse_snapshot(snapshot(), RUN), live=False)
    names = {name for name, _ in joined.samples}
    assert "lepton_process_resident_memory_bytes" not in names
    assert {"lepton_process_cpu_seconds_total", "lepton_training_loss"} <= names


def test_ranks_beyond_the_bound_are_joined():
    """The sum over ranks stays exact; the number of series does not grow with the cluster."""
    joined = Joined()
    bound = LABELS["rank"].bound
    for rank in range(bound + 50):
        joined.add(parse_snapshot(snapshot(rank, steps=1), RUN), live=True)
    counts = {
        labels[1]: sum(value.counts)
        for (name, labels), value in joined.samples.items()
        if name == "lepton_training_step_seconds" and isinstance(value, Distribution)
    }
    assert len(counts) == bound + 1
    assert counts["other"] == 50
    assert joined.samples["lepton_training_samples_total", ("digits",)] == 32.0 * (bound + 50)
