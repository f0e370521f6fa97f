"""Training beside torchrun and plain Ray Train: every figure of the comparison in one Markdown table.

    python benchmarks/training.py [--pairs 5] [--only steps,job,start,stall,feed] [--workers 2]

All sides take turns, `--pairs` times, so that noise of the machine falls on all alike; a ratio is the median of the
ratios within a turn, best on a machine that does nothing else. For steps per second both sides are started once, and go
on and stand still in turns of eight seconds, four for each pair (by_turns.py): a run as a whole differs from the next
one by a tenth here. Ours runs with everything on: ledger, metrics, sample account, checkpoints, hot copies. What the
others run is in plain_loops.py and parts.py. Each run ends after `--limit` seconds at the latest.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from by_turns import WINDOW_S, Side, peaks_below, turns

from lepton_ray.data.digits import load_digits
from lepton_ray.data.split import split_rows
from lepton_ray.data.tables import ingest, open_table
from lepton_ray.settings import SplitSettings
from lepton_ray.storage import open_store
from lepton_ray.tasks import find_task

HERE = Path(__file__).parent
BATCH = 64
SECTIONS = ("steps", "job", "start", "stall", "feed")
STEADY_S = 40.0
"""Seconds after its first step at which a run is steady: by then a standby's process, which takes eight seconds of CPU
once, has started."""
FIRST_STEP_S = 20.0
"""Seconds that our run is given to its first step; a run that takes longer is told."""
HAND = {"OMP_NUM_THREADS": "1"}
WINDOWS = 4
"""Windows of each side for a pair."""
TASKS: dict[str, dict[str, Any]] = {
    "28x28 CNN": {"name": "image_classification", "options": {}, "table": "digits", "faster": 4},
    "4-layer text encoder": {
        "name": "text_classification",
        "options": {"network": "transformer", "layers": 4, "width": 128, "max_length": 32},
        "table": "sentences",
        "faster": 1,
    },
}
HEADER = "| figure | ours | other | | ours / other | wanted |\n|---|---|---|---|---|---|"


@dataclass
class Run:
    """What came out of one training run."""

    started: float
    """Clock time of the command."""
    ended: float
    first_step: float
    """Clock time at which the first step was done."""
    peak: float
    """Largest peak resident memory of a rank, bytes."""


@dataclass
class Bench:
    """The machine's side of the comparison: folders, limits, and the rows of each task for all sides."""

    folder: Path
    pairs: int
    workers: int
    limit_s: float
    fed_rows: int
    environment: dict[str, str] = field(default_factory=dict)
    data: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def store(self) -> str:
        """URI of our store."""
        return (self.folder / "store").as_uri()

    def rows(self, label: str) -> dict[str, Any]:
        """The table for us, the same training rows as an .npz for the others; made at the first call."""
        if label not in self.data:
            kind, store = TASKS[label], open_store(self.store)
            ingest(store, kind["table"], "digits" if kind["table"] == "digits" else sentences())
            rows = open_table(store, kind["table"]).read()
            train = rows.take(split_rows(rows, SplitSettings()).train)
            task = find_task(kind["name"], kind["options"])
            transforms = task.fit(train)
            data = self.folder / f"{kind['table']}.npz"
            inputs, targets = task.inputs(train, transforms), task.targets(train, transforms)
            np.savez(data, inputs=inputs.numpy(), targets=targets.numpy())
            self.data[label] = {"data": str(data), "transforms": transforms, "rows": train.num_rows}
        return self.data[label]

    def call(
        self, command: list[str], outcome: Path | None = None, **environment: str
    ) -> tuple[float, float, str, float]:
        """Run to the end: clock times of start and end, its output, and the peak memory of a rank under it.

        A process that wrote its `outcome` may fail at its own end: all was measured by then.
        """
        started, peaks, over = time.time(), [0.0], threading.Event()
        process = subprocess.Popen(
            [sys.executable, *command], env={**os.environ, **self.environment, **environment}, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        watcher = threading.Thread(target=_watch_ranks, args=(process.pid, peaks, over))
        watcher.start()
        try:
            out, errors = process.communicate(timeout=self.limit_s)
        except subprocess.TimeoutExpired:
            process.kill()
            sys.exit(f"{' '.join(command)[:200]} took longer than {self.limit_s:g} s")
        finally:
            over.set()
            watcher.join()
        if process.returncode and not (outcome and outcome.exists()):
            sys.exit(f"{' '.join(command)[:200]} failed:\n{out[-2000:]}{errors[-3000:]}")
        return started, time.time(), out, peaks[0]

    def by_hand(self, kind: str, label: str, steps: int, checkpoint_every: int = 0) -> Run:
        """The loop by hand under `torchrun` or plain `ray` Train."""
        out = self.folder / f"{kind}-{time.time_ns()}.json"
        command = self.hand_command(kind, label, steps, out, checkpoint_every=checkpoint_every)
        started, ended, _, _ = self.call(command, out, **HAND, PLAIN_LOOP=kind)
        found = json.loads(out.read_text())
        return Run(started, ended, found["ends"][0], max(found["peaks"]))

    def hand_command(self, kind: str, label: str, steps: int, out: Path, **more: Any) -> list[str]:
        """What starts the loop by hand; it writes `out` at its end."""
        given = out.with_suffix(".config.json")
        config = {
            **self.rows(label), "task": TASKS[label], "workers": self.workers, "threads": 1, "batch": BATCH,
            "steps": steps, "checkpoint_every": 0, "out": str(out), "scratch": str(self.folder / "ray"), **more,
        }  # fmt: skip
        given.write_text(json.dumps(config), encoding="utf-8")
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={self.workers}"]
        return [*(launcher if kind == "torchrun" else []), str(HERE / "plain_loops.py"), str(given)]

    def ours(self, label: str, steps: int, checkpoint_every: int, note_every: int = 10) -> Run:
        """`lepton-ray train` over as many whole epochs as the steps make up, one evaluation at the end."""
        name, command = self.our_command(label, steps, checkpoint_every, note_every)
        started, ended, _, peak = self.call(command)
        return Run(started, ended, self.noted(name)[0]["time"], peak)

    def our_command(self, label: str, steps: int, checkpoint_every: int, note_every: int) -> tuple[str, list[str]]:
        """The run's name, and what starts it."""
        name, rows = f"bench-{time.time_ns()}", self.rows(label)
        epochs = max(1, round(steps * BATCH / rows["rows"]))
        kind = TASKS[label]
        settings = {
            "run": name, "task": {"name": kind["name"], "options": kind["options"]}, "data": {"table": kind["table"]},
            "training": {
                "epochs": epochs, "global_batch": BATCH, "workers": self.workers, "evaluate_every_epochs": epochs,
                "checkpoint": {"every_steps": checkpoint_every}, "logging": {"every_steps": note_every},
            },
        }  # fmt: skip
        config = self.folder / f"{name}.yaml"
        config.write_text(yaml.safe_dump(settings), encoding="utf-8")
        return name, ["-m", "lepton_ray.cli", "train", str(config), "--store", self.store, "--json"]

    def noted(self, name: str) -> list[dict[str, Any]]:
        """What the run of that name noted of its steps."""
        table = pq.read_table(pa.BufferReader(open_store(self.store).get(f"runs/{name}/metrics/history-g1.parquet")))
        return table.to_pylist()  # type: ignore[no-any-return]

    def start(self, command: list[str], **environment: str) -> Side:
        """Start one side of a comparison by turns."""
        process = subprocess.Popen(
            [sys.executable, *command], env={**os.environ, **self.environment, **environment},
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        return Side(psutil.Process(process.pid))


def in_turns(bench: Bench, label: str, steps: int) -> tuple[list[float], list[float], float, float]:
    """Steps per second of ours and of torchrun, window by window, and the peak memory of a rank of each, bytes."""
    name, command = bench.our_command(label, steps, 100, 2)
    progress = bench.folder / f"progress-{time.time_ns()}"
    ours = bench.start(command)
    bare = None
    try:
        time.sleep(FIRST_STEP_S + STEADY_S)
        ours.stop()
        out = progress.with_suffix(".json")
        bare = bench.start(bench.hand_command("torchrun", label, 10**6, out, progress=str(progress)), **HAND)
        hold = time.monotonic()
        while not progress.exists() or progress.stat().st_size < 200:
            if time.monotonic() - hold > bench.limit_s:
                sys.exit("torchrun did no step")
            ours.go_on()  # our watchdog takes a longer standstill for a hang
            time.sleep(WINDOW_S / 2)
            ours.stop()
            time.sleep(WINDOW_S / 2)
        bare.stop()
        for turn in range(bench.pairs * WINDOWS):
            for side in (ours, bare) if turn % 2 == 0 else (bare, ours):
                side.turn()
        bare_peak = bare.peak()
        bare.end()
        ours.go_on()
        our_peak = ours.peak()
        if ours.process.wait(bench.limit_s):
            sys.exit(f"run {name} failed; lepton-ray runs show {name} --store {bench.store}")
    finally:
        for side in (ours, *([bare] if bare else [])):
            side.go_on()
            side.end()
    noted = [(row["step"], row["time"]) for row in bench.noted(name)]
    if ours.windows[0][0] < noted[0][1] + STEADY_S:
        sys.exit(f"run {name} was not steady yet when it was measured")
    ends = [(step, float(at)) for step, at in enumerate(progress.read_text().splitlines()[:-1], 1)]
    return ours.speeds(noted), bare.speeds(ends), our_peak, bare_peak


def _watch_ranks(root: int, peaks: list[float], over: threading.Event) -> None:
    """Note the largest peak resident memory of ranks below the process."""
    while not over.wait(0.5):
        peaks[0] = max([peaks[0], *peaks_below(root)])


def sentences(rows: int = 5000) -> pa.Table:
    """Made-up sentences of 8 to 40 words, words by Zipf's law, the label by the words in it."""
    random = np.random.default_rng(0)
    texts, labels = [], []
    for _ in range(rows):
        words = np.minimum(random.zipf(1.3, int(random.integers(8, 41))), 5000)
        texts.append(" ".join(f"w{word}" for word in words))
        labels.append(int(words.sum() % 2))
    return pa.table({"text": texts, "label": labels})


@contextlib.contextmanager
def cluster(bench: Bench) -> Iterator[None]:
    """A running Ray cluster of this machine's own that the runs in the block connect to."""
    with tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp") as folder:  # socket paths must be short
        environment = {**os.environ, "RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "disabled"}
        command = [
            "-m", "ray.scripts.scripts", "start", "--head", "--block", "--port=0", f"--num-cpus={bench.workers}",
            "--include-dashboard=true", "--dashboard-port=0", f"--temp-dir={folder}",
        ]  # fmt: skip
        process = subprocess.Popen(
            [sys.executable, *command], env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        assert process.stdout is not None  # noqa: S101 - it was asked for
        try:
            address = next(
                found.group(1) for line in process.stdout if (found := re.search(r"address='([^']+)'", line))
            )
            threading.Thread(target=process.stdout.read, daemon=True).start()
            bench.environment = {"RAY_ADDRESS": address, "RAY_AUTH_MODE": "disabled"}
            yield
        finally:
            bench.environment = {}
            below = psutil.Process(process.pid).children(recursive=True)
            process.terminate()
            _, left = psutil.wait_procs([psutil.Process(process.pid), *below], timeout=20)
            for one in left:
                one.kill()


def row(name: str, ours: list[float], other: list[float], against: str, wanted: str, unit: str) -> str:
    """One line of the table from the figures of all turns."""
    ratio = statistics.median(a / b for a, b in zip(ours, other, strict=True))
    mine, theirs = (f"{statistics.median(values):,.4g} {unit}" for values in (ours, other))
    return f"| {name} | {mine} | {theirs} | {against} | {ratio:.3f} | {wanted} |"


def steps(bench: Bench, count: int) -> Iterator[str]:
    """Steady-state steps per second and memory against torchrun."""
    for label, kind in TASKS.items():
        mine, bare, our_peak, bare_peak = in_turns(bench, label, count * kind["faster"])
        yield row(f"steady-state steps/s, {label}", mine, bare, "torchrun DDP", ">= 0.98", "/s")
        ratios = sorted(a / b for a, b in zip(mine, bare, strict=True))
        low, high = ratios[len(ratios) // 4], ratios[-1 - len(ratios) // 4]
        print(f"{label}: {len(ratios)} pairs, half of them from {low:.3f} to {high:.3f}", file=sys.stderr, flush=True)
        wanted = f"<= +150 MB (is {(our_peak - bare_peak) / 1e6:+.0f} MB)"
        name = f"peak resident memory of a rank, {label}"
        yield row(name, [our_peak / 1e6], [bare_peak / 1e6], "torchrun DDP", wanted, "MB")


def job(bench: Bench, count: int) -> Iterator[str]:
    """The whole job, from the command to its end, with four checkpoints."""
    label = next(iter(TASKS))
    mine, plain = turns(
        bench.pairs,
        lambda: bench.ours(label, count, count // 4),
        lambda: bench.by_hand("ray", label, count, count // 4),
    )
    yield row(
        f"whole job, {count} steps, 4 checkpoints", [run.ended - run.started for run in mine],
        [run.ended - run.started for run in plain], "plain Ray Train", "<= 1.0", "s",
    )  # fmt: skip


def start(bench: Bench, _: int) -> Iterator[str]:
    """From the command to the end of the first step, on a running cluster and on one that the command starts."""
    label = next(iter(TASKS))
    for place in ("running cluster", "local Ray of its own"):
        with cluster(bench) if place == "running cluster" else contextlib.nullcontext():
            sides = (lambda: bench.ours(label, 20, 100, 1), lambda: bench.by_hand("ray", label, 20))
            for side in sides:  # warm: files in the page cache, and what a cluster starts once and keeps
                side()
            mine, plain = turns(bench.pairs, *sides)
        yield row(
            f"submit to first step, {place}", [run.first_step - run.started for run in mine],
            [run.first_step - run.started for run in plain], "plain Ray Train", "<= 0.5", "s",
        )  # fmt: skip


def stall(bench: Bench, _: int) -> Iterator[str]:
    """Seconds that the training thread stands still for one checkpoint of a 100 MB state."""
    mine, plain = turns(
        bench.pairs,
        *(lambda kind=kind: _part(bench, f"stall-{kind}", self_cleaning(bench)) for kind in ("ours", "torch")),
    )
    yield row(
        "checkpoint stall, 100 MB state", [found["stall_s"] * 1e3 for found in mine],
        [found["stall_s"] * 1e3 for found in plain], "torch.save + upload", "<= 0.1", "ms",
    )  # fmt: skip


def self_cleaning(bench: Bench) -> str:
    """A store of its own for each run of a part."""
    return (bench.folder / f"part-{time.time_ns()}").as_uri()


def feed(bench: Bench, _: int) -> Iterator[str]:
    """Rows per second from a Parquet file to tensors, once over all rows."""
    path = bench.folder / "rows.parquet"
    digits = load_digits()
    rows = pa.concat_tables([digits] * max(1, bench.fed_rows // digits.num_rows))
    pq.write_table(rows, path, compression="none")
    kinds = ("ours", "ray", "loader", "loader-by-row")
    mine, *others = turns(bench.pairs, *(lambda kind=kind: _part(bench, f"feed-{kind}", str(path)) for kind in kinds))
    against = (
        ("Ray Data iter_torch_batches", ">= 2"), ("torch DataLoader, batches taken from Arrow", ">= 1"),
        ("torch DataLoader, row by row", ">= 1"),
    )  # fmt: skip
    for (name, wanted), other in zip(against, others, strict=True):
        for key, when in (("rows_per_s", "first epoch"), ("later", "later epochs")):
            figures = [found[key] for found in mine], [found[key] for found in other]
            yield row(f"feeding {rows.num_rows:,} rows, {when}", *figures, name, wanted, "rows/s")


def _part(bench: Bench, name: str, argument: str) -> dict[str, float]:
    found: dict[str, float] = json.loads(bench.call([str(HERE / "parts.py"), name, argument])[2].splitlines()[-1])
    return found


def main() -> None:
    """Measure the sections that were asked for and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=5, help="turns")
    parser.add_argument("--only", default=",".join(SECTIONS), help="sections, by comma")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument(
        "--steps",
        type=int,
        default=1700,
        help="of the text encoder in the section steps; the CNN does four times as many",
    )
    parser.add_argument("--job-steps", type=int, default=2000)
    parser.add_argument("--fed-rows", type=int, default=1_000_000)
    parser.add_argument("--limit", type=float, default=900.0, help="seconds of one run at most")
    options = parser.parse_args()
    wanted = options.only.split(",")
    if unknown := sorted(set(wanted) - set(SECTIONS)):
        parser.error(f"--only: no section {', '.join(unknown)}; there are {', '.join(SECTIONS)}")
    counts = {"steps": options.steps, "job": options.job_steps}
    with tempfile.TemporaryDirectory() as temporary:
        bench = Bench(Path(temporary), options.pairs, options.workers, options.limit, options.fed_rows)
        print(HEADER, flush=True)
        for section in SECTIONS:
            if section in wanted:
                for line in globals()[section](bench, counts.get(section, 0)):
                    print(line, flush=True)


if __name__ == "__main__":
    main()
