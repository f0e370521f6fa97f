"""The memory of a search: `tunings/<run>/record.json` and one file per trial, as plain JSON.

Ray Tune keeps its own state as pickles in a scratch folder and this room never reads it back: a search is gone on with
from this journal alone. Only the driver writes, by compare-and-swap.
"""

from __future__ import annotations

import json
import time
from typing import Any

from lepton_ray.errors import ConflictError, IntegrityError, NotFoundError, RefusedError, UsageError
from lepton_ray.settings import Settings
from lepton_ray.storage import Store
from lepton_ray.tuning.space import changed_settings
from lepton_ray.tuning.trials import Trial, trial_name


def folder(run: str) -> str:
    """Where the journal of a search is stored."""
    return f"tunings/{run}"


def known_table_version(store: Store, run: str) -> int | None:
    """The version of the table that a search began with; None where there was none yet."""
    try:
        version = json.loads(store.get(f"{folder(run)}/record.json"))["table_version"]
        return None if version is None else int(version)
    except NotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        raise IntegrityError(f"{folder(run)}/record.json: damaged; restore it or name another run") from error


class Journal:
    """The journal of one search."""

    def __init__(self, store: Store, run: str) -> None:
        self._store, self._folder, self._run = store, folder(run), run
        self._etags: dict[str, str] = {}
        self.fields: dict[str, Any] = {}
        """The record of the whole search."""
        self.trials: dict[int, Trial] = {}

    def open(self, settings: Settings) -> bool:
        """Read what an earlier driver wrote; whether there was one. Nothing is written.

        Raises UsageError where the search was begun with other settings, IntegrityError for a damaged file.
        """
        try:
            self.fields = self._read("record.json")
        except NotFoundError:
            return False
        changed = changed_settings(self.fields["spec"], settings.model_dump(mode="json"))
        if changed:
            raise UsageError(
                f"tuning {self._run} was started otherwise: {'; '.join(changed)}; set them back or name another run"
            )
        for name in self._store.list_names(f"{self._folder}/trials"):
            try:
                trial = Trial.from_json(self._read(f"trials/{name}"))
            except (KeyError, TypeError, ValueError) as error:
                raise IntegrityError(f"{self._folder}/trials/{name}: no record of a trial; delete it") from error
            self.trials[trial.number] = trial
        return True

    def begin(self, settings: Settings, **facts: Any) -> None:
        """Write that a driver is at it from now on.

        Args:
            settings: of the search.
            facts: what a new record says beside them.
        """
        if not self.fields:
            self.fields = {"run": self._run, "created_at": time.time(), **facts}
        self.update(state="running", error=None, spec=settings.model_dump(mode="json"))

    def update(self, **changes: Any) -> None:
        """Change fields of the search's record."""
        self.fields.update(changes, updated_at=time.time())
        self._write("record.json", self.fields)

    def keep(self, trial: Trial) -> None:
        """Store what is known of a trial now."""
        self.trials[trial.number] = trial
        self._write(f"trials/{trial_name(trial.number)}.json", trial.to_json())

    def in_order(self) -> list[Trial]:
        """All trials by their numbers."""
        return [self.trials[number] for number in sorted(self.trials)]

    def _read(self, name: str) -> dict[str, Any]:
        stored = self._store.fetch(f"{self._folder}/{name}")
        try:
            fields = json.loads(stored.data)
            if not isinstance(fields, dict):
                raise ValueError("no JSON object")  # noqa: TRY301, TRY004 - one sentence for all faults
        except ValueError as error:
            raise IntegrityError(f"{self._folder}/{name}: not JSON; restore it or name another run") from error
        self._etags[name] = stored.etag
        return fields

    def _write(self, name: str, fields: dict[str, Any]) -> None:
        key, body = f"{self._folder}/{name}", json.dumps(fields, indent=1, allow_nan=False).encode()
        try:
            if name in self._etags:
                self._etags[name] = self._store.replace(key, body, self._etags[name])
            else:
                self._etags[name] = self._store.put_if_absent(key, body)
        except ConflictError as error:
            raise RefusedError(f"tuning {self._run}: another driver goes on with it; follow that one") from error
