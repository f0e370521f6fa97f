"""The Grafana dashboards as JSON, made from `panels` with Grafana's own library (extra `dashboards`).

`python -m lepton_ray.monitoring.dashboards FOLDER` writes a file for each; those of the chart lie in
`helm/lepton-ray/files/dashboards`, and a test holds them equal to what this gives.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from lepton_ray.errors import UsageError
from lepton_ray.monitoring.panels import DASHBOARDS, Dashboard, Panel

HEIGHTS = {"number": 4}
HEIGHT = 8
"""Grid rows of a panel that is no number."""


def dashboard_json(told: Dashboard) -> str:
    """A dashboard as Grafana imports it. Raises UsageError where Grafana's library is not installed."""
    try:
        from grafana_foundation_sdk.builders import dashboard as builders
        from grafana_foundation_sdk.cog.encoder import JSONEncoder
        from grafana_foundation_sdk.models import dashboard as models
    except ImportError as error:
        raise UsageError(
            "dashboards need package grafana-foundation-sdk; pip install 'lepton-ray[dashboards]'"
        ) from error

    source = models.DataSourceRef(type_val="prometheus", uid="${datasource}")
    made = builders.Dashboard(told.title).uid(told.uid).description(told.help).tags(list(told.tags))
    made = made.refresh("10s").time("now-1h", "now").timezone("browser").readonly()
    made = made.tooltip(models.DashboardCursorSync.CROSSHAIR)
    made = made.with_variable(builders.DatasourceVariable("datasource").label("Prometheus").type("prometheus"))
    for variable in told.variables:
        chosen = builders.QueryVariable(variable.name).query(variable.query).datasource(source)
        chosen = chosen.refresh(models.VariableRefresh.ON_TIME_RANGE_CHANGED).sort(models.VariableSort.ALPHABETICAL_ASC)
        made = made.with_variable(chosen.multi(True).include_all(True).all_value(".*"))
    if told.restarts:
        mark = builders.AnnotationQuery().name("Restarts").datasource(source).enable(True).icon_color("orange")
        made = made.annotation(mark.expr('changes(lepton_run_failures{run=~"$run"}[1m]) > 0'))
    for row in told.rows:
        made = made.with_row(builders.Row(row.title))
        for panel in row.panels:
            made = made.with_panel(_panel(panel, source))
    return json.dumps(made.build(), cls=JSONEncoder, indent=1, sort_keys=True) + "\n"


def _panel(told: Panel, source: Any) -> Any:
    """Grafana's panel."""
    from grafana_foundation_sdk.builders import bargauge, common, heatmap, prometheus, stat, timeseries
    from grafana_foundation_sdk.models.common import StackingMode, VizOrientation

    makers: dict[str, Any] = {
        "lines": timeseries.Panel, "stacked": timeseries.Panel, "bars": bargauge.Panel, "number": stat.Panel,
        "heat": heatmap.Panel,
    }  # fmt: skip
    made = makers[told.kind]().title(told.title).description(told.help).datasource(source).unit(told.unit)
    made = made.span(told.width).height(HEIGHTS.get(told.kind, HEIGHT))
    if told.kind in ("lines", "stacked", "bars"):
        made = made.min(0)
    if told.top is not None:
        made = made.max(told.top)
    if told.kind == "stacked":
        made = made.stacking(common.StackingConfig().mode(StackingMode.NORMAL)).fill_opacity(60).line_width(0)
    if told.kind == "bars":
        made = made.orientation(VizOrientation.HORIZONTAL)
    for place, figure in enumerate(told.figures):
        query = prometheus.Dataquery().expr(figure.expression).ref_id(chr(ord("A") + place)).datasource(source)
        query = query.legend_format(figure.legend or "__auto")
        if told.kind in ("number", "bars"):
            query = query.instant()
        if told.kind == "heat":
            query = query.format(_heat_format())
        made = made.with_target(query)
    return made


def _heat_format() -> Any:
    from grafana_foundation_sdk.models.prometheus import PromQueryFormat

    return PromQueryFormat.HEATMAP


def write(folder: Path) -> list[Path]:
    """Write all dashboards; their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for told in DASHBOARDS:
        paths.append(folder / f"{told.uid}.json")
        paths[-1].write_text(dashboard_json(told), encoding="utf-8")
    return paths


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.stderr.write("usage: python -m lepton_ray.monitoring.dashboards FOLDER\n")
        sys.exit(2)
    write(Path(sys.argv[1]))
