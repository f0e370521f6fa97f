"""Rows to the device: decoded once per node into files that all its ranks map into memory.

A rank that decodes for itself costs its decoding time and a whole copy of the rows in each process. Here the first
rank of a node that comes decodes, in parts of bounded size, and the others wait for it; the operating system keeps one
copy of the pages for all of them, and gives memory back under pressure, since the pages are those of a file. A worker
group that replaces a failed one finds the files and decodes nothing.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch

from lepton_ray.errors import LeptonError
from lepton_ray.tasks import AnyTask

PART_BYTES = 16 * 2**20
"""Decoded bytes of one part: bounds what decoding takes beside the file."""
FIRST_PART_ROWS = 64
"""Rows of the first part, from which the bytes of a row are known."""
STALL_S = 120.0
"""Seconds without a decoded part after which a waiting rank gives up."""
POLL_S = 0.01
"""Seconds between two looks of a waiting rank; it waits only while another one decodes."""
ABANDONED_S = 900.0
"""Age at which a folder that nobody uses is removed: the longest a worker group is expected to be away."""
_IN_USE = ".feed-in-use"


class Feed:
    """Inputs and targets of some rows, of which any batch is taken by row number.

    Args:
        task: decodes rows (`inputs`, `targets`); what it makes of a row must not depend on the rows beside it.
        rows: the rows; not kept.
        transforms: the fitted transforms.
        device: where batches go.
        scratch: a folder of this node, made where it is missing: the same for all ranks of the node and for all worker
            groups of the attempt, and of nobody else. Feeds' folders beside it that nobody uses any more are removed.
        name: tells several feeds in one folder apart (`train`, `held_out`).
        stall_s: seconds without progress of the rank that decodes after which the others give up.

    Raises LeptonError where the folder cannot hold the decoded rows, or where the decoding rank stands still.
    """

    inputs: torch.Tensor
    """All inputs, first dimension the rows, mapped from the file (CPU); read only."""
    targets: torch.Tensor
    """All targets, likewise."""

    def __init__(
        self,
        task: AnyTask,
        rows: pa.Table,
        transforms: Mapping[str, Any],
        device: torch.device,
        scratch: Path,
        *,
        name: str = "train",
        stall_s: float = STALL_S,
    ) -> None:
        self.device = device
        self._folder = scratch
        self._in_use = _use(scratch)
        decoders: dict[str, Callable[[pa.Table], torch.Tensor]] = {
            "inputs": lambda part: task.inputs(part, transforms),
            "targets": lambda part: task.targets(part, transforms),
        }
        try:
            index = _decoded(scratch, name, rows, decoders, stall_s)
            self.inputs, self.targets = (_map(scratch / f"{name}.{kind}", **index[kind]) for kind in decoders)
        except BaseException:
            self.close()
            raise

    def __len__(self) -> int:
        return len(self.inputs)

    def take(self, ids: npt.NDArray[np.int64]) -> tuple[torch.Tensor, torch.Tensor]:
        """Inputs and targets of the rows `ids` (shape `[n]`, each in 0 to rows - 1), on the device, in that order.

        On a GPU the copy goes through pinned memory and is not waited for: what the current stream does next sees it.
        """
        chosen = torch.from_numpy(ids)
        return self._pick(self.inputs, chosen), self._pick(self.targets, chosen)

    def _pick(self, whole: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        if self.device.type == "cpu":
            return whole.index_select(0, ids)
        # torch keeps a pinned block from being used again until the copies out of it are done
        pinned = torch.empty((len(ids), *whole.shape[1:]), dtype=whole.dtype, pin_memory=True)
        return torch.index_select(whole, 0, ids, out=pinned).to(self.device, non_blocking=True)

    def close(self, *, finished: bool = False) -> None:
        """Let go of the files; with `finished` the last rank of the node that does so removes them.

        Tensors that were taken stay valid, and so do `inputs` and `targets` for who still holds them.
        """
        if self._in_use < 0:
            return
        os.close(self._in_use)
        self._in_use = -1
        if finished:
            _remove_unused(self._folder)


def _use(folder: Path) -> int:
    """Make the folder and mark it as used for as long as the returned file descriptor is open."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    for beside in folder.parent.iterdir():
        with contextlib.suppress(OSError):  # gone meanwhile, or another user's
            if beside != folder and time.time() - (beside / _IN_USE).stat().st_mtime > ABANDONED_S:
                _remove_unused(beside)
    while True:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        try:
            descriptor = os.open(folder / _IN_USE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except FileNotFoundError:  # removed between the two calls
            continue
        fcntl.flock(descriptor, fcntl.LOCK_SH)  # who holds it otherwise removes the folder, and is soon done
        if _is_at(descriptor, folder / _IN_USE):
            os.utime(folder / _IN_USE)
            return descriptor
        os.close(descriptor)


def _remove_unused(folder: Path) -> None:
    """Remove the folder unless a process uses it."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder / _IN_USE, os.O_RDWR | os.O_CLOEXEC)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_at(descriptor, folder / _IN_USE):
                gone = folder.with_name(f".{folder.name}-{os.getpid()}-gone")
                folder.rename(gone)  # at once, so that who comes now makes a new one
                shutil.rmtree(gone)
        finally:
            os.close(descriptor)


def _is_at(descriptor: int, path: Path) -> bool:
    """Whether the open file is the one that has this name now."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[bool]:
    """The lock of a decoding rank; False where another one has it. The system frees it when a process dies."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield True
    except BlockingIOError:
        yield False
    finally:
        os.close(descriptor)


Index = dict[str, dict[str, Any]]


def _decoded(
    folder: Path, name: str, rows: pa.Table, decoders: dict[str, Callable[[pa.Table], torch.Tensor]], stall_s: float
) -> Index:
    """What the files hold, once they are complete; decodes where no other rank of the node does."""
    committed, lock = folder / f"{name}.json", folder / f"{name}.lock"
    seen, since = -1.0, time.monotonic()
    while True:
        if committed.exists():
            index: Index = json.loads(committed.read_bytes())
            return index
        with _lock(lock) as mine:
            if mine and not committed.exists():
                index = _decode(folder, name, rows, decoders, lambda: os.utime(lock))
                fresh = folder / f"{name}.json.new"
                fresh.write_text(json.dumps(index), encoding="utf-8")
                fresh.replace(committed)
                return index
        progress = lock.stat().st_mtime_ns
        if progress != seen:
            seen, since = progress, time.monotonic()
        elif time.monotonic() - since > stall_s:
            raise LeptonError(
                f"feed {name}: the rank of this node that decodes the rows made no progress in {stall_s:g} s; see its "
                "log, and whether the node swaps"
            )
        time.sleep(POLL_S)


def _decode(
    folder: Path,
    name: str,
    rows: pa.Table,
    decoders: dict[str, Callable[[pa.Table], torch.Tensor]],
    progressed: Callable[[], None],
) -> Index:
    """Decode all rows part by part into one file for each kind; returns their types and shapes."""
    files: dict[str, int] = {}
    index: Index = {}
    try:
        at, size = 0, FIRST_PART_ROWS
        while at < rows.num_rows or not index:
            part = rows.slice(at, size)
            bytes_per_row = 1
            for kind, decode in decoders.items():
                values = decode(part).contiguous()
                shape, dtype = [rows.num_rows, *values.shape[1:]], str(values.dtype).removeprefix("torch.")
                if kind not in index:
                    index[kind] = {"dtype": dtype, "shape": shape}
                    files[kind] = _reserve(folder / f"{name}.{kind}", math.prod(shape) * values.element_size())
                if index[kind] != {"dtype": dtype, "shape": shape} or len(values) != part.num_rows:
                    raise LeptonError(
                        f"feed {name}: rows {at} to {at + part.num_rows - 1} give {kind} {dtype} {list(values.shape)}, "
                        f"those before gave {index[kind]}; a task must decode each row to the same shape and type"
                    )
                row_bytes = math.prod(shape[1:]) * values.element_size()
                if values.numel():
                    _write(files[kind], values, at * row_bytes)
                bytes_per_row = max(bytes_per_row, row_bytes)
            at, size = at + part.num_rows, max(1, PART_BYTES // bytes_per_row)
            progressed()
    finally:
        for descriptor in files.values():
            os.close(descriptor)
    return index


def _reserve(path: Path, size: int) -> int:
    """A new file of that size, its blocks taken now: a full disk would kill a process that writes to a mapping."""
    path.unlink(missing_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        if size:
            os.posix_fallocate(descriptor, 0, size)
    except OSError as error:
        os.close(descriptor)
        path.unlink()
        raise LeptonError(
            f"feed: {path.parent} cannot hold the decoded rows ({size / 2**20:.0f} MiB): {error.strerror}; free space "
            "there, or start Ray with a larger --temp-dir"
        ) from error
    return descriptor


def _write(descriptor: int, values: torch.Tensor, offset: int) -> None:
    data = memoryview(values.reshape(-1).view(torch.uint8).numpy().data)
    while data:
        written = os.pwrite(descriptor, data, offset)
        data, offset = data[written:], offset + written


def _map(path: Path, dtype: str, shape: list[int]) -> torch.Tensor:
    """The file as a tensor; pages are read when they are touched and shared with the other ranks."""
    kind: torch.dtype = getattr(torch, dtype)
    size = math.prod(shape)
    if size == 0:
        return torch.empty(shape, dtype=kind)
    return torch.from_file(str(path), shared=False, size=size, dtype=kind).reshape(shape)
