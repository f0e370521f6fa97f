"""A multi-layer perceptron for rows of numbers and categories."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import nn


class TabularMlp(nn.Module):
    """Hidden layers with ReLU over the numbers and an embedding of each category.

    Args:
        numbers: how many numbers a row has.
        categories: how many values each category has; they follow the numbers in a row.
        embedding: numbers that stand for a category; None chooses by how many values it has.
        hidden: width of each hidden layer.
        outputs: numbers that it gives for a row.
        dropout: share of activations dropped after each hidden layer.
    """

    def __init__(
        self, *, numbers: int, categories: Sequence[int], embedding: int | None, hidden: Sequence[int], outputs: int,
        dropout: float,
    ) -> None:  # fmt: skip
        super().__init__()
        self.numbers = numbers
        self.embeddings = nn.ModuleList(
            nn.Embedding(count, embedding or embedding_width(count)) for count in categories
        )
        width = numbers + sum(each.embedding_dim for each in self.embeddings)  # type: ignore[misc] # all are embeddings
        layers: list[nn.Module] = []
        for wide in hidden:
            layers += [nn.Linear(width, wide), nn.ReLU(), nn.Dropout(dropout)]
            width = wide
        self.layers = nn.Sequential(*layers, nn.Linear(width, outputs))

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """Float `[rows, numbers + categories]` to `[rows, outputs]`."""
        parts = [rows[:, : self.numbers]]
        for place, embedding in enumerate(self.embeddings):
            parts.append(embedding(rows[:, self.numbers + place].long()))
        return self.layers(torch.cat(parts, 1))  # type: ignore[no-any-return]


def embedding_width(count: int) -> int:
    """Numbers that stand for one of `count` values (the rule of the fastai library)."""
    return min(50, max(1, round(1.6 * math.pow(count, 0.56))))
