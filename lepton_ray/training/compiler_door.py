"""Keeps torch's compiler out of ranks that do not compile.

The first optimiser and the first DDP model of a process import `torch._dynamo` and with it torch's compiler: 2 s of CPU
and 140 MB in each rank (torch 2.13), only to mark functions that the compiler, were it there, should leave alone. Here
they find those marks made. Whoever does use the compiler (`import torch._dynamo`, `torch.compile`) gets it as always,
and from then on torch's own functions are called again.
"""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel

MARKED = (
    (torch.optim.Optimizer, ("add_param_group", "zero_grad", "state_dict", "load_state_dict")),
    (DistributedDataParallel, ("_inside_ddp_forward",)),
)
"""Methods that import the compiler at their first call."""
STEPPING = (torch.optim.SGD, torch.optim.Adam, torch.optim.Adagrad, torch.optim.RMSprop)
"""Optimisers whose `step` imports the compiler at every call; AdamW has Adam's."""
_MARK = "__dynamo_disable"
"""Where torch (`torch._compile._disable_dynamo`) looks for what to call in the place of a function."""


def keep_compiler_out() -> bool:
    """Spare this process the import of the compiler until somebody uses it; False where it is there already.

    Call it before the first optimiser is made; a second call changes nothing.
    """
    if _loaded():
        return False
    if isinstance(torch.__dict__.get("_dynamo"), _NotYet):
        return True
    for owner, names in MARKED:
        for name in names:
            _mark(getattr(owner, name))
    for kind in STEPPING:
        kind.step = _step(kind.step)  # type: ignore[method-assign]
    # what DistributedDataParallel asks of the compiler; importing the real module puts that in the place of this one
    utils = _NotYet("torch._dynamo.utils", get_optimize_ddp_mode=_ddp_mode)
    torch.__dict__["_dynamo"] = _NotYet("torch._dynamo", utils=utils)
    return True


def _loaded() -> bool:
    return "torch._dynamo" in sys.modules


def _mark(function: Any) -> None:
    """Under torch's wrappers lies the function itself; what to call in its place is the same."""
    while (inner := getattr(function, "__wrapped__", None)) is not None:
        function = inner
    setattr(function, _MARK, function)


def _step(original: Callable[..., Any]) -> Callable[..., Any]:
    """An optimiser's `step` as torch wraps it, but for the graph breaks, which mean something to the compiler alone."""
    bare: Callable[..., Any] = original.__wrapped__  # type: ignore[attr-defined]

    @functools.wraps(original)
    def step(self: torch.optim.Optimizer, *arguments: Any, **named: Any) -> Any:
        if _loaded():
            return original(self, *arguments, **named)
        with torch.set_grad_enabled(self.defaults["differentiable"]):
            return bare(self, *arguments, **named)

    return step


def _ddp_mode() -> str:
    """The compiler's default (`torch._dynamo.config.optimize_ddp`)."""
    return "ddp_optimizer"


class _NotYet:
    """Stands for a module that is imported when something else than what is known here is asked of it."""

    def __init__(self, module: str, **known: Any) -> None:
        self.__dict__.update(known, _module=module)

    def __getattr__(self, name: str) -> Any:
        return getattr(importlib.import_module(self._module), name)
