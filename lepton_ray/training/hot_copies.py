"""Hot copies: the newest state of a run in its nodes' shared memory, so that a lost worker costs one step at most.

Each rank writes what only it knows (with `ddp` one rank of each node the whole state, with `fsdp` its shards) to two
buffers in turn; the small file that says what a buffer holds is put beside it last, by renaming. The memory belongs to
no process, so it outlives a killed worker group. When a rank is lost, the others hold the state of the newest step
still: with `ddp` one of each node writes it before it lets go (`salvage`), however long ago the last copy was. A group
that starts takes the newest step of which all parts are there, if no checkpoint is newer. Nothing is read that is not
this user's, this run's and whole.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist

from lepton_ray.data.order import SampleLedger
from lepton_ray.training.collectives import gather_bytes
from lepton_ray.training.context import RankContext
from lepton_ray.training.hot_buddy import Buddies
from lepton_ray.training.hot_choice import choose
from lepton_ray.training.hot_folder import SHARED_MEMORY, folder_of, own_folder
from lepton_ray.training.hot_memory import Buffer, digest_of, loaded, make_buffer, remove_abandoned, size_of
from lepton_ray.training.sample_log import SETTLED_EVERY, SampleLog, account_at, common, keep_common, logged
from lepton_ray.training.state import STATE, StateCopy, pack

_log = logging.getLogger(__name__)
OVERHEAD = 0.005
"""Share of the time of the steps that copying may take; the number of steps between two copies follows from it."""
_ACCOUNT = "account-of-rank-"
LARGEST_SHARE = 0.4
"""Share of the free shared memory that both buffers of a rank may take together."""
AGREE_AT = (4, 32)
"""Steps of a group after which the ranks agree on the interval; later they do with each checkpoint."""
Planned = Callable[[Mapping[str, Any], Mapping[str, Any]], SampleLedger]
"""From a common account (`sample_log.common`) and the state of a later step: the samples of the steps between."""
Copied = Callable[[StateCopy | None], StateCopy]
"""Gives the rank's copy of the state, in the memory of the copy that it is given."""


class HotCopies:
    """The hot copies of one rank. Made by all ranks together: making it is a collective.

    Args:
        context: the rank's place in its run.
        enabled: `training.checkpoint.hot`.
        sharded: whether every rank holds a part of the state.
    """

    def __init__(self, context: RankContext, *, enabled: bool, sharded: bool) -> None:
        self._context, self._sharded = context, sharded
        self._folder = folder_of(context.plan.store_uri, context.run, context.plan.created_at)
        self._buffers: list[Buffer] = []
        self._turn = 0
        self._cost = self._last = 0.0
        self._step_s = math.inf
        self._steps = 0
        self._ready = self._failed = False
        self._log: SampleLog | None = None
        self.every_steps = 1
        """Steps between two copies."""
        self.enabled = self._agreed(enabled and own_folder(self._folder))
        self._buddies: Buddies | None = None
        if self.enabled:
            remove_abandoned(self._folder)
            if sharded:
                self._buddies = Buddies(self._folder, context.generation, context.device)

    def begin(self, step: int, largest: int, samples: Mapping[str, Any]) -> None:
        """Begin the log of samples, once the rank is where the run was; every rank calls it.

        Args:
            step: steps that are done.
            largest: samples of one batch of this rank at most.
            samples: this rank's account so far.
        """
        if not self.enabled:
            return
        context, self._log = self._context, None
        about = {"rank": context.number, "generation": context.generation, "world_size": context.world_size}
        try:
            self._log = SampleLog(self._folder / f"{self._name}.log", largest, about)
        except OSError as error:  # then a lost rank costs the steps since the last copy of all ranks
            _log.warning("no log of samples: %s", error)
        self._settle(step, samples)

    def share(self, step: int, samples: Mapping[str, Any], plan: Mapping[str, Any] | None = None) -> None:
        """Keep the account of all ranks after `step` steps on this node, in case another node is lost.

        Args:
            step: steps that are done.
            samples: the account, the same on all ranks.
            plan: what `Planned` needs to tell the samples of later steps.
        """
        if self.enabled and self._context.local_rank == 0:
            try:
                keep_common(self._folder, self._context.generation, step, samples, plan or {})
            except OSError as error:  # then a lost node costs the steps since the newest checkpoint
                _log.warning("no common account of samples: %s", error)

    def account(self, step: int, samples: Callable[[], Mapping[str, Any]]) -> None:
        """Before a step's batch is taken: now and then this rank's account up to the `step` steps that are done."""
        if self._log is not None and step % SETTLED_EVERY == 0:
            self._settle(step, samples())

    def took(self, step: int, ids: npt.NDArray[np.int64], epochs: int | npt.NDArray[np.int64]) -> None:
        """Before each step: the samples of its batch.

        Args:
            step: steps that are done once this one is.
            ids: of this rank's samples, shape `[n]`, none where it has no share.
            epochs: the epoch of all, or of each of them.
        """
        if self._log is not None:
            self._log.took(step, ids, epochs)

    def _settle(self, step: int, samples: Mapping[str, Any]) -> None:
        """Write the account; shared memory that is full ends the log, never the run."""
        try:
            if self._log is not None:
                self._log.settle(step, samples)
        except OSError as error:
            _log.warning("the log of samples ends: %s", error)
            self._log = None

    @property
    def _name(self) -> str:
        return f"g{self._context.generation}-rank{self._context.number}"

    @property
    def holds_tensors(self) -> bool:
        """Whether this rank copies tensors, or only its account of the samples."""
        return self._sharded or self._context.local_rank == 0

    def put(self, step: int, copied: Copied, state: Callable[[], Mapping[str, Any]]) -> None:
        """After each step: copy the state, if it is time to.

        Args:
            step: steps that are done; the same on all ranks.
            copied: gives the copy.
            state: gives what goes with it as JSON; `samples` in it are this rank's own.
        """
        if not self.enabled:
            return
        self._steps += 1
        now = time.perf_counter()
        if self._last:
            self._step_s = min(self._step_s, now - self._last)
        self._last = now
        if self._steps in AGREE_AT:
            self.agree()
        if step % self.every_steps or not self.enabled:
            return
        first = not self._ready
        if first:
            self._allocate(copied)
        if self.enabled:
            written = None
            try:
                written = None if self._failed else self._write(step, copied, state())
            except OSError as error:  # a copy that fails costs a faster restart, never the run
                self._failed = True
                _log.warning("hot copies end: %s", error)
            if self._buddies is not None:
                self._buddies.exchange(written)
            spent = time.perf_counter() - now
            # the least of each: what else runs on the machine is no cost of copying
            if not first:
                self._cost = min(self._cost or math.inf, spent)
            self._last += spent

    def salvage(self, step: int, copied: Copied, state: Callable[[], Mapping[str, Any]]) -> bool:
        """After another rank was lost: the state as it is, unless this node has it already; talks to no other rank.

        Only with `ddp`, where every rank holds the whole state. Arguments as for `put`; `step` is the newest step that
        is done. Whether this rank wrote it.
        """
        if not self.enabled or self._sharded or self._log is None or self._held(step):
            return False
        try:
            marker = self._folder / f"g{self._context.generation}-{step}.salvaged"
            os.close(os.open(marker, os.O_CREAT | os.O_EXCL, 0o600))
            if not self._buffers:
                self._make_buffers(copied(None), 1)
            if not self._buffers:
                return False
            # the batch of the step that failed is in the state's account, and not in the log's up to this step
            samples = account_at(self._log.path, step).to_json()
            self._write(step, copied, {**state(), "samples": samples}, whole=True)
        except (OSError, KeyError):  # another rank of this node is at it, or there is no memory
            return False
        return True

    def agree(self) -> None:
        """Settle the interval by the slowest rank's cost; a collective."""
        if not self.enabled:
            return
        share = self._cost / max(self._step_s, 1e-6) if math.isfinite(self._step_s) else 0.0
        mine = [share, float(self._failed), float(self._turn == 0)]
        most = torch.tensor(mine, dtype=torch.float64, device=self._context.device)
        dist.all_reduce(most, op=dist.ReduceOp.MAX)
        self.every_steps = max(1, math.ceil(float(most[0]) / OVERHEAD))
        self.enabled = not float(most[1])
        self._context.recorder.set("lepton_hot_copy_interval_steps", self.every_steps)
        if not float(most[2]):  # all ranks have a copy of this group: those of the groups before it are not needed
            self._remove_earlier()

    def forget(self) -> None:
        """When the run goes back: what was copied is ahead of it."""
        for buffer in self._buffers:
            buffer.said.unlink(missing_ok=True)
        if self.enabled and self._context.local_rank == 0:
            for said in self._folder.glob("g*.json"):
                said.unlink(missing_ok=True)

    def remove(self) -> None:
        """At the end of a run: nobody needs the copies any more."""
        if self.enabled and self._context.local_rank == 0:
            shutil.rmtree(self._folder, ignore_errors=True)

    def _remove_earlier(self) -> None:
        """Remove what the groups before this one left on this node."""
        if self._context.local_rank == 0:
            for path in self._folder.glob("g*"):
                if not path.name.startswith(f"g{self._context.generation}-"):
                    path.unlink(missing_ok=True)

    def _agreed(self, mine: bool) -> bool:
        """Whether all ranks say so."""
        all_of_them = torch.tensor([float(mine)], device=self._context.device)
        dist.all_reduce(all_of_them, op=dist.ReduceOp.MIN)
        return bool(all_of_them)

    # --- writing

    def _allocate(self, copied: Copied) -> None:
        """Two buffers of the size of the state; switched off on all ranks where one has no memory for it."""
        self._ready = True
        first = copied(None) if self.holds_tensors else StateCopy({}, {}, None, self._context.number)
        self._make_buffers(first, 2)
        if not self._agreed(bool(self._buffers)):
            self.enabled = False
            self._context.say("no hot copies", reason=f"shared memory is too small for twice {size_of(first)} bytes")

    def _make_buffers(self, first: StateCopy, count: int) -> None:
        size, free = size_of(first), os.statvfs(SHARED_MEMORY)
        if 2 * size > LARGEST_SHARE * free.f_bavail * free.f_frsize:
            return
        try:
            paths = [self._folder / f"{self._name}.{turn}" for turn in range(count)]
            self._buffers = [make_buffer(path, size, first) for path in paths]
        except OSError as error:
            _log.warning("no hot copies: %s", error)

    def _write(self, step: int, copied: Copied, state: Mapping[str, Any], *, whole: bool = False) -> Buffer:
        """Write the next buffer and return it; `whole`: with tensors, though another rank of this node writes them."""
        if self._buffers and (whole and not self.holds_tensors and size_of(self._buffers[0].copy) == 0):
            self._make_buffers(copied(None), 1)
            self._turn = 0
        buffer = self._buffers[self._turn % len(self._buffers)]
        self._turn += 1
        buffer.said.unlink(missing_ok=True)  # from here until the rename the buffer holds nothing
        tensors = whole or self.holds_tensors
        copy = copied(buffer.copy) if tensors else StateCopy({}, {}, None, self._context.number)
        said = {
            "step": step, "rank": self._context.number, "world_size": self._context.world_size,
            "generation": self._context.generation, "state": dict(state), "layout": copy.layout,
            "digest": digest_of(buffer.memory),
        }  # fmt: skip
        fresh = buffer.said.with_suffix(".new")
        fresh.write_text(f"{json.dumps(said)}\n{buffer.tensors if copy.tensors else '{}'}", encoding="utf-8")
        fresh.replace(buffer.said)
        return buffer

    def _held(self, step: int) -> bool:
        """Whether a rank of this node has a whole copy of this step."""
        for said in self._folder.glob(f"g{self._context.generation}-rank*.json"):
            with contextlib.suppress(OSError, ValueError, KeyError):
                head, _, tensors = said.read_text(encoding="utf-8").partition("\n")
                if json.loads(head)["step"] == step and tensors != "{}":
                    return True
        return False

    # --- reading

    def newest(self, after: int, planned: Planned | None = None) -> dict[str, bytes] | None:
        """The files of a checkpoint of the newest step that all parts of are there, on every rank; a collective.

        Args:
            after: the step must be beyond this one (that of the newest checkpoint).
            planned: tells the samples of steps of which a lost node has the log; None where nothing does.

        Returns None where there is no such step.
        """
        device = self._context.device
        mine = self._found() if self.enabled else []
        reads = self.enabled and self._context.local_rank == 0
        logs = logged(self._folder) if reads else []
        shared = common(self._folder) if reads and planned is not None else []
        copies = [
            {key: value for key, value in one.items() if key not in ("tensors", "path", "layout")}
            | {"whole": bool(one["tensors"])} for one in mine
        ]  # fmt: skip
        heads = [json.loads(part) for part in gather_bytes(json.dumps([copies, logs, shared]).encode(), device)]
        choice = choose(
            [one for one, _, _ in heads], after, [log for _, one, _ in heads for log in one], self._sharded,
            [base for _, _, one in heads for base in one],
        )  # fmt: skip
        if choice is None:
            return None
        if choice["base"] is not None and planned is not None:
            self._context.say("samples by plan", step=choice["step"], known_to=choice["base"]["step"])
            choice["samples"].merge(planned(choice["base"], choice["state"]))
        files: dict[str, bytes] = {}
        accounts: list[SampleLedger] = [choice["samples"]]
        for part in gather_bytes(_joined(self._packed(mine, logs, choice)), device):
            for name, data in _parted(part).items():
                if name.startswith(_ACCOUNT):
                    accounts.append(SampleLedger.from_json(json.loads(data)))
                else:
                    files[name] = data
        samples = SampleLedger()
        for account in accounts:
            samples.merge(account)
        files[STATE] = json.dumps({**json.loads(files[STATE]), "samples": samples.to_json()}).encode()
        return files

    def _found(self) -> list[dict[str, Any]]:
        """What this node has, read by one rank of it."""
        found: list[dict[str, Any]] = []
        if self._context.local_rank != 0 or not self._folder.is_dir():
            return found
        for said in sorted(self._folder.glob("g*.json")):
            with contextlib.suppress(OSError, ValueError, KeyError):
                head, _, tensors = said.read_text(encoding="utf-8").partition("\n")
                one = {**json.loads(head), "tensors": json.loads(tensors)}
                one["path"] = str(said.with_suffix(""))
                data = Path(one["path"]).read_bytes()
                if digest_of(data) == one["digest"]:
                    found.append(one)
        return found

    def _packed(
        self, mine: list[dict[str, Any]], logs: list[dict[str, Any]], choice: dict[str, Any]
    ) -> dict[str, bytes]:
        """The files that this node's copies make of the chosen step, and the accounts that its logs have."""
        generation, step = choice["generation"], choice["step"]
        files: dict[str, bytes] = {}
        for one in mine:
            if (one["generation"], one["step"]) != (generation, step) or not one["tensors"]:
                continue
            if not (self._sharded or one["rank"] == choice["holders"][0]):
                continue
            files |= pack(loaded(one), choice["state"])
            if not self._sharded:  # `pack` leaves the state to rank 0
                files[STATE] = json.dumps(choice["state"]).encode()
        for log in logs:
            if log["generation"] == generation and log["rank"] in choice["logs"]:
                account = account_at(Path(log["path"]), step)
                files[f"{_ACCOUNT}{log['rank']}"] = json.dumps(account.to_json()).encode()
        return files


def _joined(files: Mapping[str, bytes]) -> bytes:
    """Files as one run of bytes: a JSON line of names and sizes, then the contents."""
    index = json.dumps([[name, len(data)] for name, data in files.items()]).encode() + b"\n"
    return index + b"".join(files.values())


def _parted(data: bytes) -> dict[str, bytes]:
    """The files that `_joined` joined."""
    line, _, rest = data.partition(b"\n")
    files, at = {}, 0
    for name, size in json.loads(line):
        files[name] = rest[at : at + size]
        at += size
    return files
