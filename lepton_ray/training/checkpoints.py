"""Verified checkpoints: a checkpoint exists if and only if its manifest does, and is used only if its hashes hold.

`runs/<run>/checkpoints/step-<n>/<attempt>-<unique>/<file>` are written first, under keys that are never used again;
`runs/<run>/checkpoints/step-<n>/manifest.json` is the commit, written last and only where none is. Readers walk from
the newest step down, check size and SHA-256 of every file, fall back past what is torn, short or flipped, and say what
they skipped. No pickle: tensors are safetensors, the rest is JSON.
"""

from __future__ import annotations

import json
import logging
import re
import time
import uuid
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from lepton_ray.errors import (
    ConflictError,
    IntegrityError,
    LeptonError,
    NotFoundError,
    RefusedError,
    UnavailableError,
    shown,
)
from lepton_ray.storage import Store, sha256_hex
from lepton_ray.training.lease import Fence

_log = logging.getLogger(__name__)
MANIFEST = "manifest.json"
FORMAT = 1
TRIES = 10
"""How often a commit looks again where somebody else changes the same manifest."""
Entries = dict[str, dict[str, Any]]
"""File name -> `path` under the step's folder, `size` in bytes, `sha256`: what a manifest says of its files."""
_STEP = re.compile(r"step-([0-9]{12})")


@dataclass(frozen=True)
class LoadedCheckpoint:
    """A checkpoint whose every byte was verified."""

    step: int
    """Optimiser steps that were done."""
    files: dict[str, bytes]
    """Content by file name."""
    manifest: dict[str, Any]
    skipped: list[str] = field(default_factory=list)
    """Newer checkpoints that were passed over, each with the reason."""


class CheckpointStore:
    """The checkpoints of one run."""

    def __init__(self, store: Store, run: str, attempt: int) -> None:
        self._store, self._attempt = store, attempt
        self._prefix = f"runs/{run}/checkpoints"
        self._fence = Fence(store, run, attempt)
        self._verified: set[frozenset[str]] = set()
        """Paths of the files of checkpoints that were committed or read to the last byte here."""
        self._cleared: set[int] = set()
        """Steps of which nothing is left; some S3 servers go on to show their folders, more and more of them."""

    def folder(self, step: int) -> str:
        """Key prefix of the checkpoint of `step`."""
        return f"{self._prefix}/step-{step:012d}"

    def steps(self) -> list[int]:
        """Steps that have a folder, committed or not, ascending."""
        names = self._store.list_names(self._prefix)
        return sorted(int(found.group(1)) for name in names if (found := _STEP.fullmatch(name)))

    def save(self, step: int, files: Mapping[str, bytes], facts: Mapping[str, Any]) -> int:
        """Write the files, then commit them; returns the bytes written.

        Raises RefusedError where another attempt has taken the run over, UnavailableError where storage is away;
        in both cases nothing is committed and older checkpoints stand.
        """
        self.commit(step, self.write(step, files), facts)
        return sum(len(data) for data in files.values())

    def write(self, step: int, files: Mapping[str, bytes]) -> Entries:
        """Write files under keys that are never used again; what the manifest must say of them.

        They are no checkpoint before `commit`. Raises UnavailableError where storage is away.
        """
        unique = f"{self._attempt:06d}-{uuid.uuid4().hex[:12]}"
        entries: Entries = {}
        for name, data in files.items():
            self._store.put(f"{self.folder(step)}/{unique}/{name}", data)
            entries[name] = {"path": f"{unique}/{name}", "size": len(data), "sha256": sha256_hex(data)}
        return entries

    def commit(self, step: int, entries: Entries, facts: Mapping[str, Any]) -> Entries:
        """Make files that were written (by however many ranks) the checkpoint of `step`; the files that stand as it.

        A step that was committed before keeps that checkpoint if it holds; a damaged one is replaced. Raises as `save`
        does.
        """
        manifest = {
            **facts, "format": FORMAT, "step": step, "attempt": self._attempt, "created_at": time.time(),
            "files": entries,
        }  # fmt: skip
        self._fence.check()
        stands = self._place(step, _sealed(manifest), entries)
        # who took the run over meanwhile may have removed our files as orphans: nobody must rely on them
        self._fence.check()
        self._verified.add(_paths(stands))
        self._cleared.discard(step)
        return stands

    def _place(self, step: int, sealed: bytes, entries: Entries) -> Entries:
        """Write the manifest where none is, or in place of a damaged one; the entries of the one that stands."""
        key = f"{self.folder(step)}/{MANIFEST}"
        for _ in range(TRIES):
            try:
                self._store.put_if_absent(key, sealed)
            except ConflictError:
                try:
                    # judged and replaced by one etag: what somebody repairs meanwhile is not overwritten
                    found = self._store.fetch(key)
                except NotFoundError:
                    continue
                try:
                    manifest = _checked(found.data, step)
                    self._verify(step, manifest)
                except IntegrityError:
                    try:
                        self._store.replace(key, sealed, found.etag)
                    except ConflictError:
                        continue
                else:
                    return dict(manifest["files"])
            return entries
        raise UnavailableError(f"{key}: others changed it {TRIES} times in a row; is one run driven twice?")

    def newest(self) -> LoadedCheckpoint | None:
        """The newest checkpoint that verifies, or None where there is none.

        Raises UnavailableError where storage does not answer: that is no reason to start over.
        """
        skipped: list[str] = []
        for step in reversed(self.steps()):
            try:
                loaded = self.load(step)
            except NotFoundError:
                skipped.append(f"step {step}: not committed")
            except IntegrityError as error:
                skipped.append(f"step {step}: {error}")
            else:
                return LoadedCheckpoint(loaded.step, loaded.files, loaded.manifest, skipped)
        return LoadedCheckpoint(0, {}, {}, skipped) if skipped else None

    def load(self, step: int) -> LoadedCheckpoint:
        """The checkpoint of `step`.

        Raises NotFoundError without a manifest, IntegrityError for anything that is not what the manifest says.
        """
        manifest = self.manifest(step)
        return LoadedCheckpoint(step, self.read(step, manifest, manifest["files"]), manifest)

    def manifest(self, step: int) -> dict[str, Any]:
        """The verified manifest of `step`. Raises NotFoundError without one, IntegrityError for a damaged one."""
        return _checked(self._store.get(f"{self.folder(step)}/{MANIFEST}"), step)

    def read(self, step: int, manifest: Mapping[str, Any], names: Iterable[str]) -> dict[str, bytes]:
        """Some files of a checkpoint, each one verified.

        Raises IntegrityError for one that is missing or not what the manifest says.
        """
        files = {}
        for name in names:
            if name not in manifest["files"]:
                raise IntegrityError(f"{name} is not in {MANIFEST}")
            entry = manifest["files"][name]
            try:
                data = self._store.get(f"{self.folder(step)}/{entry['path']}")
            except NotFoundError as error:
                raise IntegrityError(f"{name} is missing") from error
            if len(data) != entry["size"]:
                raise IntegrityError(f"{name} has {len(data)} bytes, expected {entry['size']}")
            if sha256_hex(data) != entry["sha256"]:
                raise IntegrityError(f"{name} is not what was written (SHA-256 differs)")
            files[name] = data
        return files

    def retain(self, keep: int, best: int | None = None) -> list[int]:
        """Delete what is older than the newest `keep` checkpoints that hold, but that of step `best`; what was deleted.

        The manifest goes first, so that a checkpoint is never half there. Storage that is away or refuses is no error
        here. Raises RefusedError where another attempt has taken the run over.
        """
        deleted: list[int] = []
        try:
            held, old = 0, dict[int, list[str]]()
            for step in reversed(self.steps()):
                if held < keep:
                    held += self._holds(step)
                elif step != best and step not in self._cleared:
                    old[step] = self._store.list_names(self.folder(step))
            # asked after looking: whatever is deleted, down to its files, was old when the run was still ours
            self._fence.check()
            for step in sorted(step for step, names in old.items() if MANIFEST in names):
                self._store.delete(f"{self.folder(step)}/{MANIFEST}")
                deleted.append(step)
                for name in old[step]:
                    if name != MANIFEST:
                        self._store.delete_prefix(f"{self.folder(step)}/{name}")
                self._cleared.add(step)
            self._cleared.update(step for step, names in old.items() if not names)
        except RefusedError:
            raise
        except LeptonError as error:
            _log.warning("old checkpoints are not removed: %s", error)
        return deleted

    def _holds(self, step: int) -> bool:
        """Whether the checkpoint of `step` can be relied on.

        Manifest and sizes are looked at each time; every byte is read once of those that were not written here.
        """
        try:
            manifest = self.manifest(step)
            sizes = {entry.key: entry.size for entry in self._store.list(self.folder(step))}
            for entry in manifest["files"].values():
                if sizes.get(f"{self.folder(step)}/{entry['path']}") != entry["size"]:
                    return False
            if _paths(manifest["files"]) not in self._verified:
                self._verify(step, manifest)
        except (NotFoundError, IntegrityError):
            return False
        return True

    def _verify(self, step: int, manifest: Mapping[str, Any]) -> None:
        """Read every file, one at a time. Raises IntegrityError for one that is not what the manifest says."""
        for name in manifest["files"]:
            self.read(step, manifest, [name])
        self._verified.add(_paths(manifest["files"]))

    def collect_orphans(self) -> int:
        """Delete files that no manifest names, left by writers that died; returns how many.

        Only for the holder of the lease, before its workers start: files of the present attempt are never touched.
        """
        removed = 0
        for step in self.steps():
            folder = self.folder(step)
            try:
                named = {str(e["path"]) for e in _unsealed(self._store.get(f"{folder}/{MANIFEST}"))["files"].values()}
            except NotFoundError:
                named = set()
            except (ValueError, KeyError, TypeError, AttributeError):
                continue  # a damaged manifest: keep what lies there for whoever looks into it
            for entry in self._store.list(folder):
                path = entry.key.removeprefix(f"{folder}/")
                if path != MANIFEST and path not in named and not path.startswith(f"{self._attempt:06d}-"):
                    self._store.delete(entry.key)
                    removed += 1
        return removed


def weights_digest(manifest: Mapping[str, Any]) -> str:
    """SHA-256 that stands for the model in a checkpoint: of its file, or of the digests of its shards in order."""
    files = manifest["files"]
    if "model.safetensors" in files:
        return str(files["model.safetensors"]["sha256"])
    shards = [str(files[name]["sha256"]) for name in sorted(files) if name.startswith("model-rank")]
    return sha256_hex("\n".join(shards).encode())


def _paths(entries: Entries) -> frozenset[str]:
    """What tells one set of files from any other: their paths, which are never used again."""
    return frozenset(str(entry["path"]) for entry in entries.values())


def _checked(raw: bytes, step: int) -> dict[str, Any]:
    """The manifest of `step`. Raises IntegrityError for a damaged one."""
    try:
        manifest = _unsealed(raw)
        for entry in manifest["files"].values():
            entry["path"], entry["size"] = str(entry["path"]), int(entry["size"])
            entry["sha256"] = str(entry["sha256"])
        if manifest["format"] != FORMAT or manifest["step"] != step:
            raise ValueError(f"format {manifest['format']}, step {manifest['step']}")  # noqa: TRY301 - one sentence for all faults
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise IntegrityError(f"{MANIFEST} is damaged ({shown(error)})") from error
    return manifest


def _sealed(manifest: Mapping[str, Any]) -> bytes:
    """The manifest with its own SHA-256: a flipped bit in a file name must not go unseen either."""
    digest = sha256_hex(json.dumps(manifest, sort_keys=True).encode())
    return json.dumps({**manifest, "manifest_sha256": digest}, indent=1).encode()


def _unsealed(data: bytes) -> dict[str, Any]:
    """The manifest of sealed bytes. Raises ValueError or KeyError where it is not what was sealed."""
    manifest: dict[str, Any] = json.loads(data)
    digest = manifest.pop("manifest_sha256")
    if digest != sha256_hex(json.dumps(manifest, sort_keys=True).encode()):
        raise ValueError("its SHA-256 differs")
    return manifest
