"""Hot copies: the newest state of a run in its nodes' shared memory, so that a lost worker costs one step at most.

Each rank writes what only it knows (with `ddp` one rank of each node the whole state, with `fsdp` its shards) to two
buffers in turn; the small file that says what a buffer holds is put beside it last, by renaming. The memory belongs to
no process, so it outlives a killed worker group. A group that starts takes the newest step of which all parts are
there, if no checkpoint is newer. Nothing is read that is not this user's, this run's and whole.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import mmap
import os
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from lepton_ray.data.order import SampleLedger
from lepton_ray.training.collectives import gather_bytes
from lepton_ray.training.context import RankContext
from lepton_ray.training.hot_folder import SHARED_MEMORY, folder_of
from lepton_ray.training.state import StateCopy, pack

_log = logging.getLogger(__name__)
OVERHEAD = 0.005
"""Share of the time of the steps that copying may take; the number of steps between two copies follows from it."""
LARGEST_SHARE = 0.4
"""Share of the free shared memory that both buffers of a rank may take together."""
ABANDONED_S = 6 * 3600.0
"""Age at which the copies of a run that never came back are removed by the next run on the node."""
AGREE_AT = (4, 32)
"""Steps of a group after which the ranks agree on the interval; later they do with each checkpoint."""
_ALIGN = 64


@dataclass
class _Buffer:
    """One of a rank's two buffers."""

    memory: mmap.mmap
    copy: StateCopy
    said: Path
    """The small file that says what the buffer holds."""
    tensors: str
    """Names, types and shapes of what lies in the memory, as JSON."""


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
        self._buffers: list[_Buffer] = []
        self._turn = 0
        self._cost = self._last = 0.0
        self._step_s = math.inf
        self._steps = 0
        self._ready = self._failed = False
        self.every_steps = 1
        """Steps between two copies."""
        self.enabled = self._agreed(enabled and _own_folder(self._folder))
        if self.enabled:
            _remove_abandoned(self._folder)

    @property
    def holds_tensors(self) -> bool:
        """Whether this rank copies tensors, or only its account of the samples."""
        return self._sharded or self._context.local_rank == 0

    def put(
        self, step: int, copied: Callable[[StateCopy | None], StateCopy], state: Callable[[], Mapping[str, Any]]
    ) -> None:
        """After each step: copy the state, if it is time to.

        Args:
            step: steps that are done; the same on all ranks.
            copied: gives the rank's copy of the state, in the memory of the copy that it is given.
            state: gives what goes with it as JSON; of other ranks than 0 only `samples`, this rank's own, is looked at.
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
        if self.enabled and not self._failed:
            try:
                self._write(step, copied, state())
            except OSError as error:  # a copy that fails costs a faster restart, never the run
                self._failed = True
                _log.warning("hot copies end: %s", error)
            spent = time.perf_counter() - now
            # the least of each: what else runs on the machine is no cost of copying
            if not first:
                self._cost = min(self._cost or math.inf, spent)
            self._last += spent

    def agree(self) -> None:
        """Settle the interval by the slowest rank's cost; a collective."""
        if not self.enabled:
            return
        share = self._cost / max(self._step_s, 1e-6) if math.isfinite(self._step_s) else 0.0
        most = torch.tensor([share, float(self._failed)], dtype=torch.float64, device=self._context.device)
        dist.all_reduce(most, op=dist.ReduceOp.MAX)
        self.every_steps = max(1, math.ceil(float(most[0]) / OVERHEAD))
        self.enabled = not float(most[1])
        self._context.recorder.set("lepton_hot_copy_interval_steps", self.every_steps)

    def forget(self) -> None:
        """When the run goes back: what was copied is ahead of it."""
        for buffer in self._buffers:
            buffer.said.unlink(missing_ok=True)

    def remove(self) -> None:
        """At the end of a run: nobody needs the copies any more."""
        if self.enabled and self._context.local_rank == 0:
            shutil.rmtree(self._folder, ignore_errors=True)

    def _agreed(self, mine: bool) -> bool:
        """Whether all ranks say so."""
        all_of_them = torch.tensor([float(mine)], device=self._context.device)
        dist.all_reduce(all_of_them, op=dist.ReduceOp.MIN)
        return bool(all_of_them)

    # --- writing

    def _allocate(self, copied: Callable[[StateCopy | None], StateCopy]) -> None:
        """Two buffers of the size of the state; switched off on all ranks where one has no memory for it."""
        self._ready = True
        first = copied(None) if self.holds_tensors else StateCopy({}, {}, None, self._context.number)
        size = sum(_aligned(value) for tensors in first.tensors.values() for value in tensors.values())
        size += sum(_aligned(value) for value in first.memory.values())
        free = os.statvfs(SHARED_MEMORY)
        name = f"g{self._context.generation}-rank{self._context.number}"
        try:
            if 2 * size <= LARGEST_SHARE * free.f_bavail * free.f_frsize:
                paths = [self._folder / f"{name}.{turn}" for turn in (0, 1)]
                self._buffers = [_buffer(path, size, first) for path in paths]
        except OSError as error:
            _log.warning("no hot copies: %s", error)
        if not self._agreed(bool(self._buffers)):
            self.enabled = False
            self._context.say("no hot copies", reason=f"shared memory is too small for twice {size} bytes")

    def _write(self, step: int, copied: Callable[[StateCopy | None], StateCopy], state: Mapping[str, Any]) -> None:
        buffer = self._buffers[self._turn]
        self._turn = 1 - self._turn
        buffer.said.unlink(missing_ok=True)  # from here until the rename the buffer holds nothing
        copy = copied(buffer.copy) if self.holds_tensors else StateCopy({}, {}, None, self._context.number)
        said = {
            "step": step, "rank": self._context.number, "world_size": self._context.world_size,
            "generation": self._context.generation, "state": dict(state), "layout": copy.layout,
            "digest": _digest(buffer.memory),
        }  # fmt: skip
        fresh = buffer.said.with_suffix(".new")
        fresh.write_text(f"{json.dumps(said)}\n{buffer.tensors if copy.tensors else '{}'}", encoding="utf-8")
        fresh.replace(buffer.said)

    # --- reading

    def newest(self, after: int) -> dict[str, bytes] | None:
        """The files of a checkpoint of the newest step that all parts of are there, on every rank; a collective.

        Args:
            after: the step must be beyond this one (that of the newest checkpoint).

        Returns None where there is no such step.
        """
        device = self._context.device
        mine = self._found() if self.enabled else []
        heads = [{k: v for k, v in one.items() if k not in ("tensors", "path", "layout")} | {
            "whole": bool(one["tensors"])} for one in mine]  # fmt: skip
        all_heads = [json.loads(part) for part in gather_bytes(json.dumps(heads).encode(), device)]
        choice = _choose(all_heads, after, sharded=self._sharded)
        if choice is None:
            return None
        files: dict[str, bytes] = {}
        packed = self._packed(mine, choice, all_heads)
        for part in gather_bytes(_joined(packed), device):
            files |= _parted(part)
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
                if _digest(data) == one["digest"]:
                    found.append(one)
        return found

    def _packed(
        self, mine: list[dict[str, Any]], choice: dict[str, Any], heads: list[list[dict[str, Any]]]
    ) -> dict[str, bytes]:
        """The files that this node's copies make of the chosen step."""
        chosen = [one for one in mine if (one["generation"], one["step"]) == (choice["generation"], choice["step"])]
        files: dict[str, bytes] = {}
        first_holder = choice["holders"][0]
        for one in chosen:
            if not one["tensors"] or not (self._sharded or one["rank"] == first_holder):
                continue
            state = dict(choice["state"])
            copy = _loaded(one)
            files |= pack(copy, state)
            if not self._sharded and one["rank"] != 0:  # `pack` leaves the state to rank 0
                files["state.json"] = json.dumps(state).encode()
        return files


def _choose(heads: list[list[dict[str, Any]]], after: int, *, sharded: bool) -> dict[str, Any] | None:
    """The newest step beyond `after` of the newest generation that all parts of are there, and its state."""
    by_step: dict[tuple[int, int], dict[int, dict[str, Any]]] = {}
    for one in (one for node in heads for one in node):
        by_step.setdefault((one["generation"], one["step"]), {})[one["rank"]] = one
    for (generation, step), ranks in sorted(by_step.items(), reverse=True, key=lambda item: (item[0][1], item[0][0])):
        world_size = next(iter(ranks.values()))["world_size"]
        holders = sorted(rank for rank, one in ranks.items() if one["whole"])
        if step <= after or len(ranks) < world_size or not holders or (sharded and len(holders) < world_size):
            continue
        samples = SampleLedger()
        for one in ranks.values():
            samples.merge(SampleLedger.from_json(one["state"]["samples"]))
        state = {**ranks[0]["state"], "samples": samples.to_json()}
        return {"generation": generation, "step": step, "holders": holders, "state": state}
    return None


def _buffer(path: Path, size: int, first: StateCopy) -> _Buffer:
    """A buffer for copies like `first`; its memory is taken now, since writing to memory that is not there kills."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    try:
        os.posix_fallocate(descriptor, 0, max(size, 1))
        memory = mmap.mmap(descriptor, max(size, 1))
    finally:
        os.close(descriptor)
    return _Buffer(memory, _placed(memory, first), Path(f"{path}.json"), _described(first))


def _own_folder(folder: Path) -> bool:
    """Make the folder; False where shared memory is missing or somebody else's folder stands in the way."""
    try:
        folder.parent.mkdir(mode=0o700, exist_ok=True)
        about = folder.parent.lstat()
        if about.st_uid != os.getuid() or folder.parent.is_symlink():
            return False
        folder.mkdir(mode=0o700, exist_ok=True)
    except OSError:
        return False
    return True


def _remove_abandoned(folder: Path) -> None:
    for beside in folder.parent.iterdir():
        with contextlib.suppress(OSError):
            newest = max([entry.stat().st_mtime for entry in beside.iterdir()], default=beside.stat().st_mtime)
            if beside != folder and time.time() - newest > ABANDONED_S:
                shutil.rmtree(beside)


def _digest(data: bytes | mmap.mmap) -> list[int]:
    """Sum and exclusive or of the 64-bit words: finds flipped bits at the speed of memory, a tenth of CRC-32's time."""
    words = np.frombuffer(data, np.uint64, count=len(data) // 8)
    return [int(np.add.reduce(words)), int(np.bitwise_xor.reduce(words))]


def _aligned(value: torch.Tensor) -> int:
    return -(-value.numel() * value.element_size() // _ALIGN) * _ALIGN


def _views(memory: mmap.mmap, shapes: Mapping[str, Mapping[str, torch.Tensor]]) -> dict[str, dict[str, torch.Tensor]]:
    """Tensors of these shapes that lie one after the other in the memory."""
    views: dict[str, dict[str, torch.Tensor]] = {}
    at = 0
    for kind, tensors in shapes.items():
        for name, like in tensors.items():
            count = like.numel()
            flat = torch.frombuffer(memory, dtype=like.dtype, count=count, offset=at) if count else torch.empty(0)
            views.setdefault(kind, {})[name] = flat.to(like.dtype).reshape(like.shape)
            at += _aligned(like)
    return views


def _placed(memory: mmap.mmap, first: StateCopy) -> StateCopy:
    """A copy of that form whose tensors lie in the memory."""
    views = _views(memory, {**first.tensors, "memory": first.memory})
    return StateCopy({kind: views.get(kind, {}) for kind in first.tensors}, views.get("memory", {}), None, first.rank)


def _described(copy: StateCopy) -> str:
    """Type and shape of each tensor, in the order of the memory, as JSON."""
    kinds = {**copy.tensors, "memory": copy.memory}
    return json.dumps({
        kind: {name: [str(value.dtype).removeprefix("torch."), list(value.shape)] for name, value in tensors.items()}
        for kind, tensors in kinds.items()
    })  # fmt: skip


def _loaded(one: Mapping[str, Any]) -> StateCopy:
    """The copy that a buffer holds."""
    data = bytearray(Path(one["path"]).read_bytes())
    kinds: dict[str, dict[str, torch.Tensor]] = {}
    at = 0
    for kind, tensors in one["tensors"].items():
        kinds[kind] = {}
        for name, (dtype, shape) in tensors.items():
            like = torch.empty(shape, dtype=getattr(torch, dtype), device="meta")
            count = math.prod(shape)
            flat = torch.frombuffer(data, dtype=like.dtype, count=count, offset=at) if count else torch.empty(0)
            kinds[kind][name] = flat.to(like.dtype).reshape(shape)
            at += _aligned(like)
    memory = kinds.pop("memory", {})
    return StateCopy(kinds, memory, one["layout"], one["rank"])


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
