"""Which samples a rank took of the newest steps, in shared memory: what a killed rank can tell after its end.

The account of samples rides in checkpoints and hot copies, but a rank that is killed has taken samples since. Each rank
writes the ids of every step's batch into a ring, before the batch is used, and every so many steps the account up to
there. The survivors' state after step n holds the gradients of all ranks' batches up to n; their logs say which samples
these were.

A lost node takes its ranks' logs with it. For that each node keeps the account of all ranks together, as of the newest
step at which they exchanged it: which samples make up the steps after it follows from the plan of the run, and that the
lost ranks took theirs from the survivors' state, which holds their gradients.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lepton_ray.data.order import SampleLedger

STEPS = 64
"""Steps that the ring holds."""
SETTLED_EVERY = 32
"""Steps after which the account is written whole; the ring holds twice as many."""
_HEAD = 2  # step and count, before the ids and their epochs
_NONE = -1


class SampleLog:
    """The log of one rank in one worker group.

    Args:
        path: of the ring; the settled account is beside it.
        largest: samples of one batch of this rank at most.
        about: `rank`, `generation` and `world_size`.
    """

    def __init__(self, path: Path, largest: int, about: Mapping[str, int]) -> None:
        self.path, self._about = path, dict(about)
        words = _HEAD + 2 * max(1, largest)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            os.posix_fallocate(descriptor, 0, STEPS * words * 8)
            memory = mmap.mmap(descriptor, STEPS * words * 8)
        finally:
            os.close(descriptor)
        self._ring: npt.NDArray[np.int64] = np.frombuffer(memory, np.int64).reshape(STEPS, words)
        self._ring[:, 0] = _NONE
        self._largest = max(1, largest)

    def took(self, step: int, ids: npt.NDArray[np.int64], epochs: int | npt.NDArray[np.int64]) -> None:
        """The batch that brings the run to `step` steps is of these samples.

        Args:
            step: steps that are done once this batch is.
            ids: of the samples, shape `[n]`, none for a rank without a share.
            epochs: the epoch of all of them, or of each, shape `[n]`.
        """
        slot = self._ring[step % STEPS]
        count = len(ids)
        slot[0] = _NONE  # a rank that is killed in here has no entry for the step, never half of one
        slot[1] = count
        slot[_HEAD : _HEAD + count] = ids
        slot[_HEAD + self._largest : _HEAD + self._largest + count] = epochs
        slot[0] = step

    def settle(self, step: int, samples: Mapping[str, Any]) -> None:
        """Write this rank's account (JSON of a `SampleLedger`) of everything up to `step` steps."""
        fresh = self.path.with_suffix(".fresh")
        fresh.write_text(json.dumps({**self._about, "step": step, "samples": samples}), encoding="utf-8")
        fresh.replace(_settled(self.path))


def keep_common(folder: Path, generation: int, step: int, samples: Mapping[str, Any], plan: Mapping[str, Any]) -> None:
    """Keep the account (JSON of a `SampleLedger`) of all ranks after `step` steps on this node.

    Args:
        folder: of the run's hot copies.
        generation: of the group.
        step: steps that are done.
        samples: the account.
        plan: what is needed to tell the samples of later steps.
    """
    path = folder / f"g{generation}-common"
    fresh = path.with_suffix(".fresh")
    fresh.write_text(json.dumps({"generation": generation, "step": step, "samples": samples, "plan": plan}))
    fresh.replace(path)


def common(folder: Path) -> list[dict[str, Any]]:
    """The common accounts that this node has, one for each generation."""
    found = []
    for path in sorted(folder.glob("g*-common")):
        with contextlib.suppress(OSError, ValueError):
            found.append(json.loads(path.read_text(encoding="utf-8")))
    return found


def logged(folder: Path) -> list[dict[str, Any]]:
    """What each log in the folder covers: `rank`, `generation`, `world_size`, and the steps `first` to `last`."""
    found = []
    for path in sorted(folder.glob("g*-rank*.log")):
        with contextlib.suppress(OSError, ValueError, KeyError):
            settled, ring = _read(path)
            last = settled["step"]
            steps = set(ring[:, 0].tolist())
            while last + 1 in steps:
                last += 1
            about = {key: int(settled[key]) for key in ("rank", "generation", "world_size")}
            found.append({**about, "first": settled["step"], "last": last, "path": str(path)})
    return found


def account_at(path: Path, step: int) -> SampleLedger:
    """The account of the rank after `step` steps, which its log must cover."""
    settled, ring = _read(path)
    ledger = SampleLedger.from_json(settled["samples"])
    largest = (ring.shape[1] - _HEAD) // 2
    for wanted in range(settled["step"] + 1, step + 1):
        slot = ring[wanted % STEPS]
        count = int(slot[1])
        if slot[0] != wanted:
            raise KeyError(f"step {wanted} is not in the log")
        if count:
            ledger.add(slot[_HEAD + largest : _HEAD + largest + count].copy(), slot[_HEAD : _HEAD + count].copy())
    return ledger


def _settled(path: Path) -> Path:
    return path.with_suffix(".account")


def _read(path: Path) -> tuple[dict[str, Any], npt.NDArray[np.int64]]:
    settled: dict[str, Any] = json.loads(_settled(path).read_text(encoding="utf-8"))
    data = np.frombuffer(path.read_bytes(), np.int64)
    return settled, data.reshape(STEPS, len(data) // STEPS)
