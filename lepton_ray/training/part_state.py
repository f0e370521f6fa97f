"""The state of a scheduler, a scaler or anything else with `state_dict`, as plain JSON and back: no pickle.

Meant for small states: tensors are written as text. The large ones, the model's and the optimisers', have files.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from lepton_ray.errors import UsageError, shown

MAX_TENSOR_BYTES = 2**20
"""Largest tensor of such a state."""


def as_json(value: Any, path: str) -> Any:
    """A state as JSON.

    Args:
        value: what `state_dict()` gave.
        path: what it is called in a message.

    Raises UsageError naming the entry that is neither number, text, list, dictionary nor a small tensor.
    """
    match value:
        case torch.Tensor():
            return {"tensor": _text(value, path), "shape": list(value.shape), "dtype": str(value.dtype)[6:]}
        case Mapping():
            _check_keys(value, path)
            return {"entries": [[key, as_json(item, f"{path}.{key}")] for key, item in value.items()]}
        case tuple():
            return {"tuple": [as_json(item, f"{path}.{at}") for at, item in enumerate(value)]}
        case list():
            return [as_json(item, f"{path}.{at}") for at, item in enumerate(value)]
        case float() if not math.isfinite(value):
            return {"number": str(value)}
        case None | bool() | int() | float() | str():
            return value
    raise UsageError(
        f"checkpoint: {path} is {shown(type(value).__name__)}; expected tensors, numbers, text, lists, dictionaries; "
        "leave it out of state_dict, and make it anew after a restart"
    )


def from_json(plain: Any) -> Any:
    """The state that `as_json` wrote."""
    match plain:
        case {"tensor": text, "shape": shape, "dtype": dtype}:
            data = bytearray(base64.b64decode(text))
            kind = getattr(torch, dtype)
            flat = torch.frombuffer(data, dtype=kind) if data else torch.empty(0, dtype=kind)
            return flat.reshape(shape)
        case {"entries": entries}:
            return {key: from_json(item) for key, item in entries}
        case {"tuple": items}:
            return tuple(from_json(item) for item in items)
        case {"number": text}:
            return float(text)
        case list():
            return [from_json(item) for item in plain]
    return plain


class AllOptimizers:
    """Several optimisers as one, so that a checkpoint has one optimiser's file.

    Args:
        optimizers: over parameters of one model, none of them in two.
    """

    def __init__(self, optimizers: list[torch.optim.Optimizer]) -> None:
        self._optimizers = optimizers

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The groups of all."""
        return [group for optimizer in self._optimizers for group in optimizer.param_groups]

    @property
    def state(self) -> dict[Any, Any]:
        """The state of all, by parameter."""
        return {parameter: state for one in self._optimizers for parameter, state in one.state.items()}

    def state_dict(self) -> dict[str, Any]:
        """The groups, as `torch.optim.Optimizer.state_dict` has them."""
        return {"param_groups": [group for one in self._optimizers for group in one.state_dict()["param_groups"]]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Give each its part of the state, which goes by the number of the parameter over all."""
        first = 0
        for optimizer, last in zip(self._optimizers, self._ends(), strict=True):
            mine = {index - first: entry for index, entry in state["state"].items() if first <= index < last}
            optimizer.load_state_dict({"state": mine, "param_groups": optimizer.state_dict()["param_groups"]})
            first = last

    def hyperparameters(self) -> list[dict[str, Any]]:
        """What the groups hold beside parameters (a scheduler changes the learning rate), as JSON."""
        return [
            as_json({key: value for key, value in group.items() if key != "params"}, "optimizer")
            for group in self.param_groups
        ]

    def load_hyperparameters(self, plain: list[Any]) -> None:
        """Take back what `hyperparameters` gave."""
        for group, values in zip(self.param_groups, plain, strict=True):
            group.update(from_json(values))

    def _ends(self) -> Iterator[int]:
        count = 0
        for optimizer in self._optimizers:
            count += sum(len(group["params"]) for group in optimizer.param_groups)
            yield count


def _text(value: torch.Tensor, path: str) -> str:
    data = value.detach().cpu().contiguous()
    if data.numel() * data.element_size() > MAX_TENSOR_BYTES:
        raise UsageError(
            f"checkpoint: {path} has {data.numel() * data.element_size()} bytes; expected at most {MAX_TENSOR_BYTES} "
            "in a part that is neither model nor optimiser: register it as a buffer of the model"
        )
    return base64.b64encode(data.reshape(-1).view(torch.uint8).numpy().tobytes()).decode()


def _check_keys(value: Mapping[Any, Any], path: str) -> None:
    for key in value:
        if not isinstance(key, str | int) or isinstance(key, bool):
            raise UsageError(f"checkpoint: {path} has the key {shown(key)}; expected text or a whole number")
