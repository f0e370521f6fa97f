"""The re-find suite: the real classes with one mistake each, as somebody might make it.

Every one must be caught by the checkers under some seeded scenario in which the real code passes: this is the proof
that the harness can fail. "The old ..." is the real code as it was before the harness found a fault in it.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from player import Parts, with_parts
from scenario import FAULTS, Kind

from lepton_ray.errors import ConflictError, IntegrityError, LeptonError, NotFoundError, UnavailableError
from lepton_ray.storage import sha256_hex
from lepton_ray.training.checkpoint_writer import CheckpointWriter
from lepton_ray.training.checkpoints import (
    FORMAT,
    MANIFEST,
    CheckpointStore,
    Entries,
    LoadedCheckpoint,
    _checked,
    _sealed,
)
from lepton_ray.training.lease import RunLease, lease_key


class NoFence:
    """Says yes to everybody."""

    def check(self) -> None:
        """Whatever happened to the run, go on."""


class ManifestFirst(CheckpointStore):
    """Commits, then writes the files."""

    def write(self, step: int, files: Mapping[str, bytes]) -> Entries:
        """Only say what will be written."""
        unique = f"{self._attempt:06d}-{time.monotonic_ns():x}"
        self._late = {f"{self.folder(step)}/{unique}/{name}": data for name, data in files.items()}
        return {
            name: {"path": f"{unique}/{name}", "size": len(data), "sha256": sha256_hex(data)}
            for name, data in files.items()
        }

    def commit(self, step: int, entries: Entries, facts: Mapping[str, Any]) -> Entries:
        """The manifest, then the files."""
        stands = super().commit(step, entries, facts)
        for key, data in self._late.items():
            self._store.put(key, data)
        return stands


class Unfenced(CheckpointStore):
    """Never asks whether another attempt has the run."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._fence = NoFence()  # type: ignore[assignment]


class Unchecked(CheckpointStore):
    """Reads what lies there."""

    def read(self, step: int, manifest: Mapping[str, Any], names: Iterable[str]) -> dict[str, bytes]:
        """No size, no hash."""
        try:
            return {n: self._store.get(f"{self.folder(step)}/{manifest['files'][n]['path']}") for n in names}
        except NotFoundError as error:
            raise IntegrityError(str(error)) from error


class SizeOnly(CheckpointStore):
    """Takes a file of the right size for the right file."""

    def read(self, step: int, manifest: Mapping[str, Any], names: Iterable[str]) -> dict[str, bytes]:
        """Sizes, no hash."""
        files = Unchecked.read(self, step, manifest, names)  # type: ignore[arg-type]
        for name, data in files.items():
            if len(data) != manifest["files"][name]["size"]:
                raise IntegrityError(f"{name} is short")
        return files


class LatestTrusted(CheckpointStore):
    """Believes a pointer to the newest checkpoint instead of walking."""

    def commit(self, step: int, entries: Entries, facts: Mapping[str, Any]) -> Entries:
        """Commit, and move the pointer."""
        stands = super().commit(step, entries, facts)
        self._store.put(f"{self._prefix}-LATEST", str(step).encode())
        return stands

    def newest(self) -> LoadedCheckpoint | None:
        """What the pointer says, or nothing."""
        try:
            return self.load(int(self._store.get(f"{self._prefix}-LATEST")))
        except (NotFoundError, IntegrityError, ValueError):
            return None


class LostMeansFailed(CheckpointStore):
    """Takes a lost answer for a failed commit, and cleans up after itself."""

    def commit(self, step: int, entries: Entries, facts: Mapping[str, Any]) -> Entries:
        """Commit, or remove the files that were written for it."""
        try:
            return super().commit(step, entries, facts)
        except UnavailableError:
            for entry in entries.values():
                self._store.delete(f"{self.folder(step)}/{entry['path']}")
            raise


class LostMeansDone(CheckpointStore):
    """Takes a lost answer for a success."""

    def commit(self, step: int, entries: Entries, facts: Mapping[str, Any]) -> Entries:
        """Commit, surely."""
        try:
            return super().commit(step, entries, facts)
        except UnavailableError:
            return entries


class CollectsAll(CheckpointStore):
    """Takes files of the running attempt for orphans."""

    def collect_orphans(self) -> int:
        """As another attempt would."""
        mine, self._attempt = self._attempt, 999_999
        try:
            return super().collect_orphans()
        finally:
            self._attempt = mine


class Overwrites(CheckpointStore):
    """Puts the manifest over whatever is there."""

    def _place(self, step: int, sealed: bytes, entries: Entries) -> Entries:
        self._store.put(f"{self.folder(step)}/{MANIFEST}", sealed)
        return entries


class InPlace(CheckpointStore):
    """Uses a key again when its step comes again."""

    def write(self, step: int, files: Mapping[str, bytes]) -> Entries:
        """Always to the same keys."""
        entries: Entries = {}
        for name, data in files.items():
            self._store.put(f"{self.folder(step)}/files/{name}", data)
            entries[name] = {"path": f"files/{name}", "size": len(data), "sha256": sha256_hex(data)}
        return entries


class FirstOnly(CheckpointStore):
    """Leaves a damaged checkpoint in its place when its step comes again, and says that all is well."""

    def _place(self, step: int, sealed: bytes, entries: Entries) -> Entries:
        with contextlib.suppress(ConflictError):
            self._store.put_if_absent(f"{self.folder(step)}/{MANIFEST}", sealed)
        return entries


class KeepsNewestBlindly(CheckpointStore):
    """Keeps the newest manifests, whether or not there is anything behind them; asks nobody (the old retention)."""

    def retain(self, keep: int, best: int | None = None) -> list[int]:
        """Count manifests."""
        try:
            committed = [step for step in self.steps() if self._store.exists(f"{self.folder(step)}/{MANIFEST}")]
            old = [step for step in committed[:-keep] if step != best]
            for step in old:
                self._store.delete(f"{self.folder(step)}/{MANIFEST}")
                self._store.delete_prefix(self.folder(step))
        except LeptonError:
            return []
        return old


class ChecksThenCommits(CheckpointStore):
    """Asks for the fence once, before, and replaces what it has not read (the old commit)."""

    def commit(self, step: int, entries: Entries, facts: Mapping[str, Any]) -> Entries:
        """As it was."""
        manifest = {
            **facts, "format": FORMAT, "step": step, "attempt": self._attempt, "created_at": time.time(),
            "files": entries,
        }  # fmt: skip
        self._fence.check()
        sealed, key = _sealed(manifest), f"{self.folder(step)}/{MANIFEST}"
        try:
            self._store.put_if_absent(key, sealed)
        except ConflictError:
            try:
                self.load(step)
            except (IntegrityError, NotFoundError):
                self._store.replace(key, sealed, self._store.fetch(key).etag)
        return entries


class Unsealed(CheckpointStore):
    """Believes any manifest that is JSON."""

    def manifest(self, step: int) -> dict[str, Any]:
        """Whatever it says."""
        raw = self._store.get(f"{self.folder(step)}/{MANIFEST}")
        try:
            manifest = json.loads(raw)
            manifest.pop("manifest_sha256", None)
            return _checked(_sealed(manifest), step)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise IntegrityError("no manifest") from error

    def read(self, step: int, manifest: Mapping[str, Any], names: Iterable[str]) -> dict[str, bytes]:
        """What the manifest names, under the names that it gives."""
        return super().read(step, manifest, names)


class GivesUpRunAtConflict(RunLease):
    """Takes any conflict at a renewal for a take-over (the old renewal)."""

    def _swap(self, body: bytes) -> None:
        self._etag = self._store.replace(lease_key(self._run), body, self._etag)


class TakesFromTheLiving(RunLease):
    """Takes a lease over without waiting for its time to live."""

    @staticmethod
    def _wait_for_expiry(store: Any, run: str, *_: object) -> Any:
        return store.fetch(lease_key(run))


class SameAttempt(RunLease):
    """Takes a lease over under the number of the one before."""

    @classmethod
    def acquire(cls, store: Any, run: str, ttl_s: float = 15.0) -> RunLease:
        """The lease, with the old number where there is one."""
        lease = super().acquire(store, run, ttl_s)
        if lease.attempt > 1:
            lease.attempt -= 1
            lease._swap(cls._body(run, lease.attempt, ttl_s))
        return lease


class FinishesAnyhow(CheckpointWriter):
    """Says that the run is done whatever became of its last checkpoint."""

    def finish(self) -> None:
        """Wait, and hear nothing."""
        with contextlib.suppress(LeptonError):
            super().finish()


@dataclass(frozen=True)
class Variant:
    """One mistake."""

    parts: Parts
    faults: tuple[Kind, ...] = FAULTS
    """What its scenarios are drawn from."""
    seed: int = 0
    """Where `make test` begins to look: a scenario in which it showed."""


BROKEN: dict[str, Variant] = {
    "manifest before data": Variant(with_parts(checkpoints=ManifestFirst), seed=4),
    "no fencing": Variant(with_parts(checkpoints=Unfenced), seed=13),
    "no checksum on read": Variant(with_parts(checkpoints=Unchecked)),
    "size only": Variant(with_parts(checkpoints=SizeOnly)),
    "LATEST trusted": Variant(with_parts(checkpoints=LatestTrusted)),
    "lost answer taken as failure: cleaned up": Variant(with_parts(checkpoints=LostMeansFailed), seed=33),
    "lost answer taken as success": Variant(with_parts(checkpoints=LostMeansDone), seed=20),
    "retention counts what is damaged": Variant(with_parts(checkpoints=KeepsNewestBlindly)),
    "collection takes files of the running attempt": Variant(with_parts(checkpoints=CollectsAll), seed=14),
    "manifest overwritten": Variant(with_parts(checkpoints=Overwrites), seed=46),
    "data keys used again": Variant(with_parts(checkpoints=InPlace), seed=4),
    "damaged checkpoint left in its place": Variant(with_parts(checkpoints=FirstOnly)),
    "fence asked before the commit only": Variant(with_parts(checkpoints=ChecksThenCommits), seed=27),
    "lost renewal taken as a take-over": Variant(with_parts(lease=GivesUpRunAtConflict), seed=5),
    "lease taken from the living": Variant(with_parts(lease=TakesFromTheLiving), ("intruder",)),
    "take-over under the same attempt": Variant(with_parts(lease=SameAttempt)),
    "last checkpoint lost in silence": Variant(with_parts(writer=FinishesAnyhow), seed=11),
    "sample position one batch late": Variant(with_parts(position=lambda step, batch: (step + 1) * batch)),
    "sample position one batch early": Variant(with_parts(position=lambda step, batch: max(0, step - 1) * batch)),
    "epoch begun anew at a resume": Variant(with_parts(position=lambda _step, _batch: 0)),
}
"""What is wrong -> the parts that are wrong in that way."""
