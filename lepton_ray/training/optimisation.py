"""How the weights move: the optimiser over a model's parameters, penalties, clipping and the moving average.

Everything here works on plain tensors and on the sharded tensors of FSDP2 (`DTensor`). What is done element by element
is done on a rank's own part, without a word to the others; only the norm of the gradients is summed over ranks.
"""

from __future__ import annotations

import difflib
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any, TypeGuard

import torch

from lepton_ray.errors import IntegrityError, UsageError, shown
from lepton_ray.settings import OptimizerSettings
from lepton_ray.training.transfer import is_adapter, plain_name

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

Learns = Callable[[str], bool]
_PLAIN = (torch.Tensor, torch.nn.Parameter)


def make_optimizer(
    model: torch.nn.Module, settings: OptimizerSettings, learns: Learns | None = None
) -> torch.optim.Optimizer:
    """The optimiser over a model's parameters, grouped by learning rate factor and decay.

    Parameters of one dimension (norms, biases) get no decay unless `decay_norm_and_bias` says so. Each parameter group
    has the key `factor`: the loop sets `group["lr"] = rate * group["factor"]`. Fused kernels, where torch has them,
    update all parameters in one call; they are about twice as fast on the CPU too.

    Args:
        model: the bare module, on its device; under FSDP2 after `fully_shard`.
        settings: the optimiser's branch of the tree.
        learns: whether the parameter of a name may ever learn; None takes those with `requires_grad`. One that may
            learn only later gets no gradient until then and stays as it is.

    Raises:
        UsageError: a group's pattern matches no parameter, or nothing is left to learn.
    """
    check_groups(model, settings)
    groups: dict[tuple[float, float], list[torch.nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad if learns is None else learns(name):
            groups.setdefault(_kind(_task_name(name), parameter, settings), []).append(parameter)
    if not groups:
        raise UsageError("training.transfer leaves no parameter to learn; freeze fewer")
    rate = settings.learning_rate
    made = [
        {"params": members, "lr": rate * factor, "factor": factor, "weight_decay": decay}
        for (factor, decay), members in groups.items()
    ]
    sharded = any(_is_sharded(parameter) for members in groups.values() for parameter in members)
    return _build(made, settings, sharded=sharded)


def _build(groups: list[dict[str, Any]], settings: OptimizerSettings, *, sharded: bool) -> torch.optim.Optimizer:
    rate, betas = settings.learning_rate, (settings.betas[0], settings.betas[1])
    match settings.name:
        case "sgd":  # FSDP2's tensors know neither fused SGD nor fused Adagrad
            momentum, nesterov = settings.momentum, settings.nesterov
            return torch.optim.SGD(
                groups, lr=rate, momentum=momentum, nesterov=nesterov, fused=not sharded, foreach=sharded
            )
        case "adam":
            return torch.optim.Adam(groups, lr=rate, betas=betas, eps=settings.epsilon, fused=True)
        case "adamw":
            return torch.optim.AdamW(groups, lr=rate, betas=betas, eps=settings.epsilon, fused=True)
        case "adagrad":
            return torch.optim.Adagrad(groups, lr=rate, eps=settings.epsilon, fused=not sharded, foreach=sharded)
        case "rmsprop":  # torch has no fused one
            return torch.optim.RMSprop(
                groups, lr=rate, alpha=settings.alpha, eps=settings.epsilon, momentum=settings.momentum, foreach=True
            )


def check_groups(model: torch.nn.Module, settings: OptimizerSettings) -> None:
    """Refuse patterns of `optimizer.groups` that would do nothing: without a parameter, or decay without any effect.

    Without side effects, so that the driver can ask it of a model on the meta device before a worker starts.

    Raises:
        UsageError: with the names that come near.
    """
    shapes = {_task_name(name): parameter.ndim for name, parameter in model.named_parameters()}
    for index, group in enumerate(settings.groups):
        key = f"training.optimizer.groups[{index}]"
        matched = [name for name in shapes if fnmatchcase(name, group.pattern)]
        if not matched:
            near = difflib.get_close_matches(group.pattern, shapes, n=3, cutoff=0.3) or list(shapes)[:3]
            raise UsageError(
                f"{key}.pattern is {shown(group.pattern)}: no parameter has such a name; near: {', '.join(near)}"
            )
        if group.weight_decay and not settings.decay_norm_and_bias and all(shapes[name] < 2 for name in matched):
            raise UsageError(
                f"{key}.weight_decay is {group.weight_decay}: all {len(matched)} parameters of pattern "
                f"{shown(group.pattern)} have one dimension and do not decay; set optimizer.decay_norm_and_bias to true"
            )


def _task_name(name: str) -> str:
    """The name in the task's own model, by which patterns go; an adapter goes with the weight that it adapts."""
    return f"{name.rpartition('.lora_')[0]}.weight" if is_adapter(name) else plain_name(name)


def _kind(name: str, parameter: torch.Tensor, settings: OptimizerSettings) -> tuple[float, float]:
    """Learning rate factor and decay of one parameter."""
    group = next((group for group in settings.groups if fnmatchcase(name, group.pattern)), None)
    factor = 1.0 if group is None else group.learning_rate_factor
    if parameter.ndim < 2 and not settings.decay_norm_and_bias:
        return factor, 0.0
    if group is None or group.weight_decay is None:
        return factor, settings.weight_decay
    return factor, group.weight_decay


@torch.no_grad()
def add_penalty(parameters: Iterable[torch.Tensor], l1: float, l2: float) -> None:
    """Add the gradient of `l1 * sum(|w|) + l2 / 2 * sum(w^2)` to the gradients: `l1 * sign(w) + l2 * w`.

    To be called once per step, after gradients are averaged over ranks and unscaled, before they are clipped. As with
    torch's own decay, a parameter without a gradient is left alone; sign(0) is 0.
    """
    if not l1 and not l2:
        return
    learning = [parameter for parameter in parameters if parameter.grad is not None]
    if not learning:
        return
    weights, gradients = [_own(w) for w in learning], _gradients(learning)
    if l1:
        torch._foreach_add_(gradients, [torch.sign(weight) for weight in weights], alpha=l1)
    if l2:
        torch._foreach_add_(gradients, weights, alpha=l2)


@torch.no_grad()
def clip(parameters: Iterable[torch.Tensor], settings: OptimizerSettings) -> torch.Tensor:
    """Cut each gradient to `clip_value`, then scale all to `clip_norm`; every rank must call it.

    Returns:
        The L2 norm of all gradients together, over all shards, before it was scaled down, shape `[]`, on the device:
        nothing waits for it here. It is not finite where any gradient was not, also where `clip_value` would have made
        it so, and gradients are then not finite either: the step must be left out.
    """
    learning = [parameter for parameter in parameters if parameter.grad is not None]
    if not learning:
        return torch.zeros(())
    gradients = _gradients(learning)
    if settings.clip_value is not None:
        # NaN where a gradient is infinite: cutting would hide that
        marks = [gradient * 0.0 for gradient in gradients]
        torch._foreach_clamp_min_(gradients, -settings.clip_value)
        torch._foreach_clamp_max_(gradients, settings.clip_value)
        torch._foreach_add_(gradients, marks)
    norm = _norm([parameter.grad for parameter in learning if parameter.grad is not None])
    if settings.clip_norm is not None:
        # 1e-6 as in torch.nn.utils.clip_grads_with_norm_; no `if`, which would wait for the device
        torch._foreach_mul_(gradients, torch.clamp(settings.clip_norm / (norm + 1e-6), max=1.0))
    return norm


def _norm(gradients: list[torch.Tensor]) -> torch.Tensor:
    """The L2 norm over whole and sharded gradients together."""
    whole = [gradient for gradient in gradients if not _is_sharded(gradient)]
    sharded = [gradient for gradient in gradients if _is_sharded(gradient)]
    norms = [torch.nn.utils.get_total_norm(part) for part in (whole, sharded) if part]
    norms = [norm.full_tensor() if _is_sharded(norm) else norm for norm in norms]
    return norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack(norms))


def _is_sharded(tensor: torch.Tensor) -> TypeGuard[DTensor]:
    """Whether a tensor is cut over ranks; loads what knows of that only for tensors that are no plain ones."""
    if type(tensor) in _PLAIN:
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def _own(tensor: torch.Tensor) -> torch.Tensor:
    """The part of a tensor that this rank holds, sharing its memory."""
    return tensor.to_local() if _is_sharded(tensor) else tensor


def _gradients(parameters: list[torch.Tensor]) -> list[torch.Tensor]:
    return [_own(parameter.grad) for parameter in parameters if parameter.grad is not None]


class WeightAverage:
    """An exponential moving average of a model's weights: `average = decay * average + (1 - decay) * weight`.

    It begins at the weights that the model has when this is made, not at zero, so it needs no correction of its bias;
    for about `1 / (1 - decay)` steps those first weights still weigh in it. Buffers with fractions (running means of
    norms) are averaged the same way, others (counters) follow the model.

    Args:
        model: the bare module; under FSDP2 after `fully_shard`. Averages are cut over ranks as its weights are.
        decay: between 0 and 1; 0.999 looks back about 1,000 steps.
    """

    def __init__(self, model: torch.nn.Module, decay: float) -> None:
        self.decay = decay
        self._model = model
        self._reshard()
        # under FSDP2 a module's attributes are whole tensors at times, so the sharded ones are held on to
        self._weights: dict[str, torch.Tensor] = dict(model.named_parameters())
        first = {id(parameter): name for name, parameter in self._weights.items()}
        self._tied = {
            name: first[id(parameter)]
            for name, parameter in model.named_parameters(remove_duplicate=False)
            if name not in self._weights
        }
        """Second names of weights that two modules share, as `state_dict` has them."""
        self._kept = set(model.state_dict())
        """Names that a checkpoint has: buffers that are not persistent are constants."""
        self._averages = {name: value.detach().clone() for name, value in self._current().items()}

    @torch.no_grad()
    def update(self) -> None:
        """Take the model's weights in; once after each optimiser step that was made."""
        moving: list[torch.Tensor] = []
        targets: list[torch.Tensor] = []
        for name, value in self._current().items():
            average = self._averages[name]
            if average.is_floating_point():
                moving.append(_own(average))
                targets.append(_own(value.detach()))
            else:
                average.copy_(value)
        if moving:
            torch._foreach_lerp_(moving, targets, 1.0 - self.decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Let the model have the averages inside, and the weights that learn again afterwards, bit for bit.

        Weights and buffers keep their storage, so DDP, FSDP2 and the optimiser notice nothing. Inside, `state()` gives
        the weights that learn; do not train there.
        """
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def state(self) -> dict[str, torch.Tensor]:
        """The averages by the names of the model's `state_dict`, not copied: sharded ones as they are."""
        return self._averages | {name: self._averages[first] for name, first in self._tied.items()}

    @torch.no_grad()
    def load(self, state: dict[str, torch.Tensor]) -> None:
        """Take over what `state()` gave, from this rank's part or from whole tensors of the same shape.

        Raises:
            IntegrityError: names or shapes are not those of the model.
        """
        if wrong := sorted(set(state) ^ set(self._averages) ^ set(self._tied)):
            raise IntegrityError(f"averaged weights do not fit the model: {', '.join(wrong[:3])}; start a new run")
        for name, average in self._averages.items():
            value = state[name]
            if value.shape != average.shape:
                raise IntegrityError(
                    f"averaged weight {name} has shape {list(value.shape)}, the model {list(average.shape)}"
                )
            if _is_sharded(average) and not _is_sharded(value):
                value = _sharded_like(average, value)
            average.copy_(value)

    @torch.no_grad()
    def _swap(self) -> None:
        self._reshard()
        for name, value in self._current().items():
            held = value.detach().clone()
            value.copy_(self._averages[name])
            self._averages[name].copy_(held)

    def _current(self) -> dict[str, torch.Tensor]:
        buffers = {name: value for name, value in self._model.named_buffers() if name in self._kept}
        return self._weights | buffers

    def _reshard(self) -> None:
        """Let FSDP2 drop whole weights that it gathered for an evaluation: they would be stale after a swap."""
        fsdp = sys.modules.get("torch.distributed.fsdp")  # not loaded: no module can be one of its
        if fsdp is None:
            return
        for module in self._model.modules():
            if isinstance(module, fsdp.FSDPModule):
                module.reshard()


def _sharded_like(like: DTensor, whole: torch.Tensor) -> DTensor:
    """This rank's part of a tensor that every rank has whole."""
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(whole.to(like.device), like.device_mesh, like.placements, src_data_rank=None)
