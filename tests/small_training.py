"""A small language-like model, its rows and a plain loop, for tests of what several ranks compute together."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from lepton_ray.settings.training import ParallelSettings
from lepton_ray.training.parallel import Parallel, wrap

ROWS, LENGTH, WORDS, WIDTH, CLASSES = 24, 6, 20, 12, 5
CPU = torch.device("cpu")


class Block(nn.Module):
    """A residual block with a short sequence of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.mix = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.mix(self.norm(x))


class Network(nn.Module):
    """Words [rows, LENGTH] to scores [rows, CLASSES]."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(WORDS, WIDTH)
        self.blocks = nn.ModuleList([Block() for _ in range(3)])
        self.head = nn.Linear(WIDTH, CLASSES)
        self.scale = nn.Buffer(torch.tensor([1.5]))

    def forward(self, words: torch.Tensor) -> torch.Tensor:
        x = self.words(words)
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(1)) * self.scale


def network(seed: int = 0) -> Network:
    """The model with the weights of a seed."""
    torch.manual_seed(seed)
    return Network()


def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The ROWS rows of a step: each class has words of its own, and one word in two is any."""
    draw = torch.Generator().manual_seed(1000 + step)
    targets = torch.randint(CLASSES, (ROWS,), generator=draw)
    own = targets[:, None] * (WORDS // CLASSES) + torch.randint(WORDS // CLASSES, (ROWS, LENGTH), generator=draw)
    anything = torch.randint(WORDS, (ROWS, LENGTH), generator=draw)
    return torch.where(torch.rand((ROWS, LENGTH), generator=draw) < 0.5, own, anything), targets


def optimizer_of(parallel: Parallel) -> torch.optim.Optimizer:
    """AdamW over a wrapped model."""
    return torch.optim.AdamW(parallel.module.parameters(), lr=1e-2, fused=not parallel.sharded)


def prepared(seed: int = 0, **settings: Any) -> tuple[Parallel, torch.optim.Optimizer]:
    """A wrapped network and its optimiser, on this rank."""
    parallel = wrap(network(seed), ParallelSettings(**settings), CPU)
    return parallel, optimizer_of(parallel)


def train(
    parallel: Parallel, optimizer: torch.optim.Optimizer, first: int, last: int, accumulate: int = 1
) -> list[float]:
    """Steps of this rank over its slice of each batch, in parts; this rank's share of each loss."""
    losses = []
    for step in range(first, last):
        words, targets = batch(step)
        rows = ROWS // parallel.world_size
        mine = slice(parallel.rank * rows, (parallel.rank + 1) * rows)
        total = 0.0
        parts = list(zip(words[mine].chunk(accumulate), targets[mine].chunk(accumulate), strict=True))
        for number, (inputs, wanted) in enumerate(parts, 1):
            with parallel.accumulating(last=number == len(parts)):
                loss = nn.functional.cross_entropy(parallel.model(inputs), wanted) / accumulate
                loss.backward()
            total += float(loss.detach())
        torch.nn.utils.clip_grad_norm_(parallel.module.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(total)
    return losses


def whole(parallel: Parallel) -> dict[str, Any]:
    """The model's tensors, gathered from all ranks, as numpy arrays."""
    return {name: full(value).numpy().copy() for name, value in parallel.module.state_dict().items()}


def full(value: torch.Tensor) -> torch.Tensor:
    """All rows of a tensor that may be cut over the ranks."""
    from torch.distributed.tensor import DTensor

    return value.full_tensor().detach() if isinstance(value, DTensor) else value.detach()


def moments(parallel: Parallel, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The optimiser's tensors by parameter and name, gathered from all ranks, as numpy arrays."""
    return {
        f"{name}.{part}": full(value).numpy().copy()
        for name, parameter in parallel.module.named_parameters()
        for part, value in optimizer.state[parameter].items()
    }
