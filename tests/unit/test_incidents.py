"""Incidents are kept with the run, bounded, listed by `runs show` and counted by the exporter."""

from __future__ import annotations

import json
import math

from click.testing import CliRunner
from run_folder import build_run

from lepton_ray.cli.runs import runs
from lepton_ray.errors import UnavailableError
from lepton_ray.monitoring.gather import Gatherer
from lepton_ray.monitoring.incidents import (
    INCIDENT_KINDS,
    MAX_INCIDENTS,
    MAX_TEXT,
    Incident,
    count_incidents,
    incidents,
    newest_of,
    report,
)
from lepton_ray.storage import Store


def hang(**changes: object) -> Incident:
    values = {"kind": "hang", "reason": "rank 1 is stopped", "at": 1000.5, "attempt": 1, "generation": 2, "rank": 1}
    return Incident(**{**values, "step": 40, "evidence": {"stacks": {"0": "in backward"}}, **changes})


def test_incidents_are_read_as_they_were_reported_oldest_first(store: Store) -> None:
    first, second = hang(), hang(kind="error", at=2000.0, rank=None, step=None, generation=None, evidence={})
    report(store, "digits", second)
    report(store, "digits", first)
    assert incidents(store, "digits") == [first, second]
    assert incidents(store, "other") == []
    assert newest_of(store, "digits", "hang") == first
    assert newest_of(store, "digits", "straggler") is None
    counted = count_incidents(store, "digits")
    assert {kind: count for kind, count in counted.items() if count} == {"hang": 1, "error": 1}
    assert tuple(counted) == INCIDENT_KINDS


def test_what_json_cannot_hold_is_kept_as_text_and_long_texts_are_cut(file_store: Store) -> None:
    evidence = {"speed": math.inf, "error": ValueError("bad"), "stack": "x" * (2 * MAX_TEXT), "deep": {"a": [{1}]}}
    report(file_store, "digits", hang(evidence=evidence, reason="line one\nline two\x1b[31m"))
    [found] = incidents(file_store, "digits")
    assert found.reason == "line one line two\\x1b[31m"
    assert found.evidence["speed"] == "inf"
    assert found.evidence["error"] == "bad"
    assert found.evidence["deep"] == {"a": [[1]]}
    assert MAX_TEXT < len(found.evidence["stack"]) < MAX_TEXT + 100
    report(file_store, "digits", hang(at=2000.0, evidence={str(number): "y" * MAX_TEXT for number in range(60)}))
    assert "left_out" in incidents(file_store, "digits")[1].evidence


def test_a_report_never_raises() -> None:
    class Away:
        def put_if_absent(self, key: str, data: bytes) -> str:
            raise UnavailableError("away")

    report(Away(), "digits", hang())  # type: ignore[arg-type]


def test_damaged_and_foreign_files_are_left_out(file_store: Store) -> None:
    report(file_store, "digits", hang())
    folder = "runs/digits/incidents"
    file_store.put(f"{folder}/0000002000000-hang-00000000.json", b"{")
    file_store.put(f"{folder}/0000002000000-hang-00000001.json", b'{"kind": "hang", "at": "x"}')
    file_store.put(f"{folder}/0000002000000-tiredness-00000002.json", b"{}")
    file_store.put(f"{folder}/notes.txt", b"")
    assert incidents(file_store, "digits") == [hang()]


def test_only_the_newest_are_read(file_store: Store) -> None:
    for number in range(MAX_INCIDENTS + 5):
        report(file_store, "digits", hang(at=1000.0 + number, evidence={}))
    found = incidents(file_store, "digits")
    assert [found[0].at, found[-1].at, len(found)] == [1005.0, 1204.0, MAX_INCIDENTS]
    assert count_incidents(file_store, "digits")["hang"] == MAX_INCIDENTS + 5


def test_runs_show_lists_them_in_words_and_as_json(file_store: Store) -> None:
    built = build_run(file_store)
    report(file_store, built.run, hang())
    arguments = ["show", built.run, "--store", file_store.uri]
    words = CliRunner().invoke(runs, arguments).stdout
    assert "hang" in words
    assert "rank 1 is stopped" in words
    [found] = json.loads(CliRunner().invoke(runs, [*arguments, "--json"]).stdout)["incidents"]
    assert (found["kind"], found["rank"], found["step"]) == ("hang", 1, 40)
    assert found["evidence"]["stacks"] == {"0": "in backward"}


def test_the_exporter_counts_them_by_kind(file_store: Store) -> None:
    """Every kind has a series from the start, so that the first incident is seen as a growth."""
    built = build_run(file_store)
    report(file_store, built.run, hang())
    report(file_store, built.run, hang(at=1001.0))
    joined = Gatherer(file_store, retain_s=1e12).refresh()
    shown = {labels[1]: value for (name, labels), value in joined.samples.items() if name == "lepton_incidents_total"}
    assert shown == {kind: 2.0 if kind == "hang" else 0.0 for kind in INCIDENT_KINDS}
