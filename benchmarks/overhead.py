"""Steps per second of our loop against torchrun DDP and plain Ray Train, side by side; and the way to the first steps.

    python benchmarks/overhead.py [--pairs 5] [--steps 600] [--workers 2]

All three train the 28x28 CNN on the same 4,000 digits with the same batch, optimiser, augmentation and threads, in
turn, `--pairs` times, so that noise of the machine falls on all of them alike. The steady-state rate leaves out the
first tenth of the steps. Ours runs with everything on: ledger, metrics, sample account, checkpoints. Prints Markdown.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from lepton_ray.data.split import split_rows
from lepton_ray.data.tables import ingest, open_table
from lepton_ray.settings import SplitSettings
from lepton_ray.storage import open_store
from lepton_ray.tasks import find_task

HERE = Path(__file__).parent
BATCH = 64
LIMIT_S = 600


def rate(ends: list[float]) -> float:
    """Steps per second after the first tenth."""
    first = len(ends) // 10
    return (len(ends) - 1 - first) / (ends[-1] - ends[first])


def prepare(folder: Path) -> dict[str, Any]:
    """The table for us, the same training rows as an .npz for the others."""
    store = open_store((folder / "store").as_uri())
    ingest(store, "digits", "digits")
    rows = open_table(store, "digits").read()
    train = rows.take(split_rows(rows, SplitSettings()).train)
    task = find_task("image_classification", {})
    transforms = task.fit(train)
    data = folder / "rows.npz"
    np.savez(data, images=task.inputs(train, transforms).numpy(), labels=task.targets(train, transforms).numpy())
    return {"data": str(data), "transforms": transforms, "rows": train.num_rows, "store": store.uri}


def run(command: list[str], **environment: str) -> float:
    """Run to the end; the clock time at which it was started."""
    started = time.time()
    done = subprocess.run(
        command, env={**os.environ, **environment}, capture_output=True, text=True, timeout=LIMIT_S, check=False
    )
    if done.returncode:
        sys.exit(f"{' '.join(command)[:200]} failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return started


def by_hand(kind: str, config: dict[str, Any], folder: Path) -> tuple[float, float]:
    """Steps per second, and seconds from start to the end of the tenth step."""
    out = folder / f"{kind}-{time.time_ns()}.json"
    words = json.dumps({**config, "out": str(out), "scratch": str(folder / "scratch")})
    loop = str(HERE / "plain_loops.py")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={config['workers']}"]
    prefix = launcher if kind == "torchrun" else [sys.executable]
    started = run([*prefix, loop, words], PLAIN_LOOP="ray" if kind == "ray" else "torchrun", OMP_NUM_THREADS="1")
    ends = json.loads(out.read_text())
    return rate(ends), ends[9] - started


def ours(config: dict[str, Any]) -> tuple[float, float, dict[str, float]]:
    """Steps per second, seconds from start to the tenth step, and where those seconds went, from the run's own files.

    The rate leaves the evaluation of each epoch out (the other loops have none) and checkpoints and notes in.
    """
    name = f"bench-{time.time_ns()}"
    epochs = -(-config["steps"] * BATCH // config["rows"])
    started = run(
        [sys.executable, "-m", "lepton_ray.cli", "train", f"run={name}", f"training.epochs={epochs}",
         f"training.workers={config['workers']}", f"training.global_batch={BATCH}", "--store", config["store"]]
    )  # fmt: skip
    store = open_store(config["store"])
    record = json.loads(store.get(f"runs/{name}/record.json"))
    ledger = json.loads(store.get(f"runs/{name}/ledger/g1-rank0.json"))
    history = pq.read_table(pa.BufferReader(store.get(f"runs/{name}/metrics/history-g1.parquet"))).to_pylist()
    later = history[len(history) // 10 :]
    speed = len(later) / sum(BATCH / row["samples_per_second"] for row in later)
    marks = {
        "driver ready: imports, rows split, transforms fitted, Ray up": record["attempts"][0]["started_at"],
        "ranks started, process group formed": ledger["started_at"],
        "model and rows loaded": ledger["started_at"] + ledger["phases"]["loading"],
        "tenth step done": history[0]["time"],
    }
    return speed, history[0]["time"] - started, {key: value - started for key, value in marks.items()}


def main() -> None:
    """Measure in turn and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    rates: dict[str, list[float]] = {"torchrun": [], "ray": [], "ours": []}
    firsts: dict[str, list[float]] = {"torchrun": [], "ray": [], "ours": []}
    marks: list[dict[str, float]] = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        config = {**prepare(folder), "workers": options.workers, "threads": 1, "batch": BATCH, "steps": options.steps}
        for turn in range(options.pairs):
            for kind in ("torchrun", "ray"):
                speed, first = by_hand(kind, config, folder)
                rates[kind].append(speed)
                firsts[kind].append(first)
            speed, first, found = ours(config)
            rates["ours"].append(speed)
            firsts["ours"].append(first)
            marks.append(found)
            print(f"turn {turn + 1}: " + ", ".join(f"{k} {v[-1]:.1f}" for k, v in rates.items()), file=sys.stderr)
    print("| loop | steps/s (median) | ratio to torchrun (median of pairs) | start to tenth step, s (median) |")
    print("|---|---|---|---|")
    names = {"torchrun": "torchrun, DDP by hand", "ray": "plain Ray Train, the same loop", "ours": "lepton-ray"}
    for kind, name in names.items():
        ratio = statistics.median(a / b for a, b in zip(rates[kind], rates["torchrun"], strict=True))
        print(
            f"| {name} | {statistics.median(rates[kind]):.1f} | {ratio:.3f} | {statistics.median(firsts[kind]):.1f} |"
        )
    print("\n| from the command to | s (median) |\n|---|---|")
    for key in marks[0]:
        print(f"| {key} | {statistics.median(found[key] for found in marks):.1f} |")


if __name__ == "__main__":
    main()
