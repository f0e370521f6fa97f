"""What learns, and when: frozen parameters, parameters that begin to learn later, low-rank adapters.

Patterns are those of `fnmatch` over the names of the task's own model, with adapters as without. Everything here is a
pure function of names and epoch, so that all ranks agree and a resumed run goes on as it was.
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

from lepton_ray.errors import UsageError, shown
from lepton_ray.settings.training import LoraSettings, TransferSettings
from lepton_ray.tasks import AnyTask

if TYPE_CHECKING:
    import torch

ADAPTER = "default"
"""What `peft` calls the one set of adapters, and puts into their names."""
_BASE = ".base_layer."
_DOWN, _UP = f".lora_A.{ADAPTER}.weight", f".lora_B.{ADAPTER}.weight"


def check_transfer(settings: TransferSettings, task: AnyTask, transforms: Mapping[str, Any]) -> None:
    """Check the patterns against the task's model, on the driver, without memory for the model.

    Raises UsageError for a pattern that fits nothing (with near names), for an adapter on a layer that is not linear,
    where nothing would learn, or where `peft` is needed and missing.
    """
    if settings == TransferSettings():
        return
    import torch

    with torch.device("meta"):
        model = task.build(transforms)
    check_patterns(model, settings)
    if settings.lora is not None:
        _peft()


def check_patterns(model: torch.nn.Module, settings: TransferSettings) -> None:
    """Raise UsageError for whatever does not fit the task's plain model; see `check_transfer`."""
    names = [name for name, _ in model.named_parameters()]
    for pattern in settings.freeze:
        _check_fits(pattern, names, "training.transfer.freeze")
    if settings.lora is not None:
        _check_targets(model, settings.lora)
        for pattern in settings.lora.train:
            _check_fits(pattern, names, "training.transfer.lora.train")
    start = [name for name in names if not learns_at(name, 0, settings)]
    for unfreeze in settings.unfreeze:
        for pattern in unfreeze.patterns:
            _check_fits(pattern, names, "training.transfer.unfreeze")
            if not any(fnmatchcase(name, pattern) for name in start):
                raise UsageError(
                    f"training.transfer.unfreeze has {shown(pattern)}: what it fits is not frozen; freeze it first"
                )
    if len(start) == len(names) and settings.lora is None:
        raise UsageError("training.transfer: nothing learns in epoch 0; leave the head out of freeze")


def _check_targets(model: torch.nn.Module, settings: LoraSettings) -> None:
    import torch

    key, modules = "training.transfer.lora.targets", dict(model.named_modules())
    linear = [name for name, module in modules.items() if isinstance(module, torch.nn.Linear)]
    for target in settings.targets:
        found = [name for name in modules if name == target or name.endswith("." + target)]
        if not found:
            raise UsageError(f"{key} has {shown(target)}: no layer's name ends so; {_near(target, linear)}")
        other = next((name for name in found if name not in linear), None)
        if other is not None:
            kind = type(modules[other]).__name__
            raise UsageError(f"{key} has {shown(target)}: {other} is {kind}, not linear; {_near(target, linear)}")


def learns_at(name: str, epoch: int, settings: TransferSettings) -> bool:
    """Whether a parameter of the task's model, or an adapter's, learns in an epoch (the first is 0)."""
    if is_adapter(name):
        return True
    name = plain_name(name)
    frozen = _any_fits(name, settings.freeze)
    if settings.lora is not None:
        frozen = frozen or not _any_fits(name, settings.lora.train)
    return not frozen or any(step.epoch <= epoch and _any_fits(name, step.patterns) for step in settings.unfreeze)


class Transfer:
    """Puts the settings into effect on a rank's model: adapters, and which parameters learn in epoch 0.

    Made after the weights are initialised, before optimiser, checkpoint and the wrapping for several ranks; adapters
    take their random start from torch's generator, so seed it alike on all ranks.
    """

    def __init__(self, model: torch.nn.Module, settings: TransferSettings) -> None:
        """`model` is changed in place. Raises UsageError as `check_transfer`."""
        check_patterns(model, settings)
        self.model, self.settings = model, settings
        # what the task itself has switched off stays so; peft switches off all that is no adapter
        self._off = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
        if settings.lora is not None:
            _add_adapters(model, settings.lora)
        self.at_epoch(0)

    def learns(self, name: str) -> bool:
        """Whether a parameter (named as in `model.named_parameters()`) learns in any epoch: the optimiser has it."""
        last = max((step.epoch for step in self.settings.unfreeze), default=0)
        return self._learns(name, last)

    def at_epoch(self, epoch: int) -> bool:
        """Let those parameters learn that the epoch wants; True where that is another set than before."""
        changed = False
        for name, parameter in self.model.named_parameters():
            wanted = self._learns(name, epoch)
            if parameter.requires_grad != wanted:
                parameter.requires_grad_(wanted)
                parameter.grad = None
                changed = True
        return changed

    def _learns(self, name: str, epoch: int) -> bool:
        return plain_name(name) not in self._off and learns_at(name, epoch, self.settings)


def is_adapter(name: str) -> bool:
    """Whether a tensor belongs to a low-rank adapter."""
    return ".lora_A." in name or ".lora_B." in name


def has_adapters(names: Iterable[str]) -> bool:
    """Whether any of the tensors belongs to a low-rank adapter."""
    return any(is_adapter(name) for name in names)


def plain_name(name: str) -> str:
    """The name that a tensor has in the task's model, without adapters."""
    return name.replace(_BASE, ".")


def merged_weights(weights: Mapping[str, torch.Tensor], settings: TransferSettings) -> dict[str, torch.Tensor]:
    """A `state_dict` with adapters as one of the plain task model: W + alpha / rank x B A (Hu et al. 2021).

    Without adapters it is given back as it is. The sum is taken in fp32 whatever the weights are kept in.
    """
    if settings.lora is None:
        return dict(weights)
    scale = settings.lora.alpha / settings.lora.rank
    made: dict[str, torch.Tensor] = {}
    for name, value in weights.items():
        if is_adapter(name):
            continue
        layer = name.removesuffix(f"{_BASE}weight")
        if layer != name and layer + _DOWN in weights:
            change = weights[layer + _UP].float() @ weights[layer + _DOWN].float()
            value = (value.float() + scale * change).to(value.dtype)  # noqa: PLW2901 - the same tensor, merged
        made[plain_name(name)] = value
    return made


def publishable(weights: bytes, settings: TransferSettings) -> bytes:
    """The safetensors bytes of a run's model as those of the plain task model; see `merged_weights`."""
    if settings.lora is None:
        return weights
    from safetensors.torch import load, save

    return save({name: value.contiguous() for name, value in merged_weights(load(weights), settings).items()})


def _add_adapters(model: torch.nn.Module, settings: LoraSettings) -> None:
    peft = _peft()
    config = peft.LoraConfig(
        r=settings.rank, lora_alpha=settings.alpha, lora_dropout=settings.dropout, bias="none",
        target_modules=list(settings.targets),
    )  # fmt: skip
    peft.inject_adapter_in_model(config, model, adapter_name=ADAPTER)


def _peft() -> Any:
    try:
        return importlib.import_module("peft")  # not by `import`: a type checker would read all of it and its like
    except ImportError as error:
        raise UsageError("training.transfer.lora: needs package peft; pip install 'lepton-ray[lora]'") from error


def _any_fits(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _check_fits(pattern: str, names: list[str], key: str) -> None:
    if not any(fnmatchcase(name, pattern) for name in names):
        raise UsageError(f"{key} has {shown(pattern)}: fits no parameter; {_near(pattern, names)}")


def _near(text: str, names: list[str]) -> str:
    near = difflib.get_close_matches(text, names, n=3, cutoff=0.4) or names[:3]
    return f"the model has {', '.join(near)} and others"
