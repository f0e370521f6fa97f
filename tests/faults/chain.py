"""A training run without training: its whole state is a chain of hashes over the samples it used, in their order.

One sample too many, too few or at another place, one step repeated from another state: the end of the chain differs.
It goes through the real files of a checkpoint (safetensors and JSON), so it costs a step nothing and hides nothing.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from safetensors.torch import load as load_tensors

from lepton_ray.data.order import SampleLedger, SampleOrder
from lepton_ray.storage import sha256_hex
from lepton_ray.training.state import StateCopy

START = hashlib.sha256(b"start").digest()
FILLER = 220
"""Bytes beside the 32 of the chain, so that damage seldom hits what is easily noticed."""


@dataclass
class Chain:
    """Where a run is."""

    rows: int
    batch: int
    seed: int
    step: int = 0
    """Steps that are done."""
    offset: int = 0
    """Sample offset of the next step."""
    link: bytes = START
    samples: SampleLedger = field(default_factory=SampleLedger)

    def advance(self) -> None:
        """Do one step."""
        order = SampleOrder(self.rows, self.seed)
        ids = order.sample_ids(self.offset, self.batch)
        self.samples.add(order.epochs_of(self.offset, self.batch), ids)
        self.link = hashlib.sha256(self.link + ids.tobytes()).digest()
        self.step += 1
        self.offset += self.batch

    def outcome(self) -> dict[str, Any]:
        """What the end of a run is compared by."""
        return {"step": self.step, "link": self.link.hex(), "samples": self.samples.to_json()}

    def copy(self) -> StateCopy:
        """The tensors of a checkpoint."""
        filler = hashlib.shake_256(self.link).digest(FILLER)
        weights = torch.frombuffer(bytearray(self.link + filler), dtype=torch.uint8)
        moments = torch.frombuffer(bytearray(hashlib.shake_256(filler).digest(4 * FILLER)), dtype=torch.uint8)
        return StateCopy({"model": {"weights": weights}, "optimizer": {"weights.moments": moments}}, {}, None, 0)

    def state(self, attempt: int) -> dict[str, Any]:
        """The rest of a checkpoint; no two attempts write the same bytes, so that nobody's is taken for another's."""
        return {"step": self.step, "samples": self.samples.to_json(), "generation": attempt, "world_size": 1}

    def restore(self, files: Mapping[str, bytes], offset: int) -> None:
        """Take the state of a checkpoint."""
        state = json.loads(files["state.json"])
        self.link = bytes(load_tensors(files["model.safetensors"])["weights"][:32].tolist())
        self.step, self.offset = int(state["step"]), offset
        self.samples = SampleLedger.from_json(state["samples"])


def undisturbed(rows: int, batch: int, seed: int, steps: int) -> dict[str, Any]:
    """The outcome of a run that nothing happened to."""
    chain = Chain(rows, batch, seed)
    for _ in range(steps):
        chain.advance()
    return chain.outcome()


def digest_of_entries(entries: Mapping[str, Mapping[str, Any]]) -> str:
    """What stands for a checkpoint's content in the history, from its manifest's entries."""
    return sha256_hex("\n".join(f"{name} {entries[name]['sha256']}" for name in sorted(entries)).encode())[:16]


def digest_of_files(files: Mapping[str, bytes]) -> str:
    """The same, from the bytes that were really read."""
    return digest_of_entries({name: {"sha256": sha256_hex(data)} for name, data in files.items()})
