"""What faults cost, stock Ray Train beside it in the same run: every figure in one Markdown table, counts before times.

    python benchmarks/recovery.py [--repeats 20] [--stock-repeats 10] [--only preemption,kill,all,...] [--json FILE]

A disturbed run is `lepton-ray train` in a process of its own with two ranks on a local Ray; the faults are real signals
to real ranks at random steps (`--seed`). Repeated are steps that were done more than once; `to the first step` is the
time from the signal to the end of the first step that the next worker group does. Stock Ray Train (stock_recovery.py)
trains the same model on the same rows, with checkpoints at the same steps. Best on a machine that does nothing else.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from recovery_runs import FILE_S, HERE, MissedError, OurRun, Run, StockRun, Strike, slow_store, slowed
from training import Bench as Machine
from training import cluster, sentences

from lepton_ray.data.split import split_rows
from lepton_ray.data.tables import ingest, open_table
from lepton_ray.monitoring.incidents import count_incidents
from lepton_ray.settings import SplitSettings
from lepton_ray.storage import open_store
from lepton_ray.tasks import find_task

SMALL = {"name": "image_classification", "options": {"width": 8, "dropout": 0.1}}
"""Steps of a few milliseconds."""
USUAL = {"name": "image_classification", "options": {}}
HEAVY = {"name": "text_classification", "options": {"layers": 2, "width": 384, "max_length": 4}}
"""A state of some 50 MB: seconds on a line of 10 MB/s."""
ROWS, BATCH = 4000, 20
"""Real digits that train; rows of a step where nothing else is said."""
EPOCH = ROWS // BATCH
PROTOCOL = 1600, 400
"""Steps and checkpoint interval of Ray's own preemption benchmark."""
EVERY = 50
"""Steps between two checkpoints where a run is struck many times."""


@dataclass(frozen=True)
class Pace:
    """How fast a run that is struck many times goes, and how many steps lie between two faults."""

    task: dict[str, Any]
    batch: int
    spacing: int

    def points(self, draw: random.Random, count: int) -> list[int]:
        """Random steps for so many faults."""
        return [self.spacing * number + 40 + draw.randrange(self.spacing // 2) for number in range(count)]


BURST = Pace(SMALL, BATCH, 150)
"""A fault every second or two."""
USUALLY = Pace(USUAL, 256, 200)
"""A fault every half minute or more, so that what is kept ready for one is ready again."""
GRACE_S = 30.0
SLOW_LINE, VERY_SLOW_LINE = 10e6, 4e6
STOCK_WATCH_S = 60.0
"""Seconds that a stopped rank of stock Ray Train is watched for any reaction."""
HEADER = "| figure | ours | stock Ray Train | ours / stock | wanted |\n|---|---|---|---|---|"


@dataclass
class Bench:
    """What the sections share."""

    folder: Path
    repeats: int
    stock_repeats: int
    quiet_minutes: float
    random: random.Random
    raw: Path | None = None
    """File for the raw figures, one JSON line each."""
    runs: int = 0
    calm: dict[tuple[int, int], OurRun] = field(default_factory=dict)
    """Undisturbed runs by their number of steps and batch."""

    @property
    def store(self) -> str:
        """URI of our store; filled at the first use."""
        uri = (self.folder / "store").as_uri()
        if not (self.folder / "store").exists():
            ingest(open_store(uri), "digits", "digits")
        return uri

    def ours(
        self, steps: int, every: int, *, task: dict[str, Any] = SMALL, store: str | None = None,
        environment: dict[str, str] | None = None, name: str | None = None, batch: int = BATCH, **training: Any,
    ) -> OurRun:  # fmt: skip
        """A run of ours of `steps` steps (whole epochs) with a checkpoint every `every`."""
        self.runs += 1
        epochs = -(-steps * batch // ROWS)
        table = "digits" if task["name"] == "image_classification" else "sentences"
        settings = {
            "run": name or f"run-{self.runs}", "task": task,
            "data": {"table": table, "split": {"by": "stratified"}},
            "training": {
                "epochs": epochs, "evaluate_every_epochs": epochs, "global_batch": batch, "workers": 2,
                "checkpoint": {"every_steps": every}, "max_failures": 1000, **training,
            },
        }  # fmt: skip
        return OurRun(self.folder / f"ours-{self.runs}", settings, store or self.store, environment)

    def stock(self, steps: int, every: int, pace: Pace = BURST) -> StockRun:
        """The same with stock Ray Train."""
        data = self.folder / "rows.npz"
        rows = open_table(open_store(self.store), "digits").read()
        train = rows.take(split_rows(rows, SplitSettings(by="stratified")).train)
        task = find_task(pace.task["name"], pace.task["options"])
        transforms = task.fit(train)
        np.savez(data, inputs=task.inputs(train, transforms).numpy(), targets=task.targets(train, transforms).numpy())
        self.runs += 1
        config = {
            "data": str(data), "transforms": transforms, "task": pace.task, "workers": 2, "batch": pace.batch,
            "steps": steps, "checkpoint_every": every,
        }  # fmt: skip
        return StockRun(self.folder / f"stock-{self.runs}", config)

    def undisturbed(self, steps: int, pace: Pace = BURST) -> OurRun:
        """A run of so many steps that nothing happened to."""
        if (steps, pace.batch) not in self.calm:
            with self.ours(steps, EVERY, task=pace.task, batch=pace.batch) as run:
                run.finish(3600.0)
            self.calm[steps, pace.batch] = run
        return self.calm[steps, pace.batch]

    def note(self, section: str, side: str, **figures: Any) -> None:
        """Keep raw figures."""
        line = json.dumps({"section": section, "side": side, **figures})
        print(line, file=sys.stderr, flush=True)
        if self.raw is not None:
            with self.raw.open("a", encoding="utf-8") as file:
                file.write(f"{line}\n")


def row(name: str, ours: str, wanted: str = "", *, stock: str = "", ratio: float | None = None) -> str:
    """One line of the table."""
    return f"| {name} | {ours} | {stock} | {'' if ratio is None else f'{ratio:.2f}'} | {wanted} |"


def seconds_of(values: Sequence[float]) -> str:
    """Median and 95th percentile (of fewer than 20 the largest) in words."""
    if not values:
        return ""
    high = sorted(values)[min(len(values) - 1, int(0.95 * len(values)))]
    return f"p50 {statistics.median(values):.1f} s, p95 {high:.1f} s"


def struck(
    bench: Bench, section: str, run: Run, points: Sequence[int], number: int, *, everybody: bool = False
) -> list[Strike]:
    """Send the signal at each of the steps to a random rank or to all, and see each recovery."""
    found: list[Strike] = []
    for point in points:
        group = run.reach(max(point, found[-1].step + 20 if found else 0))
        rank = None if everybody else [bench.random.randrange(len(group))]
        strike = run.strike(number, rank, GRACE_S if number == signal.SIGTERM else None)
        if isinstance(run, OurRun):
            strike = run.explained(strike)
        found.append(strike)
        bench.note(section, "ours" if isinstance(run, OurRun) else "stock", **asdict(strike))
    return found


def preemption(bench: Bench) -> Iterator[str]:
    """Ray's preemption protocol: repeated steps and step goodput."""
    steps, every = PROTOCOL
    points = [every * part + 40 + bench.random.randrange(210) for part in range(4)]
    theirs, stock, other = 0, "", ""
    if bench.stock_repeats:
        with bench.stock(steps, every) as plain:
            found = struck(bench, "preemption", plain, points, signal.SIGKILL)
            plain.finish()
        theirs = sum(strike.repeated for strike in found)
        stock = f"{theirs} (by SIGKILL; Ray's own figures, on GPUs: 517, with just-in-time checkpoints 91)"
        other = f"{steps / (steps + theirs):.2%}"
    for words, number in (("4 preemptions, 30 s grace", signal.SIGTERM), ("4 SIGKILLs", signal.SIGKILL)):
        with bench.ours(steps, every) as run:
            found = struck(bench, "preemption", run, points, number)
            outcome = run.finish()
        noted = sum(entry.replayed_steps for entry in run.entries())
        mine = max(noted, run.repeated(), sum(strike.repeated for strike in found))
        bench.note("preemption", "ours", signal=words, noted=noted, repeated=mine, **outcome)
        ratio = mine / theirs if theirs else None
        yield row(f"repeated steps of {steps:,}, {words}", str(mine), "<= 4", stock=stock, ratio=ratio)
        yield row(f"step goodput, {words}", f"{steps / (steps + mine):.2%}", ">= 99.75%", stock=other)


def kills(bench: Bench, section: str, words: str, wanted: tuple[str, str], pace: Pace) -> Iterator[str]:
    """SIGKILL of one of two ranks, or of both (section `all`), at random steps."""
    steps = -(-(pace.spacing * bench.repeats + 100) // EPOCH) * EPOCH
    everybody = section == "all"
    theirs: list[Strike] = []
    if bench.stock_repeats:
        with bench.stock(pace.spacing * bench.stock_repeats + 100, EVERY, pace) as plain:
            points = pace.points(bench.random, bench.stock_repeats)
            theirs = struck(bench, section, plain, points, signal.SIGKILL, everybody=everybody)
    with bench.ours(steps, EVERY, task=pace.task, batch=pace.batch) as run:
        points = pace.points(bench.random, bench.repeats)
        mine = struck(bench, section, run, points, signal.SIGKILL, everybody=everybody)
        outcome = run.finish()
    equal = run.weights() == bench.undisturbed(steps, pace).weights()
    bench.note(section, "ours", equal=equal, **outcome)
    losses = [max((strike.repeated for strike in strikes), default=0) for strikes in (mine, theirs)]
    stock = f"{losses[1]} (a checkpoint every {EVERY})" if theirs else ""
    yield row(f"{words}: steps repeated, most of {len(mine)}", str(losses[0]), wanted[1], stock=stock)
    same = f"{'equal' if equal else 'NOT EQUAL'} after {len(mine)} faults, samples exact: {outcome['samples_exact']}"
    yield row(f"{words}: final weights against the undisturbed run", same, "equal")
    times = [[strike.seconds for strike in strikes] for strikes in (mine, theirs)]
    ratio = statistics.median(times[0]) / statistics.median(times[1]) if theirs else None
    told = [seconds_of(values) for values in times]
    yield row(f"{words}: to the first step, {len(mine)} times", told[0], wanted[0], stock=told[1], ratio=ratio)
    names = dict.fromkeys(name for strike in mine for name in strike.parts)
    middle = {name: statistics.median([one.parts[name] for one in mine if name in one.parts]) for name in names}
    if middle:
        yield row(f"{words}: in parts (p50)", ", ".join(f"{name} {value:.1f} s" for name, value in middle.items()))


def sigterm(bench: Bench) -> Iterator[str]:
    """SIGTERM with 30 s of grace to one rank, on a store behind a slow line."""
    inside, took, lost = 0, [], []
    with slow_store(bench.folder / "sigterm-s3", SLOW_LINE) as (store, environment):
        ingest(open_store(store), "sentences", sentences())
        steps = 40 * bench.repeats + 100
        with bench.ours(steps, 100, task=HEAVY, store=store, environment=environment) as run:
            for number in range(bench.repeats):
                strike = struck(bench, "sigterm", run, [40 * number + 15], signal.SIGTERM)[0]
                committed = [
                    manifest["created_at"] - strike.struck_at
                    for step, manifest in run.manifests().items()
                    if step >= strike.step and manifest["created_at"] > strike.struck_at
                ]
                bench.note("sigterm", "ours", committed=committed)
                inside += bool(committed) and min(committed) <= GRACE_S
                took += committed[:1]
                lost.append(strike.repeated)
    words = f"SIGTERM, {GRACE_S:g} s grace, uploads at {SLOW_LINE / 1e6:g} MB/s"
    yield row(f"{words}: steps repeated, most of {len(lost)}", str(max(lost)), "0")
    yield row(f"{words}: inside the grace", f"{inside} of {len(lost)}", "all")
    yield row(f"{words}: to the committed checkpoint", seconds_of(took))


def stop(bench: Bench) -> Iterator[str]:
    """SIGSTOP of one of two ranks."""
    alarms, right, times = [], 0, []
    with bench.ours(BURST.spacing * bench.repeats + 100, EVERY) as run:
        for point in BURST.points(bench.random, bench.repeats):
            strike = struck(bench, "stop", run, [point], signal.SIGSTOP)[0]
            told = run.incidents("hang", since=strike.struck_at)
            bench.note("stop", "ours", incidents=[{**asdict(one), "evidence": None} for one in told])
            alarms += [told[0].at - strike.struck_at] if told else []
            right += bool(told) and [one.rank for one in told] == strike.ranks
            times.append(strike.seconds)
    stock = ""
    if bench.stock_repeats:
        with bench.stock(10 * EPOCH, EVERY) as plain:
            plain.reach(100)
            try:
                stock = f"{plain.strike(signal.SIGSTOP, [1], limit_s=STOCK_WATCH_S).seconds:.1f} s"
            except MissedError:
                stock = f"nothing in {STOCK_WATCH_S:g} s"
    yield row("SIGSTOP of a rank: the right rank named", f"{right} of {len(times)}", "all")
    yield row("SIGSTOP of a rank: to the alarm", seconds_of(alarms), "<= 15 s", stock=stock)
    yield row("SIGSTOP of a rank: to the first step", seconds_of(times), "<= 30 s", stock=stock)


def quiet(bench: Bench) -> Iterator[str]:
    """Nothing happens, but data and checkpoints are slow: false alarms."""
    minutes = bench.quiet_minutes
    with slow_store(bench.folder / "quiet-s3", VERY_SLOW_LINE) as (store, environment):
        command = [str(HERE / "parts.py"), f"quiet-{minutes:g}", store]
        with Run(bench.folder / "quiet", command, environment) as run:
            outcome = run.finish(60 * minutes + 300)
        counted = {kind: count for kind, count in count_incidents(open_store(store), "quiet").items() if count}
    bench.note("quiet", "ours", incidents=counted, **outcome)
    false = counted.get("hang", 0) + counted.get("straggler", 0)
    words = f"{outcome['steps']:,} quiet steps in {minutes:g} min, slow data and checkpoints: false alarms"
    yield row(words, str(false), "0")


def straggler(bench: Bench) -> Iterator[str]:
    """One of two ranks at a quarter of a CPU."""
    named, right, steps, how = 0, 0, [], ""
    calm = 80  # steps of a tenth of a second and more, until a rank that recovered is no straggler any more
    with bench.ours(2 * calm * (bench.repeats + 1), 10**6, task=USUAL, batch=USUALLY.batch) as run:
        begun = 0
        for _ in range(bench.repeats):
            group = run.reach(begun + calm)
            slow, since, begun = bench.random.choice(group), time.time(), max(mark.step for mark in group)
            with slowed(slow.pid, 0.25) as how, contextlib.suppress(MissedError):
                told = run.until(partial(run.incidents, "straggler", since=since), "alarm", 60.0, FILE_S)
                named += 1
                right += [one.rank for one in told] == [slow.rank]
                steps.append((told[0].step or 0) - begun)
                bench.note("straggler", "ours", rank=slow.rank, begun=begun, told=[one.reason for one in told])
                begun = max(mark.step for mark in run.newest())
        false = len(run.incidents("straggler")) - right
    most = f"{max(steps)}, median {statistics.median(steps):g}" if steps else "never"
    words = f"straggler at 25% of a CPU ({how})"
    yield row(f"{words}: named; the right rank", f"{named} of {bench.repeats}; {right}; {false} false alarms", "all; 0")
    yield row(f"{words}: steps until named, most", most, "<= 20")


def exact(bench: Bench) -> Iterator[str]:
    """The driver killed at random steps, the run resubmitted with another world size: 4, 2, 3 ranks."""
    steps, sizes = 3 * EPOCH, (4, 2, 3)
    samples = bench.undisturbed(steps).record()["samples"]
    equal, repeated = 0, []
    machine = Machine(bench.folder, 1, 4, 900.0, 0)
    for turn in range(bench.repeats):
        with cluster(machine):
            for number, workers in enumerate(sizes):
                with bench.ours(
                    steps, EVERY, name=f"exact-{turn}", workers=workers, environment=dict(machine.environment)
                ) as run:
                    if workers == sizes[-1]:
                        outcome = run.finish()
                    else:
                        run.reach(EPOCH * number + 20 + bench.random.randrange(EPOCH - 40))
                        run.process.kill()
        equal += outcome["samples_exact"] and run.record()["samples"] == samples
        repeated.append(sum(entry.replayed_steps for entry in run.entries()))
        bench.note("exact", "ours", repeated=repeated[-1], **outcome)
    words = "driver killed, then other world sizes (4, 2, 3)"
    yield row(f"{words}: samples of every epoch as undisturbed", f"{equal} of {bench.repeats}", "all")
    yield row(f"{words}: steps repeated in all, by the ledger", str(max(repeated)))


def overhead(bench: Bench) -> Iterator[str]:
    """The loop with and without hot copies, ledger, beats and agreement, in turns within one process group."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(HERE / "parts.py")]
    store = (bench.folder / "overhead").as_uri()
    with Run(bench.folder / "overhead-run", [*launcher, "overhead-24", store], {"OMP_NUM_THREADS": "1"}) as run:
        found = run.finish(900.0)
    bench.note("overhead", "ours", **found)
    ratio = statistics.median(a / b for a, b in zip(found["on"], found["off"], strict=True))
    on, off = statistics.median(found["on"]), statistics.median(found["off"])
    words = "steps/s with hot copies, ledger, beats and agreement; beside it without"
    yield row(words, f"{on:.1f}/s", ">= 0.98", stock=f"{off:.1f}/s (ours, without)", ratio=ratio)


ONE = ("p50 <= 7 s and <= 0.4", "at most 1 each")
ALL = ("<= 0.6", "at most the hot copies' interval")
SECTIONS: dict[str, Callable[[Bench], Iterator[str]]] = {
    "preemption": preemption,
    "kill": partial(kills, section="kill", words="SIGKILL of one rank", wanted=ONE, pace=USUALLY),
    "burst": partial(kills, section="burst", words="SIGKILL of one rank, again and again", wanted=ONE, pace=BURST),
    "all": partial(kills, section="all", words="SIGKILL of all ranks", wanted=ALL, pace=BURST),
    "sigterm": sigterm, "stop": stop, "quiet": quiet, "straggler": straggler, "exact": exact, "overhead": overhead,
}  # fmt: skip


def main() -> None:
    """Measure the sections that were asked for and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(SECTIONS), help="sections, by comma")
    parser.add_argument("--repeats", type=int, default=20, help="faults of each kind")
    parser.add_argument("--stock-repeats", type=int, default=10, help="the same for stock Ray Train; 0 leaves it out")
    parser.add_argument("--quiet-minutes", type=float, default=20.0)
    parser.add_argument("--seed", type=int, default=0, help="decides steps and ranks that are struck")
    parser.add_argument("--json", type=Path, help="file for the raw figures, one JSON line each")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what was started is ended
    wanted = options.only.split(",")
    if unknown := sorted(set(wanted) - set(SECTIONS)):
        parser.error(f"--only: no section {', '.join(unknown)}; there are {', '.join(SECTIONS)}")
    failed = False
    with tempfile.TemporaryDirectory(prefix="recovery-") as temporary:
        print(HEADER, flush=True)
        for name, section in SECTIONS.items():
            if name not in wanted:
                continue
            bench = Bench(
                Path(temporary) / name, options.repeats, options.stock_repeats, options.quiet_minutes,
                random.Random(f"{options.seed}-{name}"), options.json,  # noqa: S311 - no secret
            )  # fmt: skip
            try:
                for line in section(bench):
                    print(line, flush=True)
            except Exception as error:  # noqa: BLE001 - one section's failure is no reason to lose the others
                failed = True
                bench.note(name, "failed", error=f"{type(error).__name__}: {error}")
                print(row(f"{name}: FAILED", str(error)[:120]), flush=True)
    sys.exit(failed)


if __name__ == "__main__":
    main()
