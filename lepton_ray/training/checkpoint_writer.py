"""Checkpoints written behind the loop: one at a time, in the background, never blocking a step but for the copy."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from lepton_ray.errors import RefusedError, UnavailableError
from lepton_ray.monitoring.recorder import Recorder
from lepton_ray.training.checkpoints import CheckpointStore
from lepton_ray.training.state import Tensors, pack

_log = logging.getLogger(__name__)


class CheckpointWriter:
    """Rank 0's writer."""

    def __init__(self, checkpoints: CheckpointStore, keep: int, recorder: Recorder) -> None:
        self._checkpoints, self._keep, self._recorder = checkpoints, keep, recorder
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None

    def submit(self, step: int, weights: Tensors, moments: Tensors, state: Mapping[str, Any]) -> None:
        """Commit these copies as the checkpoint of `step`, after the one before is done.

        Storage that is away costs this checkpoint, not the run: the next one tries again. Raises RefusedError where
        the one before found that another attempt has taken the run over.
        """
        self._settle(last=False)
        self._pending = self._pool.submit(self._write, step, weights, moments, state)

    def finish(self) -> None:
        """Wait for the last checkpoint. Raises UnavailableError where it could not be committed."""
        self._settle(last=True)
        self._pool.shutdown()

    def _settle(self, *, last: bool) -> None:
        if self._pending is None:
            return
        try:
            self._pending.result()
        except RefusedError:
            raise
        except UnavailableError as error:
            if last:
                raise
            _log.warning("checkpoint not written, training goes on: %s", error)
        finally:
            self._pending = None

    def _write(self, step: int, weights: Tensors, moments: Tensors, state: Mapping[str, Any]) -> None:
        started = time.perf_counter()
        facts = {key: state[key] for key in ("world_size", "sample_offset", "generation", "table_fingerprint")}
        size = self._checkpoints.save(step, pack(weights, moments, state), facts)
        self._recorder.observe("lepton_checkpoint_seconds", time.perf_counter() - started)
        self._recorder.set("lepton_checkpoint_bytes", size)
        self._recorder.count("lepton_checkpoint_committed_total")
        self._recorder.set("lepton_checkpoint_last_commit_timestamp_seconds", time.time())
        self._checkpoints.retain(self._keep)
