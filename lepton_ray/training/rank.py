"""One rank of a worker group: what is set up before the loop and put away after it."""

from __future__ import annotations

import json
import logging
import os
import re
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from lepton_ray.data.order import SampleLedger
from lepton_ray.errors import ConflictError
from lepton_ray.monitoring.ledger import RankLedger
from lepton_ray.monitoring.recorder import Recorder
from lepton_ray.storage import Store, open_store
from lepton_ray.tasks import AnyTask, find_task
from lepton_ray.training.batches import BatchPlan
from lepton_ray.training.checkpoint_writer import CheckpointWriter
from lepton_ray.training.checkpoints import CheckpointStore
from lepton_ray.training.collectives import broadcast_bytes
from lepton_ray.training.history import History
from lepton_ray.training.plan import RankPlan
from lepton_ray.training.state import make_optimizer, unpack

_log = logging.getLogger(__name__)
_LEDGER = re.compile(r"g([0-9]+)-rank0\.json")
SNAPSHOT_EVERY_S = 1.0


@dataclass(frozen=True)
class Start:
    """What rank 0 found in the store and told the others."""

    generation: int
    replay_until: int
    """Steps that an earlier generation is known to have done."""
    restart_cause: str | None
    """Why there was an earlier generation that did not finish; None for the first."""


class Rank:
    """Model, optimiser, data and instruments of one rank, restored to where the run was."""

    def __init__(self, plan: RankPlan, train: pa.Table, held_out: pa.Table, device: torch.device) -> None:
        self.plan, self.settings, self.device = plan, plan.settings, device
        self.training = plan.settings.training
        self.number, self.world_size = dist.get_rank(), dist.get_world_size()
        torch.set_num_threads(self.training.cpus_per_worker)
        self.store: Store = open_store(plan.store_uri)
        run, attempt = self.settings.run, plan.attempt
        self.ledger, start = self._begin(run, attempt)
        self.generation, self.replay_until = start.generation, start.replay_until
        self.restart_cause = start.restart_cause
        self.recorder = Recorder(
            plan.store_uri,
            f"runs/{run}/metrics/g{self.generation}-rank{self.number}.json",
            {"run": run, "rank": str(self.number)},
            every_s=SNAPSHOT_EVERY_S,
        )
        self.recorder.follow(self.ledger)
        self.recorder.start()

        self.task: AnyTask = find_task(self.settings.task.name, self.settings.task.options)
        self.inputs = self.task.inputs(train, plan.transforms).to(device)
        self.targets = self.task.targets(train, plan.transforms).to(device)
        mine = held_out.take(list(range(self.number, held_out.num_rows, self.world_size)))
        self.held_out = (
            self.task.inputs(mine, plan.transforms).to(device),
            self.task.targets(mine, plan.transforms).to(device),
        )
        self.batches = BatchPlan(
            rows=train.num_rows, epochs=self.training.epochs, global_batch=self.training.global_batch,
            seed=self.training.seed, rank=self.number, world_size=self.world_size,
        )  # fmt: skip
        torch.manual_seed(self.training.seed)  # the same weights on every rank, whatever ran before
        self.model = self.task.build(plan.transforms).to(device)
        self.optimizer = make_optimizer(self.model, self.training.optimizer)
        self.checkpoints = CheckpointStore(self.store, run, attempt)
        self.writer = CheckpointWriter(self.checkpoints, self.training.checkpoint.keep, self.recorder)
        self.history = History(self.store, run, self.generation)
        self.samples = SampleLedger()
        """Rank 0: the merged sample ledger of all steps before `start_step`."""
        self.metrics: dict[str, float] = {}
        """The newest evaluation."""
        self.start_step = self._restore()
        self.ddp = DistributedDataParallel(self.model, gradient_as_bucket_view=True, forward_sync_buffers=False)

    @property
    def leads(self) -> bool:
        """Whether this is rank 0, the one that writes for all."""
        return self.number == 0

    def _begin(self, run: str, attempt: int) -> tuple[RankLedger, Start]:
        """Rank 0 claims the next generation number by writing its ledger entry; all ranks learn it."""
        if not self.leads:
            start = Start(**json.loads(broadcast_bytes(None, self.device)))
            return RankLedger(run, attempt, start.generation, self.number, self.world_size), start
        before = [
            int(found.group(1))
            for name in self.store.list_names(f"runs/{run}/ledger")
            if (found := _LEDGER.fullmatch(name))
        ]
        entries = [json.loads(self.store.get(f"runs/{run}/ledger/g{number}-rank0.json")) for number in sorted(before)]
        done = max((int(entry["last_step"] or 0) for entry in entries), default=0)
        cause = None
        if entries:
            cause = "worker_lost" if entries[-1]["attempt"] == attempt else "driver_lost"
        generation = max(before, default=0) + 1
        while True:
            ledger = RankLedger(run, attempt, generation, 0, self.world_size)
            try:
                self.store.put_if_absent(ledger.key, json.dumps(ledger.entry()).encode())
                break
            except ConflictError:  # a group that is being replaced claimed it a moment ago
                generation += 1
        start = Start(generation=generation, replay_until=done, restart_cause=cause)
        broadcast_bytes(json.dumps(start.__dict__).encode(), self.device)
        return ledger, start

    def _restore(self) -> int:
        """Restore the newest verified checkpoint, read once by rank 0; returns the steps that are done."""
        names = ("model.safetensors", "optimizer.safetensors", "state.json")
        files: dict[str, bytes] = {}
        found = self.checkpoints.newest() if self.leads else None
        if found is not None:
            for reason in found.skipped:
                _log.warning("checkpoint skipped: %s", reason)
                self._say("checkpoint skipped", reason=reason)
            files = found.files
        for name in names:
            files[name] = broadcast_bytes(files.get(name) if self.leads else None, self.device)
        if not files["state.json"]:
            return 0
        state = unpack(files, self.model, self.optimizer)
        if self.leads:
            self.samples = SampleLedger.from_json(state["samples"])
        self.metrics = state["metrics"]
        step = int(state["step"])
        self._say("resumed", step=step, sample_offset=state["sample_offset"])
        return step

    def _say(self, event: str, **facts: Any) -> None:
        """One JSON line of rank 0, with run, attempt and rank, for whoever reads the worker's output."""
        if self.leads:
            about = {"event": event, "run": self.settings.run, "attempt": self.plan.attempt, "rank": self.number}
            print(json.dumps({**about, "generation": self.generation, "pid": os.getpid(), **facts}), flush=True)  # noqa: T201 - a rank's output is its log

    def close(self) -> None:
        """Write the last figures."""
        self.recorder.close()
