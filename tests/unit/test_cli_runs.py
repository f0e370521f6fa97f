"""`lepton-ray runs`: what it prints, for people and as JSON, and how it says no."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from click.testing import CliRunner, Result
from run_folder import build_run

from lepton_ray.cli.exporter import exporter
from lepton_ray.cli.runs import runs
from lepton_ray.errors import LeptonError, NotFoundError
from lepton_ray.storage import Store

HEAVY = ("torch", "ray", "deltalake", "pyarrow", "matplotlib", "jinja2", "prometheus_client")


def run(store: Store, *arguments: str) -> Result:
    result = CliRunner().invoke(runs, [*arguments, "--store", store.uri])
    if isinstance(result.exception, LeptonError):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result


def test_list_shows_newest_first(file_store):
    build_run(file_store, "older", created_at=1_700_000_000.0, epochs=2)
    build_run(file_store, "newer", state="failed", epochs=2)
    file_store.put("runs/broken/record.json", b"7")
    listed = json.loads(run(file_store, "list", "--json").stdout)
    assert [each["run"] for each in listed["runs"]] == ["newer", "older"]
    assert [each["state"] for each in listed["runs"]] == ["failed", "finished"]
    assert len(listed["damaged"]) == 1
    words = run(file_store, "list").stdout
    assert words.index("newer") < words.index("older")
    assert "skipped: 'runs/broken/record.json'" in words


def test_empty_store_names_next_step(file_store):
    assert "lepton-ray train" in run(file_store, "list").stdout
    assert json.loads(run(file_store, "list", "--json").stdout)["runs"] == []


def test_show_adds_up(file_store):
    """The goodput buckets of the JSON add up to wall time x workers; the words show the same table."""
    built = build_run(file_store)
    shown = json.loads(run(file_store, "show", built.run, "--json").stdout)
    goodput = shown["goodput"]
    assert sum(goodput["buckets"].values()) == pytest.approx(goodput["wall_seconds"] * 2)
    assert shown["metrics"] == built.record["metrics"]
    assert [each["last_step"] for each in shown["generations"]] == [430, 756]
    assert goodput["replayed_steps"] == 30
    words = run(file_store, "show", built.run).stdout
    for part in ("finished", "accuracy 97.80%", "compute", "57.6%", "restarting", "step 700", "digits:3"):
        assert part in words


def test_report_prints_where_it_is(file_store):
    built = build_run(file_store, epochs=2, lost_at=None)
    written = json.loads(run(file_store, "report", built.run, "--json").stdout)
    assert written["key"] == f"runs/{built.run}/report.html"
    assert file_store.exists(written["key"])
    assert run(file_store, "report", built.run).stdout.strip() == f"{file_store.uri}/{written['key']}"


@pytest.mark.parametrize("command", ["show", "report"])
def test_unknown_run_is_not_found(file_store, command):
    with pytest.raises(NotFoundError, match="runs list"):
        run(file_store, command, "nothing")


def test_help_imports_nothing_heavy():
    """Help of both groups answers without the libraries that the commands work with."""
    code = f"""
import sys
from click.testing import CliRunner
from lepton_ray.cli.exporter import exporter
from lepton_ray.cli.runs import runs
for arguments in ([], ["list"], ["show"], ["report"]):
    assert CliRunner().invoke(runs, [*arguments, "--help"]).exit_code == 0
assert CliRunner().invoke(exporter, ["--help"]).exit_code == 0
assert not [name for name in {HEAVY!r} if name in sys.modules]
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_exporter_refuses_bad_options(file_store):
    """Click's own checks and the server's end with exit code 2."""
    for arguments in (["--port", "many"], ["--retain", "0"]):
        assert CliRunner().invoke(exporter, [*arguments, "--store", file_store.uri]).exit_code == 2
    refused = CliRunner().invoke(exporter, ["--port", "65536", "--store", file_store.uri])
    assert isinstance(refused.exception, LeptonError)
    assert refused.exception.exit_code == 2
