"""Parts of training measured for themselves, each in a process of its own. Started by training.py and recovery.py.

    python benchmarks/parts.py feed-ours|feed-ray|feed-loader|feed-loader-by-row PARQUET
    python benchmarks/parts.py stall-ours|stall-torch STORE
    python -m torch.distributed.run --standalone --nproc-per-node=2 benchmarks/parts.py overhead-TURNS STORE
    python benchmarks/parts.py quiet-MINUTES STORE

A feed goes once over all rows in a shuffled order, from the Parquet file to batches of 256 as tensors; Ray Data, which
has no global order, reads in the file's. `rows_per_s` is that of the first epoch, reading and decoding included,
`later` that of the second. A stall is how long the training thread stands still for one checkpoint of a 100 MB state.
`overhead` has steps per second with and without what watches over a run, in turns. `quiet` is a run in which data and
checkpoints are slow and nothing is wrong. Prints JSON.
"""

from __future__ import annotations

import contextlib
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

BATCH = 256
SHAPE = (1, 28, 28)
TRANSFORMS = {"height": 28, "width": 28, "channels": 1, "classes": 10, "mean": 33.3, "deviation": 78.6}
STATE_BYTES = 100_000_000
CHECKPOINTS = 6
TURN_STEPS = 50

Epochs = Callable[[], Iterator[Any]]


def feed_ours(path: str) -> Iterator[Epochs]:
    """The framework's feed, in the framework's order."""
    import torch

    from lepton_ray.data.order import SampleOrder
    from lepton_ray.tasks import find_task
    from lepton_ray.training.feeding import Feed

    task = find_task("image_classification", {})
    with tempfile.TemporaryDirectory() as folder:
        feed = Feed(task, pq.read_table(path), TRANSFORMS, torch.device("cpu"), Path(folder) / "feed")
        order = SampleOrder(len(feed), 0)

        def epoch() -> Iterator[Any]:
            ahead = BATCH * 64  # as training/batches.py asks for ids
            for start in range(0, len(feed), ahead):
                ids = order.sample_ids(start, min(ahead, len(feed) - start))
                for at in range(0, len(ids), BATCH):
                    yield feed.take(ids[at : at + BATCH])

        yield epoch
        feed.close(finished=True)


def feed_ray(path: str) -> Iterator[Epochs]:
    """Ray Data's iter_torch_batches."""
    import ray
    import torch

    ray.data.DataContext.get_current().enable_progress_bars = False

    def tensors(batch: dict[str, np.ndarray]) -> tuple[torch.Tensor, torch.Tensor]:
        pixels = np.frombuffer(b"".join(batch["image"]), np.uint8).reshape(-1, *SHAPE)
        return torch.from_numpy(pixels.copy()), torch.from_numpy(batch["label"].astype(np.int64))

    data = ray.data.read_parquet(path)
    yield lambda: iter(data.iter_torch_batches(batch_size=BATCH, prefetch_batches=2, collate_fn=tensors))


def feed_loader(path: str, *, by_row: bool = False) -> Iterator[Epochs]:
    """A torch DataLoader over an Arrow table: whole batches taken from the table, or row by row and collated."""
    import torch
    from torch.utils.data import DataLoader, Dataset

    table = pq.read_table(path, columns=["image", "label"]).combine_chunks()

    class Rows(Dataset[Any]):
        def __len__(self) -> int:
            return int(table.num_rows)

        def __getitem__(self, row: int) -> Any:
            pixels = np.frombuffer(table["image"][row].as_py(), np.uint8).reshape(SHAPE)
            return torch.from_numpy(pixels.copy()), table["label"][row].as_py()

    class Batches(Rows):
        def __getitems__(self, rows: list[int]) -> Any:
            part = table.take(pa.array(np.asarray(rows)))
            pixels = np.frombuffer(b"".join(part["image"].to_pylist()), np.uint8).reshape(-1, *SHAPE)
            return torch.from_numpy(pixels.copy()), torch.from_numpy(part["label"].to_numpy().astype(np.int64))

    if by_row:
        yield lambda: iter(DataLoader(Rows(), BATCH, shuffle=True))
    else:
        yield lambda: iter(DataLoader(Batches(), BATCH, shuffle=True, collate_fn=lambda batch: batch))


def feed(kind: str, path: str) -> dict[str, float]:
    """Rows per second of two epochs, after modules are imported and Ray is up."""
    import torch

    torch.set_num_threads(1)
    if kind == "ours":
        import lepton_ray.training.feeding  # noqa: F401 - not part of what is compared
    if kind == "ray":
        import ray.data

        ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")

    rows = pq.read_metadata(path).num_rows
    makers = {
        "ours": feed_ours, "ray": feed_ray, "loader": feed_loader,
        "loader-by-row": lambda path: feed_loader(path, by_row=True),
    }  # fmt: skip
    speeds = []
    begun = time.perf_counter()
    with contextlib.contextmanager(makers[kind])(path) as epoch:
        for _ in range(2):
            seen = sum(len(targets) for _, targets in epoch())
            assert seen == rows, f"{kind}: {seen} rows instead of {rows}"  # noqa: S101 - a feed that loses rows is no feed
            now = time.perf_counter()
            speeds.append(rows / (now - begun))
            begun = now
    return {"rows_per_s": speeds[0], "later": speeds[1]}


def stall(kind: str, uri: str) -> dict[str, float]:
    """Median seconds that the training thread stands still per checkpoint, with half a second of steps between two."""
    import torch
    import torch.distributed as dist

    from lepton_ray.monitoring.recorder import Recorder
    from lepton_ray.settings import OptimizerSettings
    from lepton_ray.settings.training import ParallelSettings
    from lepton_ray.storage import open_store
    from lepton_ray.training.checkpoint_writer import CheckpointWriter
    from lepton_ray.training.checkpoints import CheckpointStore
    from lepton_ray.training.lease import RunLease
    from lepton_ray.training.optimisation import make_optimizer
    from lepton_ray.training.parallel import wrap
    from lepton_ray.training.state import copy_state

    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    side = int((STATE_BYTES / 4 / 3 / 8) ** 0.5)  # weights and AdamW's two moments of 8 square layers
    model = torch.nn.Sequential(*(torch.nn.Linear(side, side) for _ in range(8)))
    parallel = wrap(model, ParallelSettings(), torch.device("cpu"))
    optimizer = make_optimizer(model, OptimizerSettings())
    store = open_store(uri)
    recorder = Recorder(uri, "runs/stall/metrics/g1-rank0.json", {"run": "stall", "rank": "0"})
    lease = RunLease.acquire(store, "stall")  # a checkpoint is committed under the run's lease only
    writer = CheckpointWriter(CheckpointStore(store, "stall", lease.attempt), 2, recorder, parallel)
    inputs, stalls = torch.randn(8, side), []
    for step in range(1, CHECKPOINTS + 1):
        until = time.perf_counter() + 0.5
        while time.perf_counter() < until:
            optimizer.zero_grad()
            parallel.model(inputs).square().mean().backward()
            optimizer.step()
        begun = time.perf_counter()
        if kind == "ours":
            writer.submit(step, copy_state(parallel, optimizer, into=writer.spare()), {"step": step, "world_size": 1})
        else:
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / "state.pt"
                torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, path)
                store.put(f"runs/stall/plain/{step}.pt", path.read_bytes())
        stalls.append(time.perf_counter() - begun)
        writer.settle()  # checkpoints of real runs are further apart than their writing takes
    writer.finish()
    lease.release()
    dist.destroy_process_group()
    return {"stall_s": statistics.median(stalls[1:]), "first_s": stalls[0]}


def overhead(turns: str, uri: str) -> dict[str, list[float]]:
    """Steps per second, by turn, of the loop with everything `on`, and with what watches over a run `off`."""
    import torch.distributed as dist

    from lepton_ray.data.tables import ingest
    from lepton_ray.storage import open_store
    from lepton_ray.training.lease import RunLease
    from lepton_ray.training.loop import round_off, take_step

    dist.init_process_group("gloo")
    store, leads = open_store(uri), dist.get_rank() == 0
    if leads:
        ingest(store, "digits", "digits")
    leases = [RunLease.acquire(store, side) for side in ("on", "off")] if leads else []
    dist.barrier()
    sides = {side: _rank(uri, side) for side in ("on", "off")}
    _switch_off(sides["off"])
    speeds: dict[str, list[float]] = {"on": [], "off": []}
    for turn in range(int(turns) + 1):
        for side in ("on", "off") if turn % 2 else ("off", "on"):
            rank = sides[side]
            dist.barrier()
            begun = time.perf_counter()
            for _ in range(TURN_STEPS):
                rank.begin_epoch()
                take_step(rank)
                round_off(rank)
            if turn:  # the first one warms up
                speeds[side].append(TURN_STEPS / (time.perf_counter() - begun))
    for rank in sides.values():
        rank.close(finished=True)
        rank.context.close()
    for lease in leases:
        lease.release()
    dist.barrier()
    dist.destroy_process_group()
    return speeds


def _rank(uri: str, side: str) -> Any:
    """A rank of the 28x28 CNN; `off` without the parts that settings can leave out."""
    import torch

    from lepton_ray.data.split import split_rows
    from lepton_ray.data.tables import open_table
    from lepton_ray.settings import parse_settings
    from lepton_ray.storage import open_store
    from lepton_ray.tasks import find_task
    from lepton_ray.training.context import RankContext
    from lepton_ray.training.plan import RankPlan
    from lepton_ray.training.rank import Rank

    training: dict[str, Any] = {"epochs": 10_000, "evaluate_every_epochs": 10_000}
    training["checkpoint"] = {"every_steps": 10**9, "hot": side == "on"}
    if side == "off":
        training |= {"watchdog": {"enabled": False}, "divergence_every_steps": 0}
    settings = parse_settings({"run": side, "training": training})
    rows = open_table(open_store(uri), "digits").read()
    split = split_rows(rows, settings.data.split)
    train, held_out = rows.take(split.train), rows.take(split.held_out)
    transforms = find_task(settings.task.name, settings.task.options).fit(train)
    context = RankContext(RankPlan(settings, uri, 1, transforms, "", time.time()), torch.device("cpu"))
    return Rank(context, train, held_out, Path(tempfile.mkdtemp()) / side)


def _switch_off(rank: Any) -> None:
    """Leave out what no setting does: ledger, agreement, and the state between two steps."""
    ledger, recorder = rank.context.ledger, rank.context.recorder
    ledger.switch = ledger.step_done = rank.boundary.leave = rank.boundary.reach = lambda *_, **__: None
    rank.step_end.meet = lambda *_, **__: "go_on"
    recorder._stop.set()  # noqa: SLF001 - its thread writes the ledger every second


def quiet(minutes: str, uri: str) -> dict[str, float]:
    """A loop of one's own for so long: its data come late now and then, and the state is large for its store."""
    import lepton_ray
    from lepton_ray.storage import open_store

    def slow_loop(options: dict[str, float]) -> float:
        import torch

        class Slow(torch.utils.data.Dataset[Any]):
            def __len__(self) -> int:
                return 1600

            def __getitem__(self, row: int) -> Any:
                time.sleep(2.0 + row // 200 % 5 if row % 200 == 7 else 0.0005)  # eight times an epoch: seconds
                return torch.full((1024,), row / 1600), torch.tensor(row % 2)

        session = lepton_ray.training.session()
        model = session.prepare(torch.nn.Sequential(*(torch.nn.Linear(1024, 1024) for _ in range(4))))
        optimizer = session.prepare(torch.optim.AdamW(model.parameters()))
        for _ in session.epochs(1_000_000):
            for inputs, targets in session.batches(Slow(), 16):
                optimizer.zero_grad()
                torch.nn.functional.cross_entropy(model(inputs), targets).backward()
                optimizer.step()
            if session.sum(float(time.monotonic() > options["until"]))[0]:  # the same on all ranks
                break
        return float(session.step)

    training = {
        "workers": 2, "global_batch": 16, "checkpoint": {"every_steps": 25},
        "options": {"until": time.monotonic() + 60 * float(minutes)},
    }  # fmt: skip
    result = lepton_ray.run_distributed(slow_loop, {"run": "quiet", "training": training}, store=open_store(uri))
    return {"steps": result.step, "generations": result.generations}


if __name__ == "__main__":
    name, _, variant = sys.argv[1].partition("-")
    parts: dict[str, Callable[[str, str], Any]] = {"feed": feed, "stall": stall, "overhead": overhead, "quiet": quiet}
    print(json.dumps(parts[name](variant, sys.argv[2])), flush=True)
