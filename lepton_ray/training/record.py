"""`runs/<run>/record.json`: what a run is and how far it came, readable after everything else is gone.

`wanted` says whether anybody wants the run to go on when its driver is gone: from its start until somebody ends it by
Ctrl-C. A driver that was taken away (SIGKILL, SIGTERM of its pod, a lost head) leaves it wanted.
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Sequence
from typing import Any

from lepton_ray.errors import IntegrityError, NotFoundError, shown
from lepton_ray.settings import Settings
from lepton_ray.settings.loading import apply_override, parse_settings, parse_yaml
from lepton_ray.storage import Store

RUNNING, FINISHED, FAILED, INTERRUPTED = "running", "finished", "failed", "interrupted"
LOST = "lost"


def record_key(run: str) -> str:
    """Where the record of a run is stored."""
    return f"runs/{run}/record.json"


def spec_key(run: str) -> str:
    """Where the resolved settings of a run are stored."""
    return f"runs/{run}/spec.yaml"


def stored_settings(store: Store, run: str, overrides: Sequence[str] = ()) -> Settings:
    """The settings that a run was started with, with overrides applied in order.

    Raises NotFoundError where there is no such run, UsageError for wrong overrides.
    """
    key = spec_key(run)
    try:
        text = store.get(key).decode()
    except NotFoundError as error:
        raise NotFoundError(f"run {shown(run)}: not found in store {store.uri}; see lepton-ray runs list") from error
    except UnicodeDecodeError as error:
        raise IntegrityError(f"{key}: not UTF-8; restore it or choose another run name") from error
    tree = parse_yaml(text, key)
    for override in overrides:
        apply_override(tree, override)
    return parse_settings(tree, key)


def ray_job() -> str | None:
    """The submission id of the Ray job that this process is the driver of; None outside of one."""
    try:
        found = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR") or "{}")
        name = found.get("metadata", {}).get("job_submission_id")
    except (ValueError, AttributeError):
        return None
    return str(name) if name else None


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
        self.fields["attempts"].append({**started, "generations": 0, "job": ray_job()})
        first = self.fields.get("started_at") or now
        self.update(state=RUNNING, started_at=first, finished_at=None, error=None, wanted=True)

    def end_attempt(self, state: str, **changes: Any) -> None:
        """Note how the attempt ended."""
        now = time.time()
        self.fields["attempts"][-1].update(ended_at=now, outcome=state)
        self.update(state=state, finished_at=now if state in (FINISHED, FAILED) else None, **changes)
