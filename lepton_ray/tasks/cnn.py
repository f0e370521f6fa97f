"""The convolutional network for small images (28x28 digits and the like)."""

from __future__ import annotations

import torch
from torch import nn


class SmallCnn(nn.Module):
    """Three 3x3 convolutions, each halved by max pooling, and two fully connected layers; no batch statistics.

    Without batch normalisation a row's output depends on that row alone, so the result is the same however a batch is
    cut over ranks. Takes uint8 or float images `[rows, channels, height, width]` in 0..255 and scales them itself with
    the mean and standard deviation of the training rows; gives logits `[rows, classes]`.
    """

    mean: torch.Tensor
    deviation: torch.Tensor

    def __init__(
        self, *, shape: tuple[int, int, int], classes: int, mean: float, deviation: float, width: int, dropout: float
    ) -> None:
        super().__init__()
        channels, height, breadth = shape
        # learnt by `fit`, kept in transforms.json, so not stored a second time with the weights
        self.register_buffer("mean", torch.tensor(mean), persistent=False)
        self.register_buffer("deviation", torch.tensor(deviation), persistent=False)
        self.features = nn.Sequential(
            nn.Conv2d(channels, width, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(width, 2 * width, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(2 * width, 2 * width, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
        )
        flat = 2 * width * (height // 8) * (breadth // 8)
        self.classifier = nn.Sequential(
            nn.Dropout(dropout),
            nn.Linear(flat, 4 * width),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Linear(4 * width, classes),
        )

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Logits `[rows, classes]` of images `[rows, channels, height, width]` in 0..255."""
        logits: torch.Tensor = self.classifier(self.features((images.float() - self.mean) / self.deviation))
        return logits
