"""`runs/<run>/record.json`: what a run is and how far it came, readable after everything else is gone."""

from __future__ import annotations

import json
import os
import socket
import time
from typing import Any

from lepton_ray.errors import IntegrityError, NotFoundError
from lepton_ray.storage import Store

RUNNING, FINISHED, FAILED, INTERRUPTED = "running", "finished", "failed", "interrupted"
LOST = "lost"


def record_key(run: str) -> str:
    """Where the record of a run is stored."""
    return f"runs/{run}/record.json"


class RunRecord:
    """The record of one run, changed by compare-and-swap by the driver that holds the lease."""

    def __init__(self, store: Store, run: str, fields: dict[str, Any], etag: str | None) -> None:
        self._store, self._run, self._etag = store, run, etag
        self.fields = fields

    @classmethod
    def open(cls, store: Store, run: str) -> RunRecord:
        """The stored record, or a new one that is stored by the first `update`."""
        try:
            stored = store.fetch(record_key(run))
        except NotFoundError:
            return cls(store, run, {"run": run, "created_at": time.time(), "attempts": [], "failures": 0}, None)
        try:
            fields = json.loads(stored.data)
        except ValueError as error:
            raise IntegrityError(f"{record_key(run)}: not JSON; restore it or choose another run name") from error
        return cls(store, run, fields, stored.etag)

    @property
    def exists(self) -> bool:
        """Whether the run was started before."""
        return self._etag is not None

    def update(self, **changes: Any) -> None:
        """Change fields and store the record.

        Raises ConflictError where somebody else changed it: only the holder of the lease may.
        """
        self.fields.update(changes, updated_at=time.time())
        body = json.dumps(self.fields, indent=1).encode()
        key = record_key(self._run)
        self._etag = (
            self._store.put_if_absent(key, body) if self._etag is None else self._store.replace(key, body, self._etag)
        )

    def begin_attempt(self, attempt: int) -> None:
        """Note that this process drives the run from now on."""
        now = time.time()
        for before in self.fields["attempts"]:
            if before["outcome"] is None:  # its driver was gone without a word
                before["outcome"] = LOST
        driver = f"{socket.gethostname()}:{os.getpid()}"
        started = {"attempt": attempt, "driver": driver, "started_at": now, "ended_at": None, "outcome": None}
        self.fields["attempts"].append({**started, "generations": 0})
        first = self.fields.get("started_at") or now
        self.update(state=RUNNING, started_at=first, finished_at=None, error=None)

    def end_attempt(self, state: str, **changes: Any) -> None:
        """Note how the attempt ended."""
        now = time.time()
        self.fields["attempts"][-1].update(ended_at=now, outcome=state)
        self.update(state=state, finished_at=now if state in (FINISHED, FAILED) else None, **changes)
