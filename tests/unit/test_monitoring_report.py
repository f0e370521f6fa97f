"""History, summary and report of a run folder, whole or with pieces missing."""

from __future__ import annotations

import io
import json
import math
import re
from html.parser import HTMLParser

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from run_folder import build_run, put_json

from lepton_ray.errors import IntegrityError, NotFoundError
from lepton_ray.monitoring import figures, figures_text
from lepton_ray.monitoring.history import read_evaluations, read_history
from lepton_ray.monitoring.report import write_report
from lepton_ray.monitoring.runs import list_runs, read_record
from lepton_ray.monitoring.summary import summary
from lepton_ray.storage import Store

VOID = {"meta", "br", "hr", "img", "link", "input"}


class Page(HTMLParser):
    """The page's elements, attributes and ids, with the nesting checked."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self.feed(html)
        self.close()
        assert self.open == [], f"not closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_startendtag(tag, attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def report(store: Store, run: str) -> Page:
    html = store.get(write_report(store, run)).decode()
    assert len(html) < 400_000
    return Page(html)


def test_report_shows_the_run(file_store):
    built = build_run(file_store)
    page = report(file_store, built.run)
    for words in ("digits-cnn", "finished", "97.80%", "57.6%", "digits:3", "digits@0", "756", "restarting", "replayed"):
        assert words in page.text, words
    assert "learning_rate: 0.002" in page.text
    assert "each training row used exactly once in each epoch" in page.text
    assert re.search(r"401.756", page.text)


def test_report_needs_nothing_else(file_store):
    """No scripts, no links to elsewhere, no ids twice; both colour schemes; a policy that forbids the rest."""
    built = build_run(file_store)
    html = file_store.get(write_report(file_store, built.run)).decode()
    page = Page(html)
    assert not page.tags & {"script", "link", "iframe", "object", "embed", "img", "a", "form"}
    for name, value in page.attributes:
        assert not name.startswith("on")
        if name in ("href", "src", "xlink:href"):
            assert value is not None
            assert value.startswith("#"), value
    ids = [value for name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    assert {f"#{each}" for each in ids} >= {value for name, value in page.attributes if name == "xlink:href"}
    assert "prefers-color-scheme:dark" in html
    assert "default-src 'none'" in html
    assert 'name="viewport"' in html
    assert not re.search(r"#0[1-9a]0[1-9a]0[1-9a]", html), "a marker colour was left"
    assert html.count("<svg") == 5


@pytest.mark.parametrize("state", ["running", "failed", "interrupted"])
def test_report_of_unfinished_run(file_store, state):
    built = build_run(file_store, state=state)
    page = report(file_store, built.run)
    assert state in page.text
    assert ("no space left on device" in page.text) == (state == "failed")
    assert "none published" in page.text


def test_markup_in_a_run_stays_text(file_store):
    """What a worker or user wrote is shown, never run."""
    built = build_run(file_store, state="failed")
    bad = "<script>alert(1)</script>$x^2$"
    built.record.update(error=bad, task=bad, table=bad, metrics={bad: 0.5}, model_version=bad)
    built.record["attempts"][0]["driver"] = bad
    put_json(file_store, f"runs/{built.run}/record.json", built.record)
    evaluations = [{"step": 5, "epoch": 0, "metrics": {bad: 0.5}}, {"step": 9, "epoch": 1, "metrics": {bad: 0.6}}]
    file_store.put(f"runs/{built.run}/metrics/evaluations-g9.json", json.dumps(evaluations).encode())
    page = report(file_store, built.run)
    assert "script" not in page.tags
    assert page.text.count(bad) >= 5


def test_report_of_bare_record(file_store):
    """A run that has nothing but its first record is a page of absent things, not a crash."""
    put_json(file_store, "runs/bare/record.json", {"created_at": 1_700_000_000.0})
    page = report(file_store, "bare")
    assert "unknown state" in page.text
    assert "not recorded" in page.text
    assert "None is committed." in page.text


def test_damaged_pieces_are_shown_as_absent(file_store):
    built = build_run(file_store)
    folder = f"runs/{built.run}"
    for key in ("metrics/history-g1.parquet", "metrics/history-g2.parquet", "metrics/evaluations-g1.json"):
        file_store.put(f"{folder}/{key}", b"PAR1 but not really")
    file_store.put(f"{folder}/ledger/g1-rank0.json", b"{")
    file_store.put(f"{folder}/spec.yaml", b"\xff\xfe\x00")
    file_store.put(f"{folder}/checkpoints/step-{700:012d}/manifest.json", b"[]")
    page = report(file_store, built.run)
    assert "97.80%" in page.text
    assert "Throughput" not in page.text
    found = summary(file_store, built.run)
    assert found["samples_per_second"] is None
    assert [each["step"] for each in found["checkpoints"]] == [600, 500, 400, 300, 200, 100]


def test_unknown_run_names_the_nearest(file_store):
    build_run(file_store, epochs=1, steps_per_epoch=10, lost_at=None)
    with pytest.raises(NotFoundError, match="did you mean 'digits-cnn'"):
        write_report(file_store, "digits-cmm")
    with pytest.raises(NotFoundError, match="no name of a run"):
        write_report(file_store, "../etc")
    assert list_runs(file_store) == ["digits-cnn"]


@pytest.mark.parametrize("data", [b"", b"7", b"{}", b'{"created_at": "soon"}', b"[" * 50_000])
def test_damaged_record_is_told(file_store, data):
    file_store.put("runs/broken/record.json", data)
    with pytest.raises(IntegrityError, match=r"runs/broken/record\.json"):
        read_record(file_store, "broken")


def test_history_joins_worker_groups(file_store):
    """Steps done again count once, as the newest group did them; a run's history is in order."""
    built = build_run(file_store)
    history = read_history(file_store, built.run)
    assert history["step"] == sorted(set(history["step"]))
    assert history["step"][-1] == 756
    assert len({len(values) for values in history.values()}) == 1
    newest = pq.read_table(io.BytesIO(file_store.get(f"runs/{built.run}/metrics/history-g2.parquet")))
    place = history["step"].index(410)
    assert history["time"][place] == newest.filter(pa.compute.equal(newest["step"], 410))["time"][0].as_py()
    evaluations = read_evaluations(file_store, built.run)
    assert [each["epoch"] for each in evaluations] == list(range(1, 13))


def test_history_ends_where_the_newest_group_is(file_store):
    """Steps that a lost group had done beyond the newest one's are not shown until they are done again."""
    for generation, steps in ((1, [10, 20, 30, 40]), (2, [30])):
        sink = io.BytesIO()
        pq.write_table(pa.table({"step": steps, "loss": [float(generation)] * len(steps)}), sink)
        file_store.put(f"runs/digits/metrics/history-g{generation}.parquet", sink.getvalue())
    history = read_history(file_store, "digits")
    assert (history["step"], history["loss"]) == ([10, 20, 30], [1.0, 1.0, 2.0])


def test_not_a_number_in_a_record_is_absent(file_store):
    """A run that diverged has no loss to show, and its JSON stays strict."""
    built = build_run(file_store, epochs=2, lost_at=None)
    text = json.dumps({**built.record, "metrics": {"loss": math.nan, "accuracy": 0.1}})
    file_store.put(f"runs/{built.run}/record.json", text.encode())
    found = summary(file_store, built.run)
    assert found["metrics"] == {"loss": None, "accuracy": 0.1}
    json.dumps(found, allow_nan=False)


def test_history_takes_plain_numbers_only(file_store):
    """Foreign columns and types are left out; absent values are NaN."""
    table = pa.table(
        {"step": [1, 2], "epoch": [0, 0], "loss": ["a", "b"], "time": [1.0, None], "extra": [{"a": 1}] * 2}
    )
    sink = io.BytesIO()
    pq.write_table(table, sink)
    file_store.put("runs/digits/metrics/history-g1.parquet", sink.getvalue())
    history = read_history(file_store, "digits")
    assert history["step"] == [1, 2]
    assert all(map(math.isnan, history["loss"]))
    assert math.isnan(history["time"][1])
    assert "extra" not in history


def test_long_history_stays_small():
    """A million rows become a chart of some kilobytes that still ends at the last step."""
    steps = list(range(0, 1_000_000, 5))
    history = {
        "step": steps,
        "loss": [2.0 / (1 + step / 1000) for step in steps],
        "samples_per_second": [1.0] * 200_000,
    }
    chart = figures.loss_chart(history, [])
    assert chart.startswith("<svg")
    assert len(chart) < 40_000


def test_the_wait_for_the_exchange_stands_beside_the_rest_of_backward():
    """Its seconds are a share of backward's: the stack is as high as the step is long, and not higher."""
    history = {"step": [10, 20], "forward": [0.001] * 2, "backward": [0.004] * 2, "collective": [0.003] * 2}
    chart = figures.parts_chart(history)
    assert "collective" in chart
    assert "5 ms" in chart
    assert "8 ms" not in chart, "forward, backward and the wait again"
    assert "collective" not in figures.parts_chart({name: history[name] for name in ("step", "forward", "backward")})


def test_charts_of_nothing_are_empty():
    assert figures.loss_chart({}, []) == ""
    assert figures.evaluation_chart([]) == ""
    assert figures.throughput_chart({"step": [1], "samples_per_second": [math.nan]}) == ""
    assert figures.parts_chart({"step": [1, 2], "forward": [math.nan, math.nan]}) == ""


@pytest.mark.parametrize(
    ("made", "expected"),
    [
        (figures_text.duration(0.0339), "33.9 ms"),
        (figures_text.duration(45.61), "45.6 s"),
        (figures_text.duration(134), "2 min 14 s"),
        (figures_text.duration(11_100), "3 h 05 min"),
        (figures_text.duration(187_200), "2 d 4 h"),
        (figures_text.duration(None), "-"),
        (figures_text.brief_duration(45.61), "45.6 s"),
        (figures_text.brief_duration(134), "2m 14s"),
        (figures_text.brief_duration(11_100), "3h 05m"),
        (figures_text.brief_duration(187_200), "2d 4h"),
        (figures_text.percent(0.5758), "57.6%"),
        (figures_text.percent(math.nan), "-"),
        (figures_text.score("accuracy", 0.978), "97.80%"),
        (figures_text.score("loss", 0.0830070812), "0.08301"),
        (figures_text.number(1860.27), "1,860"),
        (figures_text.number(True), "-"),
        (figures_text.data_size(2_811_904), "2.68 MiB"),
        (figures_text.clock_time(0), "1970-01-01 00:00:00 UTC"),
        (figures_text.clock_time(1e20), "-"),
    ],
)
def test_figures_read_well(made, expected):
    assert made == expected
