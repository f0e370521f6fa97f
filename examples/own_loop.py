"""A usual PyTorch training script, moved over: the real 5,000 digits, two ranks, exact resume.

Run it here with `python examples/own_loop.py`, or on a cluster with
`ray job submit --working-dir . -- python examples/own_loop.py`. Kill it and run it again: it goes on.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.optim.lr_scheduler import StepLR
from torch.utils.data import DataLoader, TensorDataset

import lepton_ray
from lepton_ray.data.digits import load_digits


def datasets() -> tuple[TensorDataset, TensorDataset]:
    """Digits to train on and to test with, as tensors."""
    rows = load_digits()
    pixels = torch.frombuffer(bytearray(b"".join(rows["image"].to_pylist())), dtype=torch.uint8)
    images = pixels.reshape(-1, 1, 28, 28).float() / 255
    labels = torch.tensor(rows["label"].to_pylist())
    test = torch.arange(len(labels)) % 5 == 0
    return TensorDataset(images[~test], labels[~test]), TensorDataset(images[test], labels[test])


class Net(nn.Module):
    """Two convolutions and two fully connected layers."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(1, 16, 3), nn.ReLU(), nn.Conv2d(16, 32, 3), nn.ReLU(), nn.MaxPool2d(2))
        self.classifier = nn.Sequential(
            nn.Flatten(), nn.Linear(32 * 144, 64), nn.ReLU(), nn.Dropout(0.3), nn.Linear(64, 10)
        )

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Logarithms of probabilities."""
        return functional.log_softmax(self.classifier(self.features(images)), dim=1)


def train(options: dict[str, Any]) -> None:
    """The loop, on every rank."""
    session = lepton_ray.training.session()
    train_set, test_set = datasets()
    model = Net()
    optimizer = torch.optim.Adadelta(model.parameters(), lr=1.0)
    scheduler = StepLR(optimizer, step_size=1, gamma=0.7)
    model, optimizer, scheduler = session.prepare(model, optimizer, scheduler)
    for epoch in session.epochs(options["epochs"]):
        model.train()
        for data, target in session.batches(train_set, 64):
            optimizer.zero_grad()
            loss = functional.nll_loss(model(data.to(session.device)), target.to(session.device))
            loss.backward()
            optimizer.step()
            session.log(loss=loss)
        model.eval()
        right = 0
        with torch.no_grad():
            for data, target in DataLoader(session.share(test_set), 250):  # this rank's part of the test digits
                right += int((model(data.to(session.device)).argmax(1).cpu() == target).sum())
        (right_of_all,) = session.sum(right)
        session.evaluated(accuracy=right_of_all / len(test_set))
        if session.rank == 0:
            print(f"epoch {epoch}: accuracy {right_of_all / len(test_set):.4f}", flush=True)
        scheduler.step()


if __name__ == "__main__":
    result = lepton_ray.run_distributed(
        train,
        {
            "run": os.environ.get("RUN", "own-loop"),
            "training": {"workers": 2, "options": {"epochs": int(os.environ.get("EPOCHS", "3"))}},
        },
    )
    print(f"{result.step} steps, {result.metrics}, every sample once per epoch: {result.samples_exact}")
