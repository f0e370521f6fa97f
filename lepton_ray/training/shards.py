"""Tensors cut over ranks along their first dimension, and put together again for any number of ranks.

A sharded checkpoint has from each rank `model-rank<r>.safetensors` (and `optimizer-`, `average-`) with that rank's rows
of every tensor, and `shards-rank<r>.json`, which says of each of them the shape of the whole, where the rows begin, how
many there are and their type, so that a reader knows every tensor before it has read one. What all ranks hold alike
(buffers, step counts) is written by rank 0, whole. A whole file is one piece.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors

from lepton_ray.errors import IntegrityError, shown

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

Tensors = dict[str, torch.Tensor]
KINDS = ("model", "optimizer", "average")


def file_name(kind: str, rank: int | None = None, ending: str = "safetensors") -> str:
    """The file of a kind: whole, or of one rank."""
    return f"{kind}.{ending}" if rank is None else f"{kind}-rank{rank:05d}.{ending}"


def is_cut(tensor: torch.Tensor) -> TypeGuard[DTensor]:
    """Whether a tensor is cut over the ranks. Without torch's module for that (slow to import) none can be."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def rows_of(tensor: torch.Tensor) -> tuple[int, int]:
    """First row and end (exclusive) of what this rank holds of a tensor; (0, rows) of a tensor that is not cut.

    FSDP2 cuts as `torch.chunk` does: equal parts, rounded up, the last ones shorter or empty.
    """
    rows = tensor.shape[0] if tensor.ndim else 1
    if not is_cut(tensor):
        return 0, rows
    mesh, placements = tensor.device_mesh, tensor.placements
    if mesh.ndim != 1 or not placements[0].is_shard(0):
        raise NotImplementedError(f"a tensor placed as {placements} on a mesh of {mesh.ndim} dimensions")
    return chunk(rows, mesh.get_local_rank(), mesh.size())


def chunk(rows: int, rank: int, world_size: int) -> tuple[int, int]:
    """First row and end (exclusive) of a rank's part of `rows`."""
    part = -(-rows // world_size)
    return min(rows, part * rank), min(rows, part * (rank + 1))


def local_part(tensor: torch.Tensor) -> torch.Tensor:
    """What this rank holds of a tensor, sharing its memory."""
    part = tensor.detach()
    return part.to_local() if is_cut(part) else part


def like(template: torch.Tensor, local: torch.Tensor) -> torch.Tensor:
    """This rank's rows as a tensor that is cut as `template` is; `local` itself where that one is not cut."""
    if not is_cut(template):
        return local
    return type(template).from_local(
        local.to(template.to_local().device),
        template.device_mesh,
        template.placements,
        run_check=False,
        shape=template.shape,
        stride=template.stride(),
    )


class Pieces:
    """The tensors of one kind in the files of a checkpoint, whole or in parts."""

    def __init__(self) -> None:
        self.shapes: dict[str, tuple[int, ...]] = {}
        """Whole shape by name."""
        self.dtypes: dict[str, torch.dtype] = {}
        self._parts: dict[str, list[tuple[int, torch.Tensor]]] = {}

    @classmethod
    def of(cls, files: Mapping[str, bytes], kind: str) -> Pieces:
        """What `files` hold of a kind. Raises IntegrityError for what is not as it says."""
        made = cls()
        if file_name(kind) in files:
            for name, value in _tensors(files, file_name(kind)).items():
                made.add(name, value, tuple(value.shape), 0)
            return made
        for rank in shard_ranks(files):
            layout = layout_of(files, rank).get(kind, {})
            for name, entry in layout.items():
                made._declare(name, tuple(entry["shape"]), getattr(torch, entry["dtype"]))
            if file_name(kind, rank) not in files:
                continue  # rows that this rank has no need of
            for name, value in _tensors(files, file_name(kind, rank)).items():
                if name not in layout:
                    raise IntegrityError(f"{file_name(kind, rank)}: tensor {shown(name)} is not in its layout")
                made.add(name, value, tuple(layout[name]["shape"]), layout[name]["begin"])
        return made

    def add(self, name: str, value: torch.Tensor, shape: tuple[int, ...], begin: int) -> None:
        """Note rows of a tensor. Raises IntegrityError where they do not fit what is known of it."""
        self._declare(name, shape, value.dtype)
        rows = value.shape[0] if value.ndim else 1
        fits = tuple(value.shape[1:]) == shape[1:] and value.ndim == len(shape)
        if not fits or not 0 <= begin <= begin + rows <= (shape[0] if shape else 1):
            raise IntegrityError(f"tensor {shown(name)}: {tuple(value.shape)} from {begin} on is no part of {shape}")
        self._parts.setdefault(name, []).append((begin, value))

    def _declare(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        known = (self.shapes.setdefault(name, shape), self.dtypes.setdefault(name, dtype))
        if known != (shape, dtype):
            raise IntegrityError(f"tensor {shown(name)} is {known} for one rank and {(shape, dtype)} for another")

    def rows(self, name: str, begin: int, end: int) -> torch.Tensor:
        """Rows `begin` to `end` of a tensor. Raises IntegrityError where some are missing."""
        shape = self.shapes[name]
        found = []
        at = begin
        for start, part in sorted(self._parts.get(name, []), key=lambda entry: entry[0]):
            stop = start + (part.shape[0] if part.ndim else 1)
            if start <= at < min(stop, end):
                if (start, stop) == (begin, end):
                    return part
                found.append(part[at - start : min(stop, end) - start])
                at = min(stop, end)
        if at != end:
            raise IntegrityError(f"tensor {shown(name)}: rows {at} to {end} of {shape[0]} are in no file")
        return torch.cat(found) if found else torch.empty((0, *shape[1:]), dtype=self.dtypes[name])

    def whole(self, name: str) -> torch.Tensor:
        """All rows of a tensor. Raises IntegrityError where some are missing."""
        return self.rows(name, 0, self.shapes[name][0] if self.shapes[name] else 1)


def _tensors(files: Mapping[str, bytes], name: str) -> Tensors:
    try:
        return load_tensors(files[name])
    except (SafetensorError, ValueError) as error:
        raise IntegrityError(
            f"{name}: not safetensors ({shown(str(error))}); resume from another checkpoint"
        ) from error


def shard_ranks(names: Iterable[str]) -> list[int]:
    """The ranks that wrote shards, by their layouts' names; empty for a checkpoint of whole files."""
    start = "shards-rank"
    return sorted(int(name[len(start) : -len(".json")]) for name in names if name.startswith(start))


def layout_of(files: Mapping[str, bytes], rank: int) -> dict[str, Any]:
    """Kind -> tensor -> `shape`, `begin`, `rows`, `dtype`, as `shards-rank<r>.json` says."""
    name = file_name("shards", rank, "json")
    try:
        layout = json.loads(files[name])
        for kind in KINDS:
            for entry in layout.get(kind, {}).values():
                entry["shape"] = [int(size) for size in entry["shape"]]
                entry["begin"], entry["rows"] = int(entry["begin"]), int(entry["rows"])
                if not isinstance(getattr(torch, entry["dtype"]), torch.dtype):
                    raise ValueError(f"dtype {entry['dtype']}")  # noqa: TRY301, TRY004 - one sentence for all faults
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise IntegrityError(f"{name} is damaged ({shown(str(error))}); resume from another checkpoint") from error
    return dict(layout)


def files_for(layouts: Mapping[str, bytes], rank: int, world_size: int) -> list[str]:
    """The shard files that hold rows which one of `world_size` ranks needs, given all layouts."""
    wanted = []
    for writer in shard_ranks(layouts):
        for kind, entries in layout_of(layouts, writer).items():
            if kind in KINDS and any(_meets(entry, rank, world_size) for entry in entries.values()):
                wanted.append(file_name(kind, writer))
    return wanted


def _meets(entry: Mapping[str, Any], rank: int, world_size: int) -> bool:
    total = entry["shape"][0] if entry["shape"] else 1
    if entry["rows"] == total:
        return True  # may be one that every rank holds whole
    begin, end = chunk(total, rank, world_size)
    return bool(begin < entry["begin"] + entry["rows"] and entry["begin"] < end)
