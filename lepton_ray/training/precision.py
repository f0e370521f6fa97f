"""Number formats of the computation, compiling, and bits that repeat."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel

from lepton_ray.errors import escaped
from lepton_ray.settings.training import PrecisionSettings

_log = logging.getLogger(__name__)


class Precision:
    """What `training.precision` asks for, on one device. Weights, gradients and optimiser state stay fp32.

    Args:
        settings: the precision branch of the tree.
        device: where the model is.
    """

    def __init__(self, settings: PrecisionSettings, device: torch.device) -> None:
        self._settings, self._device = settings, device
        self.scaler: torch.amp.GradScaler | None = None
        """Scales the loss of fp16, so that small gradients do not vanish; None with other formats."""
        if settings.compute == "fp16":
            self.scaler = torch.amp.GradScaler(device.type)

    def autocast(self) -> AbstractContextManager[Any]:
        """Around forward and loss, in training and evaluation; not around backward."""
        if self._settings.compute == "fp32":
            return nullcontext()
        dtype = torch.bfloat16 if self._settings.compute == "bf16" else torch.float16
        return torch.autocast(self._device.type, dtype=dtype)

    def searching(self) -> bool:
        """Whether gradients that are not finite may only mean that the fp16 scaler still looks for its scale.

        It begins at 65,536 and halves with each such step, which is its way to work and no fault of the run; at 1 it is
        a fault. Reads the scale from the device, so ask only after such a step, and before `scaler.update()`.
        """
        return self.scaler is not None and self.scaler.get_scale() > 1.0

    def compiled(self, model: torch.nn.Module) -> torch.nn.Module:
        """The same module, its forward compiled on the first call where `compile` asks for it.

        Parameters and their names in `state_dict` are untouched. Where compiling fails, one warning is logged and the
        model runs as it is. Of DDP's wrapper the module inside is compiled, as the wrapper's own forward cannot be.
        """
        if self._settings.compile:
            bare = model.module if isinstance(model, DistributedDataParallel) else model
            bare._compiled_call_impl = _CompiledCall(bare)  # noqa: SLF001 - what nn.Module.compile sets
        return model

    def apply_switches(self) -> None:
        """Set what is global to the process.

        `tf32: true` lets a GPU multiply fp32 matrices and convolve in TF32; false leaves torch's defaults, which are
        full fp32 for matrices and TF32 for convolutions.
        """
        if self._settings.tf32:
            torch.backends.cuda.matmul.allow_tf32 = True
            torch.backends.cudnn.allow_tf32 = True

    def to_json(self) -> dict[str, Any]:
        """The scaler's state for a checkpoint; empty without one."""
        return {} if self.scaler is None else dict(self.scaler.state_dict())

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from what `to_json` gave; a state that is empty, from a run without a scaler, changes nothing."""
        if self.scaler is not None and state:
            self.scaler.load_state_dict(state)


class _CompiledCall:
    """Stands where a module keeps its compiled call, and gives way to the plain one when that fails.

    A first call may fail for any reason, mostly a missing compiler; if the model itself is wrong, the plain call says
    so. Later only the compiler's own errors (a new shape, another mode) count, so that others are not tried twice.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        def plain(*arguments: Any, **named: Any) -> Any:
            # a frame outside torch: the compiler passes over those of torch.nn, so over a whole Sequential
            return model._call_impl(*arguments, **named)  # noqa: SLF001 - what nn.Module.compile compiles

        self._model = model
        self._call: Callable[..., Any] = torch.compile(plain)
        self._worked = False

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        if "forward" in self._model.__dict__:  # lent another forward for a moment (to lay out DDP's buckets)
            return self._model._call_impl(*arguments, **named)  # noqa: SLF001 - as above
        try:
            result = self._call(*arguments, **named)
        except Exception as error:
            from torch._dynamo.exc import TorchDynamoException  # slow to load, and loaded by now

            if self._worked and not isinstance(error, TorchDynamoException):
                raise
            self._model._compiled_call_impl = None  # noqa: SLF001 - as above
            _log.warning(
                "training.precision.compile: compiling failed, the model runs as it is: %s: %s",
                type(error).__name__,
                escaped(str(error)),
            )
            return self._model(*arguments, **named)
        self._worked = True
        return result


def make_deterministic() -> None:
    """Let torch use deterministic algorithms only, or raise where it has none.

    To be called before the first use of a GPU: cuBLAS reads its workspace's size from the environment then.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False
