"""What every rank of a run has, whoever wrote the loop: who it is, its ledger, its recorder, its door to the store."""

from __future__ import annotations

import json
import os
import re
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.distributed as dist

from lepton_ray.cluster import available_cpus
from lepton_ray.errors import ConflictError
from lepton_ray.monitoring.incidents import newest_of
from lepton_ray.monitoring.ledger import RankLedger
from lepton_ray.monitoring.recorder import Recorder
from lepton_ray.storage import Store, open_store
from lepton_ray.training.beat import Beat, beats_folder
from lepton_ray.training.checkpoints import CheckpointStore
from lepton_ray.training.collectives import broadcast_bytes, gather_bytes
from lepton_ray.training.history import History
from lepton_ray.training.interval import Failures
from lepton_ray.training.plan import RankPlan

_LEDGER = re.compile(r"g([0-9]+)-rank0\.json")
SNAPSHOT_EVERY_S = 1.0


def threads(reserved: int, local_ranks: int) -> int:
    """Threads of one rank: the CPUs that were reserved for it, as far as affinity and cgroup quota give them."""
    return max(1, min(reserved, available_cpus() // local_ranks))


@dataclass(frozen=True)
class Start:
    """What rank 0 found in the store and told the others."""

    generation: int
    """Number of this worker group over all attempts, from 1."""
    replay_until: int
    """Steps that an earlier generation is known to have done."""
    restart_cause: str | None
    """Why there was an earlier generation that did not finish; None for the first."""


class RankContext:
    """One rank's place in its run. Made by all ranks together: making it is a collective."""

    def __init__(self, plan: RankPlan, device: torch.device) -> None:
        self.plan, self.settings, self.device = plan, plan.settings, device
        self.training = plan.settings.training
        self.number, self.world_size = dist.get_rank(), dist.get_world_size()
        self.local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        torch.set_num_threads(threads(self.training.cpus_per_worker, int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))
        self.store: Store = open_store(plan.store_uri)
        run = self.run = self.settings.run
        self.failures = Failures()
        """Rank 0: how often earlier worker groups of the run failed."""
        self.ledger, start = self._begin()
        self.generation, self.replay_until, self.restart_cause = asdict(start).values()
        self.recorder = Recorder(
            plan.store_uri,
            f"runs/{run}/metrics/g{self.generation}-rank{self.number}.json",
            {"run": run, "rank": str(self.number)},
            every_s=SNAPSHOT_EVERY_S,
        )
        self.recorder.follow(self.ledger)
        self.recorder.start()
        self.beat: Beat | None = None
        """What the watchdog looks at; None where there is none."""
        if self.training.watchdog.enabled:
            self.beat = Beat(
                beats_folder(plan.store_uri, run, plan.created_at), run=run, attempt=plan.attempt,
                generation=self.generation, rank=self.number, world_size=self.world_size,
            )  # fmt: skip
            self.ledger.observed_by(self.beat)
        self.checkpoints = CheckpointStore(self.store, run, plan.attempt)
        self.history = History(
            self.store, run, self.generation, tensorboard=self.training.logging.tensorboard and self.leads
        )

    @property
    def leads(self) -> bool:
        """Whether this is rank 0, the one that writes for all."""
        return self.number == 0

    def devices(self) -> list[str]:
        """What each rank computes on, by rank; a collective."""
        cuda = self.device.type == "cuda"
        name = torch.cuda.get_device_name(self.device) if cuda else f"cpu, {torch.get_num_threads()} threads"
        return [part.decode() for part in gather_bytes(name.encode(), self.device)]

    def say(self, event: str, **facts: Any) -> None:
        """One JSON line of rank 0, with run, attempt and rank, for whoever reads the worker's output."""
        if self.leads:
            about = {"event": event, "run": self.run, "attempt": self.plan.attempt, "rank": self.number}
            print(json.dumps({**about, "generation": self.generation, "pid": os.getpid(), **facts}), flush=True)  # noqa: T201 - a rank's output is its log

    def resumed(self, step: int) -> None:
        """The group takes the run up at this step: the store shall know soon, should the group be lost at once."""
        self.ledger.resumed(step)
        self.recorder.write_soon()

    def close(self) -> None:
        """Write the last figures."""
        if self.beat is not None:
            self.beat.close()
        self.recorder.close()
        if self.leads:
            self.history.close()

    def _begin(self) -> tuple[RankLedger, Start]:
        """Rank 0 claims the next generation number by writing its ledger entry; all ranks learn it."""
        run, attempt = self.run, self.plan.attempt
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
        self.failures = Failures.of(entries)
        cause = None
        if entries:
            lost = "worker_lost" if entries[-1]["attempt"] == attempt else "driver_lost"
            hang = newest_of(self.store, run, "hang")
            if hang is not None and hang.generation == entries[-1]["generation"]:
                lost = "hung"
            cause = entries[-1].get("left") or lost
        generation = max(before, default=0) + 1
        while True:
            ledger = RankLedger(run, attempt, generation, 0, self.world_size)
            try:
                self.store.put_if_absent(ledger.key, json.dumps(ledger.entry()).encode())
                break
            except ConflictError:  # a group that is being replaced claimed it a moment ago
                generation += 1
        start = Start(generation=generation, replay_until=done, restart_cause=cause)
        broadcast_bytes(json.dumps(asdict(start)).encode(), self.device)
        return ledger, start
