"""Checkpoints written behind the loop: one at a time, in the background, never blocking a step but for the copy.

With `ddp` rank 0 writes. Where every rank holds a part that no other has (`fsdp`, PowerSGD's memory), each writes its
own files, and rank 0 commits the one manifest that names them all, once all are there.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
import torch.distributed as dist

from lepton_ray.errors import LeptonError, RefusedError, UnavailableError
from lepton_ray.monitoring.recorder import Recorder
from lepton_ray.training.checkpoints import CheckpointStore, Entries
from lepton_ray.training.collectives import gather_bytes
from lepton_ray.training.parallel import Parallel
from lepton_ray.training.state import StateCopy, pack

_log = logging.getLogger(__name__)
_CPU = torch.device("cpu")
FACTS = ("world_size", "sample_offset", "generation", "table_fingerprint")
"""What of the state is also told in the manifest."""


class NonFiniteStateError(RefusedError):
    """A checkpoint that holds NaN or infinity; it is not committed."""


class CheckpointWriter:
    """One rank's writer; every rank makes one, in the same order among the process group's other uses."""

    def __init__(self, checkpoints: CheckpointStore, keep: int, recorder: Recorder, parallel: Parallel) -> None:
        self._checkpoints, self._keep, self._recorder = checkpoints, keep, recorder
        self._rank = parallel.rank
        self._group = dist.new_group(backend="gloo") if parallel.all_write and parallel.world_size > 1 else None
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None
        self._writing: StateCopy | None = None
        self._spare: StateCopy | None = None
        self.non_finite_step: int | None = None
        """The newest step whose state was refused because it was not finite."""

    def spare(self) -> StateCopy | None:
        """A copy that has been written, if there is one, for `copy_state(into=...)`; it is given away."""
        if self._pending is not None and self._pending.done() and self._writing is not None:
            self._spare, self._writing = self._writing, None
        spare, self._spare = self._spare, None
        return spare

    def submit(self, step: int, copy: StateCopy, state: Mapping[str, Any], best: int | None = None) -> None:
        """Commit this copy as the checkpoint of `step`, after the one before is done; every rank calls it.

        `best` is the step whose checkpoint is kept whatever comes after. Storage that is away, and a state that is not
        finite, cost this checkpoint, not the run: the next one tries again. Raises RefusedError where the one before
        found that another attempt has taken the run over.
        """
        self._settle(last=False)
        if copy.is_empty and self._group is None:
            return
        self._writing = copy
        self._pending = self._pool.submit(self._write, step, copy, state, best)

    def settle(self) -> None:
        """Wait for the checkpoint that is being written; one that could not be written costs no more than itself."""
        self._settle(last=False)

    def finish(self) -> None:
        """Wait for the last checkpoint.

        Raises UnavailableError where it could not be committed, NonFiniteStateError where it must not be.
        """
        try:
            self._settle(last=True)
        finally:
            self._pool.shutdown()

    def _settle(self, *, last: bool) -> None:
        if self._pending is None:
            return
        try:
            self._pending.result()
        except (UnavailableError, NonFiniteStateError) as error:
            if last:
                raise
            _log.warning("checkpoint not written, training goes on: %s", error)
        finally:
            self._pending = None
            if self._writing is not None:
                self._spare, self._writing = self._writing, None

    def _write(self, step: int, copy: StateCopy, state: Mapping[str, Any], best: int | None) -> None:
        started = time.perf_counter()
        try:
            self._agree(lambda: _check(step, copy))
        except NonFiniteStateError:
            self.non_finite_step = step
            raise
        entries = self._agree(lambda: self._checkpoints.write(step, pack(copy, state)))
        facts = {key: state[key] for key in FACTS if key in state}
        self._agree(lambda: self._checkpoints.commit(step, entries, facts) if self._rank == 0 else {})
        if self._rank == 0:
            self._recorder.observe("lepton_checkpoint_seconds", time.perf_counter() - started)
            self._recorder.set("lepton_checkpoint_bytes", sum(entry["size"] for entry in entries.values()))
            self._recorder.count("lepton_checkpoint_committed_total")
            self._recorder.set("lepton_checkpoint_last_commit_timestamp_seconds", time.time())
            self._checkpoints.retain(self._keep, best)

    def _agree(self, act: Callable[[], Entries]) -> Entries:
        """What `act` gave on all ranks together; where it failed on one of them it fails on all, in the same words."""
        if self._group is None:
            return act()
        entries: Entries = {}
        failure: LeptonError | None = None
        try:
            entries = act()
        except LeptonError as error:
            failure = error
        mine = {"entries": entries, "failed": type(failure).__name__ if failure else None, "message": str(failure)}
        parts = [json.loads(part) for part in gather_bytes(json.dumps(mine).encode(), _CPU, self._group)]
        if failure is not None:
            raise failure
        for rank, part in enumerate(parts):
            if part["failed"] is not None:
                raise _KINDS.get(part["failed"], LeptonError)(f"rank {rank}: {part['message']}")
        return {name: entry for part in parts for name, entry in part["entries"].items()}


def _check(step: int, copy: StateCopy) -> Entries:
    bad = copy.first_non_finite()
    if bad is not None:
        raise NonFiniteStateError(f"step {step}: tensor {bad} is not finite: such a checkpoint is never committed")
    return {}


_KINDS: dict[str, type[LeptonError]] = {
    kind.__name__: kind for kind in (UnavailableError, NonFiniteStateError, RefusedError)
}
"""What a failure of another rank is raised as: those that the loop decides on."""
