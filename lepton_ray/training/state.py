"""Model, optimiser and average as safetensors bytes and back: no pickle, bit for bit, whole or in shards."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from safetensors.torch import save as save_tensors

from lepton_ray.errors import IntegrityError, shown
from lepton_ray.training.parallel import Parallel
from lepton_ray.training.shards import Pieces, Tensors, file_name, is_cut, like, local_part, rows_of

MEMORY = "memory"
STATE = "state.json"


class Average(Protocol):
    """A moving average of the weights, as a checkpoint sees it."""

    def state(self) -> Tensors:
        """The averages by the names of the model's `state_dict`, cut over the ranks as the model is."""

    def load(self, tensors: Tensors) -> None:
        """Take these in their place."""


@dataclass
class StateCopy:
    """Copies on the CPU of what one rank writes; training may go on while they are written."""

    tensors: dict[str, Tensors]
    """Kind (`model`, `optimizer`, `average`) -> name -> tensor, of this rank's rows. An optimiser's tensor is named
    `<parameter>.<part>`, e.g. `layer.weight.exp_avg`."""
    memory: Tensors
    """What this rank alone remembers (PowerSGD)."""
    layout: dict[str, dict[str, Any]] | None
    """Where the rows of each tensor are in the whole, by kind and name; None where the tensors are whole."""
    rank: int

    @property
    def is_empty(self) -> bool:
        """Whether another rank writes everything."""
        return not self.tensors and not self.memory

    def first_non_finite(self) -> str | None:
        """The name of a tensor that holds NaN or infinity, if there is one."""
        for tensors in (*self.tensors.values(), self.memory):
            for name, value in tensors.items():
                # one pass without another copy: NaN goes through to both ends
                if value.is_floating_point() and value.numel():
                    low, high = torch.aminmax(value)
                    if not (low.isfinite() and high.isfinite()):
                        return name
        return None


def copy_state(
    parallel: Parallel,
    optimizer: torch.optim.Optimizer,
    average: Average | None = None,
    *,
    into: StateCopy | None = None,
    everywhere: bool = False,
) -> StateCopy:
    """Copy what this rank writes of a checkpoint; every rank calls it, and none talks to another.

    Args:
        parallel: the model.
        optimizer: over the model's parameters.
        average: of the weights, if one is kept.
        into: a copy that is no longer needed: its memory is used again, which saves the time of getting new pages.
        everywhere: with `ddp`, copy the whole state on each rank and not on rank 0 only (e.g. for a copy per node).
    """
    copy = StateCopy({}, {}, {} if parallel.sharded else None, parallel.rank)
    spare = into if into is not None else StateCopy({}, {}, None, 0)
    if parallel.sharded or parallel.rank == 0 or everywhere:
        sources = {"model": parallel.module.state_dict(), "optimizer": dict(_moments(parallel, optimizer))}
        if average is not None:
            sources["average"] = _averages(parallel, average)
        for kind, tensors in sources.items():
            copy.tensors[kind] = _copied_kind(kind, tensors, copy, spare)
    copy.memory = {name: _copied(value, spare.memory.get(name)) for name, value in parallel.memory().items()}
    if parallel.device.type == "cuda":
        torch.cuda.synchronize(parallel.device)
    return copy


def _copied_kind(kind: str, tensors: Tensors, copy: StateCopy, spare: StateCopy) -> Tensors:
    made: Tensors = {}
    for name, value in tensors.items():
        local, (begin, end) = local_part(value), rows_of(value)
        if copy.layout is not None:
            if begin == end if is_cut(value) else copy.rank != 0:
                continue
            kept = str(value.dtype).removeprefix("torch.")
            place = {"shape": list(value.shape), "begin": begin, "rows": end - begin, "dtype": kept}
            copy.layout.setdefault(kind, {})[name] = place
        made[name] = _copied(local, spare.tensors.get(kind, {}).get(name))
    return made


def _copied(value: torch.Tensor, spare: torch.Tensor | None) -> torch.Tensor:
    if spare is None or spare.shape != value.shape or spare.dtype != value.dtype:
        spare = torch.empty(value.shape, dtype=value.dtype, pin_memory=value.is_cuda)
    return spare.copy_(value, non_blocking=True)


def _averages(parallel: Parallel, average: Average) -> Tensors:
    """The averages by every name of the model's `state_dict`: an average has a weight that is used twice once only."""
    averages = dict(average.state())
    first = {id(parameter): name for name, parameter in parallel.module.named_parameters()}
    for name, parameter in parallel.module.named_parameters(remove_duplicate=False):
        averages.setdefault(name, averages[first[id(parameter)]])
    return averages


def _moments(parallel: Parallel, optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, torch.Tensor]]:
    for name, parameter in _moved(parallel, optimizer):
        for part, value in optimizer.state.get(parameter, {}).items():
            if value is not None:
                yield f"{name}.{part}", torch.as_tensor(value)


def _moved(parallel: Parallel, optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """The optimiser's parameters with their names, in the optimiser's order."""
    names = {id(parameter): name for name, parameter in parallel.module.named_parameters()}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            yield names[id(parameter)], parameter


def pack(copy: StateCopy, state: Mapping[str, Any]) -> dict[str, bytes]:
    """The files that the copy's rank writes; `state` goes with rank 0's, and with every copy of the whole."""
    rank = None if copy.layout is None else copy.rank
    files = {file_name(kind, rank): save_tensors(tensors) for kind, tensors in copy.tensors.items()}
    if copy.memory:
        files[file_name(MEMORY, copy.rank)] = save_tensors(copy.memory)
    if copy.layout is not None:
        files[file_name("shards", copy.rank, "json")] = json.dumps(copy.layout).encode()
    if copy.rank == 0 or (copy.layout is None and copy.tensors):
        files[STATE] = json.dumps(state).encode()
    return files


def unpack(
    files: Mapping[str, bytes],
    parallel: Parallel,
    optimizer: torch.optim.Optimizer | None,
    average: Average | None = None,
) -> dict[str, Any]:
    """Restore model, optimiser and average in place; returns the state that was packed with them.

    The files may be whole or of any number of ranks, and may leave out what this rank holds nothing of. Without an
    optimiser only weights (and average) are taken. Raises IntegrityError, with nothing changed, where they do not fit.
    """
    weights = _fitting(Pieces.of(files, "model"), parallel.module.state_dict(), "weights")
    averages = None
    if average is not None:
        averages = _fitting(Pieces.of(files, "average"), _averages(parallel, average), "average of the weights")
    moments = {} if optimizer is None else _moments_of(Pieces.of(files, "optimizer"), parallel, optimizer)
    if optimizer is not None:
        name = file_name(MEMORY, parallel.rank)
        memory = Pieces.of({file_name(MEMORY): files[name]}, MEMORY) if name in files else Pieces()
        parallel.load_memory({name: memory.whole(name) for name in memory.shapes} or None)
        optimizer.load_state_dict({"state": moments, "param_groups": optimizer.state_dict()["param_groups"]})
    with torch.no_grad():
        for name, value in parallel.module.state_dict().items():
            local_part(value).copy_(weights[name])
    if average is not None and averages is not None:
        average.load({name: like(value, averages[name]) for name, value in average.state().items()})
    state: dict[str, Any] = json.loads(files[STATE])
    return state


def _fitting(pieces: Pieces, wanted: Tensors, what: str) -> Tensors:
    """This rank's rows of each wanted tensor; raises IntegrityError where names, shapes or types differ."""
    expected = {name: (tuple(value.shape), value.dtype) for name, value in wanted.items()}
    found = {name: (shape, pieces.dtypes[name]) for name, shape in pieces.shapes.items()}
    wrong = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
    if wrong:
        name = wrong[0]
        raise IntegrityError(
            f"{what}: tensor {shown(name)} is {found.get(name, 'missing')}, the model has {expected.get(name, 'none')} "
            f"({len(wrong)} differ); use the options that the run was started with"
        )
    return {name: pieces.rows(name, *rows_of(value)) for name, value in wanted.items()}


def _moments_of(
    pieces: Pieces, parallel: Parallel, optimizer: torch.optim.Optimizer
) -> dict[int, dict[str, torch.Tensor]]:
    """The optimiser's state by the index of the parameter; raises IntegrityError for one that it does not move."""
    moved = list(_moved(parallel, optimizer))
    parameters = dict(moved)
    states: dict[str, Tensors] = {}
    for name, shape in sorted(pieces.shapes.items()):  # safetensors gives them in any order; ranks must not differ
        owner, _, part = name.rpartition(".")
        if owner not in parameters:
            raise IntegrityError(
                f"optimizer: the checkpoint moves {shown(owner)}, this run does not; resume with the run's own settings"
            )
        parameter = parameters[owner].detach()
        if shape and shape == tuple(parameter.shape):
            value = like(parameter, pieces.rows(name, *rows_of(parameter)))
        else:
            value = pieces.whole(name)
        states.setdefault(owner, {})[part] = value
    return {index: states[name] for index, (name, _) in enumerate(moved) if name in states}


def whole_weights(files: Mapping[str, bytes], *, averaged: bool = True) -> bytes:
    """The model as one safetensors file, whatever wrote the checkpoint; with the moving average where one was kept.

    Raises IntegrityError where a part of a tensor is missing.
    """
    pieces = Pieces.of(files, "model")
    average = Pieces.of(files, "average") if averaged else Pieces()
    if not average.shapes and file_name("model") in files:
        return files[file_name("model")]
    return save_tensors({name: (average if name in average.shapes else pieces).whole(name) for name in pieces.shapes})
