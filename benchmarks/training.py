"""Training beside torchrun and plain Ray Train: every figure of the comparison in one Markdown table.

    python benchmarks/training.py [--pairs 5] [--only steps,job,start,stall,feed] [--workers 2]

All sides take turns, `--pairs` times, so that noise of the machine falls on all alike; a ratio is the median of the
ratios within a turn, best on a machine that does nothing else. Ours runs with everything on: ledger, metrics, sample
account, checkpoints, hot copies. What the others run is in plain_loops.py and parts.py. Each run ends after
`--limit` seconds at the latest.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import yaml

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
once, has started. Of a run of less than twice as long, half is left out."""
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
    speed: float
    """Steps per second, once the run is steady."""
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
        given = out.with_suffix(".config.json")
        config = {
            **self.rows(label), "task": TASKS[label], "workers": self.workers, "threads": 1, "batch": BATCH,
            "steps": steps, "checkpoint_every": checkpoint_every, "out": str(out), "scratch": str(self.folder / "ray"),
        }  # fmt: skip
        given.write_text(json.dumps(config), encoding="utf-8")
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={self.workers}"]
        command = [*(launcher if kind == "torchrun" else []), str(HERE / "plain_loops.py"), str(given)]
        started, ended, _, _ = self.call(command, out, PLAIN_LOOP=kind, OMP_NUM_THREADS="1")
        found = json.loads(out.read_text())
        ends = found["ends"]
        skipped = first_steady(ends)
        speed = (len(ends) - 1 - skipped) / (ends[-1] - ends[skipped])
        return Run(started, ended, ends[0], speed, max(found["peaks"]))

    def ours(self, label: str, steps: int, checkpoint_every: int, note_every: int = 10) -> Run:
        """`lepton-ray train` over as many whole epochs as the steps make up, one evaluation at the end."""
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
        started, ended, _, peak = self.call(
            ["-m", "lepton_ray.cli", "train", str(config), "--store", self.store, "--json"]
        )
        table = pq.read_table(
            pa.BufferReader(open_store(self.store).get(f"runs/{name}/metrics/history-g1.parquet"))
        ).to_pylist()
        # samples per second leave out the evaluation, which the others do not have; checkpoints and notes count
        noted = [(row, row["step"] - before["step"]) for before, row in itertools.pairwise(table)]
        later = noted[first_steady([row["time"] for row in table]) :]
        took = sum(count * BATCH / row["samples_per_second"] for row, count in later)
        return Run(started, ended, table[0]["time"], sum(count for _, count in later) / took, peak)


def first_steady(times: list[float]) -> int:
    """The first of these clock times, ascending, at which a run is steady."""
    begin = times[0] + min(STEADY_S, (times[-1] - times[0]) / 2)
    return next(index for index, time_ in enumerate(times) if time_ >= begin)


def _watch_ranks(root: int, peaks: list[float], over: threading.Event) -> None:
    """Note the largest peak resident memory (VmHWM) of ranks (actors `RayTrainWorkerHost`) below the process."""
    while not over.wait(0.5):
        with contextlib.suppress(psutil.Error, OSError, StopIteration):
            for process in psutil.Process(root).children(recursive=True):
                if "RayTrainWorkerHost" not in " ".join(process.cmdline()[:1]):
                    continue
                status = Path(f"/proc/{process.pid}/status").read_text()
                peaks[0] = max(peaks[0], 1024.0 * int(re.findall(r"VmHWM:\s+(\d+)", status)[0]))


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


def turns(bench: Bench, *sides: Callable[[], Any]) -> list[list[Any]]:
    """Every side once per turn, beginning with another one each turn; the outcomes by side."""
    found: list[list[Any]] = [[] for _ in sides]
    for turn in range(bench.pairs):
        for position in range(len(sides)):
            side = (turn + position) % len(sides)
            begun = time.time()
            found[side].append(sides[side]())
            print(f"turn {turn + 1}, side {side + 1}: {time.time() - begun:.1f} s", file=sys.stderr, flush=True)
    return found


def steps(bench: Bench, count: int) -> Iterator[str]:
    """Steady-state steps per second and memory against torchrun."""
    for label, kind in TASKS.items():
        number = count * kind["faster"]
        mine, bare = turns(
            bench, partial(bench.ours, label, number, 100), partial(bench.by_hand, "torchrun", label, number)
        )
        yield row(
            f"steady-state steps/s, {label}", [run.speed for run in mine], [run.speed for run in bare],
            "torchrun DDP", ">= 0.98", "/s",
        )  # fmt: skip
        peaks = [run.peak / 1e6 for run in mine], [run.peak / 1e6 for run in bare]
        more = statistics.median(a - b for a, b in zip(*peaks, strict=True))
        wanted = f"<= +150 MB (is {more:+.0f} MB)"
        yield row(f"peak resident memory of a rank, {label}", *peaks, "torchrun DDP", wanted, "MB")


def job(bench: Bench, count: int) -> Iterator[str]:
    """The whole job, from the command to its end, with four checkpoints."""
    label = next(iter(TASKS))
    mine, plain = turns(
        bench, lambda: bench.ours(label, count, count // 4), lambda: bench.by_hand("ray", label, count, count // 4)
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
            mine, plain = turns(bench, *sides)
        yield row(
            f"submit to first step, {place}", [run.first_step - run.started for run in mine],
            [run.first_step - run.started for run in plain], "plain Ray Train", "<= 0.5", "s",
        )  # fmt: skip


def stall(bench: Bench, _: int) -> Iterator[str]:
    """Seconds that the training thread stands still for one checkpoint of a 100 MB state."""
    mine, plain = turns(
        bench,
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
    mine, *others = turns(bench, *(lambda kind=kind: _part(bench, f"feed-{kind}", str(path)) for kind in kinds))
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
        default=450,
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
