"""`lepton-ray train` at its edges: what is wrong is told in one line with its exit code, before anything starts."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from lepton_ray.cli.train import ProgressShow
from lepton_ray.settings import Settings
from lepton_ray.training.progress import Progress


def run(*words: str, store: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "lepton_ray.cli", *words, "--store", str(store)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["train", "missing.yaml"], 2, "missing.yaml: No such file"),
        (["train", "training.epoch=2"], 2, "did you mean 'epochs'"),
        (["train", "task.name=nonsense"], 2, "'nonsense': no such task"),
        (["train", "task.options.depth=3"], 2, "task.options.depth"),
        (["train"], 5, "lepton-ray data ingest"),
        (["train", "--run", "nobody"], 5, "run 'nobody': not found in store"),
        (["train", "some.yaml", "--run", "nobody"], 2, "give CONFIG or --run, not both"),
        (["orchestrate", "--working-dir", "."], 2, "give --address too"),
        (["orchestrate", "--every", "0"], 2, "0.1<=x<=3600.0"),
        (["trian"], 2, "Did you mean 'train'"),
    ],
)
def test_wrong_use_is_one_line(words: list[str], code: int, message: str, tmp_path: Path) -> None:
    done = run(*words, store=tmp_path / "store") if words != ["trian"] else run(*words, store=tmp_path)
    assert (done.returncode, done.stdout) == (code, "")
    assert message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert "Traceback" not in done.stderr


def progress(step: int) -> Progress:
    return Progress(
        generation=1,
        step=step,
        total_steps=100,
        epoch=1,
        loss=0.5,
        samples_per_second=1000.0,
        evaluation={"accuracy": 0.9},
    )


def test_progress_is_json_lines_where_there_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    """One for each interval of 10 steps; every line says which run, attempt group and step it is about, and parses."""
    with ProgressShow(Settings(), quiet_stdout=False) as show:
        for step in (10, 11, 19, 20, 99, 100):
            show.update(progress(step))
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(line["event"], line["run"], line["step"], line["loss"]) for line in lines] == [
        ("progress", "digits", step, 0.5) for step in (10, 20, 99, 100)
    ]


def test_progress_is_a_bar_on_a_terminal() -> None:
    """Also on one of 20 columns."""
    for width in (100, 20):
        screen = io.StringIO()
        show = ProgressShow(Settings(), quiet_stdout=False)
        show._console = Console(file=screen, force_terminal=True, width=width)
        with show:
            show.update(progress(50))
        assert "50/100" in screen.getvalue() or width == 20
        assert '{"event"' not in screen.getvalue()
