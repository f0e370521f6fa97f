"""Checkpoints written behind the loop: one at a time, in the background, never blocking a step but for the copy.

With `ddp` rank 0 writes. Where every rank holds a part that no other has (`fsdp`, PowerSGD's memory), each writes its
own files, and rank 0 commits the one manifest that names them all, once all are there.
"""

from __future__ import annotations

import collections
import json
import logging
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
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
        self._waiting: tuple[int, StateCopy, Mapping[str, Any], int | None] | None = None
        """What is written next, where storage was so slow that a newer checkpoint came meanwhile."""
        self._busy = False
        self._turn = threading.Lock()
        """Guards the four above, which the loop and the writing thread share."""
        self.non_finite_step: int | None = None
        """The newest step whose state was refused because it was not finite."""
        self.commit_s: collections.deque[float] = collections.deque(maxlen=8)
        """Seconds that the newest checkpoints took in the background, each from its start to its commit."""

    @property
    def waits(self) -> bool:
        """Whether `submit` waits for the checkpoint before: where all ranks write."""
        return self._group is not None

    def spare(self) -> StateCopy | None:
        """A copy that has been written, if there is one, for `copy_state(into=...)`; it is given away."""
        with self._turn:
            if not self._busy and self._writing is not None:
                self._spare, self._writing = self._writing, None
            spare, self._spare = self._spare, None
            return spare

    def submit(self, step: int, copy: StateCopy, state: Mapping[str, Any], best: int | None = None) -> None:
        """Commit this copy as the checkpoint of `step`, after the one before is done; every rank calls it.

        `best` is the step whose checkpoint is kept whatever comes after. Storage that is away or refuses, and a state
        that is not finite, cost this checkpoint, not the run: the next one tries again. Where one rank writes, slow
        storage costs no time either: the newest copy waits, in place of an older one that waits. Raises RefusedError
        where the one before found that another attempt has taken the run over.
        """
        with self._turn:
            # shards are written by all ranks together, and which step waits would have to be agreed
            if self._busy and self._group is None:
                if self._waiting is not None:
                    _log.warning("checkpoint of step %d not written, storage is slower than the run", self._waiting[0])
                    self._spare = self._waiting[1]
                self._waiting = (step, copy, state, best)
                return
        self._settle(last=False)
        if copy.is_empty and self._group is None:
            return
        self._writing, self._busy = copy, True
        self._pending = self._pool.submit(self._write_newest, step, copy, state, best)

    def settle(self, within_s: float | None = None) -> bool:
        """Wait for the checkpoint that is being written; one that could not be written costs no more than itself.

        False where it is not done `within_s` seconds from now.
        """
        return self._settle(last=False, within_s=within_s)

    def finish(self, within_s: float | None = None) -> bool:
        """Wait for the last checkpoint; False where it is not committed `within_s` seconds from now.

        Raises UnavailableError where it could not be committed, NonFiniteStateError where it must not be.
        """
        done = True
        try:
            done = self._settle(last=True, within_s=within_s)
        finally:
            self._pool.shutdown(wait=done)
        return done

    def abandon(self) -> None:
        """After a failure: what is being written may still be committed, nothing else will be; waits for nothing."""
        with self._turn:
            self._waiting = None
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _settle(self, *, last: bool, within_s: float | None = None) -> bool:
        if self._pending is None:
            return True
        if within_s is not None and not wait([self._pending], max(0.0, within_s)).done:
            return False
        try:
            self._pending.result()
        except LeptonError as error:
            if last or _is_fenced(error):
                raise
            _log.warning("checkpoint not written, training goes on: %s", error)
        finally:
            self._pending = None
            if self._writing is not None:
                self._spare, self._writing = self._writing, None
        return True

    def _write_newest(self, step: int, copy: StateCopy, state: Mapping[str, Any], best: int | None) -> None:
        """Write this copy, and then whatever came to wait meanwhile; raises what the last one raised."""
        while True:
            failure: BaseException | None = None
            try:
                self._write(step, copy, state, best)
            except BaseException as error:  # noqa: BLE001 - told to the loop below, or it would think us busy for ever
                failure = error
            with self._turn:
                after, self._waiting = self._waiting, None
                self._busy = after is not None and (failure is None or _costs_one(failure))
                if self._busy and after is not None:
                    self._spare = copy
                    step, copy, state, best = after
                    self._writing = copy
            if not self._busy:
                if failure is not None:
                    raise failure
                return
            if failure is not None:
                _log.warning("checkpoint not written, training goes on: %s", failure)

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
        self.commit_s.append(time.perf_counter() - started)
        if self._rank == 0:
            self._recorder.observe("lepton_checkpoint_seconds", self.commit_s[-1])
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


def _is_fenced(error: LeptonError) -> bool:
    """Whether an error says that another attempt has the run: any refusal but that of a state that is not finite."""
    return isinstance(error, RefusedError) and not isinstance(error, NonFiniteStateError)


def _costs_one(error: BaseException) -> bool:
    """Whether an error costs this checkpoint and not the run."""
    return isinstance(error, LeptonError) and not _is_fenced(error)


def _check(step: int, copy: StateCopy) -> Entries:
    bad = copy.first_non_finite()
    if bad is not None:
        raise NonFiniteStateError(f"step {step}: tensor {bad} is not finite: such a checkpoint is never committed")
    return {}


_KINDS: dict[str, type[LeptonError]] = {
    kind.__name__: kind for kind in (UnavailableError, NonFiniteStateError, RefusedError)
}
"""What a failure of another rank is raised as: those that the loop decides on."""
