"""Dashboards: what is shipped is what the declarations give, panels read known metrics and find room."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lepton_ray.monitoring.alerts import metrics_in
from lepton_ray.monitoring.catalogue import METRICS
from lepton_ray.monitoring.dashboards import dashboard_json
from lepton_ray.monitoring.panels import DASHBOARDS, Dashboard

FILES = Path(__file__).parents[2] / "helm" / "lepton-ray" / "files" / "dashboards"
NOT_SHOWN = {
    "lepton_run_info", "lepton_run_attempts", "lepton_training_samples_total", "lepton_training_epoch",
    "lepton_training_restarts_total", "lepton_training_nonfinite_steps_total", "lepton_checkpoint_committed_total",
    "lepton_checkpoint_interval_seconds", "lepton_checkpoint_interval_steps", "lepton_hot_copy_interval_steps",
    "lepton_preemption_grace_needed_seconds", "lepton_run_updated_timestamp_seconds", "lepton_exporter_build_info",
    "lepton_exporter_source_age_seconds",
}  # fmt: skip
"""Metrics that no panel shows: for alerts, or for a look at one's own."""


@pytest.mark.parametrize("told", DASHBOARDS, ids=lambda told: told.uid)
def test_the_shipped_file_is_what_is_declared(told: Dashboard) -> None:
    assert (FILES / f"{told.uid}.json").read_text(encoding="utf-8") == dashboard_json(told)


def test_nothing_else_is_shipped() -> None:
    assert sorted(path.stem for path in FILES.iterdir()) == sorted(told.uid for told in DASHBOARDS)


def test_panels_read_the_catalogue_and_show_most_of_it() -> None:
    figures = [figure for told in DASHBOARDS for row in told.rows for panel in row.panels for figure in panel.figures]
    read = set().union(*(metrics_in(figure.expression) for figure in figures))
    assert set(METRICS) - read == NOT_SHOWN


@pytest.mark.parametrize("told", DASHBOARDS, ids=lambda told: told.uid)
def test_panels_lie_beside_each_other_and_ask_the_chosen_prometheus(told: Dashboard) -> None:
    made = json.loads(dashboard_json(told))
    places = set()
    for panel in made["panels"]:
        grid = panel["gridPos"]
        cells = {(grid["x"] + x, grid["y"] + y) for x in range(grid["w"]) for y in range(grid["h"])}
        assert grid["x"] + grid["w"] <= 24
        assert not cells & places, panel["title"]
        places |= cells
        if panel["type"] != "row":
            assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
            assert panel["targets"]
    assert {variable["name"] for variable in made["templating"]["list"]} == {
        "datasource", *(variable.name for variable in told.variables)
    }  # fmt: skip
