"""The manifest of a model version: which files it has, their sizes and SHA-256. It is written last.

The SHA-256 of the manifest's own bytes is the version's digest: it names everything the version consists of.
"""

from __future__ import annotations

import datetime as dt
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lepton_ray.errors import IntegrityError, UsageError, shown
from lepton_ray.storage import sha256_hex

FORMAT = 1
NAME = "manifest.json"
WEIGHTS, CARD, TRANSFORMS = "model.safetensors", "model.json", "transforms.json"
FILES = (WEIGHTS, CARD, TRANSFORMS)
MAX_JSON_BYTES = 16 * 1024 * 1024
"""Longest card, transforms, manifest or alias record."""


@dataclass(frozen=True)
class FileEntry:
    """One file of a version."""

    size: int
    """Bytes."""
    sha256: str
    """64 lower-case hex digits."""


@dataclass(frozen=True)
class Manifest:
    """What a version consists of."""

    model: str
    number: int
    files: Mapping[str, FileEntry]
    created_at: str
    """ISO 8601, UTC."""

    @classmethod
    def of(cls, model: str, number: int, files: Mapping[str, bytes]) -> Manifest:
        """The manifest of these files, made now."""
        entries = {name: FileEntry(len(data), sha256_hex(data)) for name, data in sorted(files.items())}
        return cls(model, number, entries, now())

    def dump(self) -> bytes:
        """The bytes that are stored and hashed."""
        return to_json({"format": FORMAT, **self.to_dict()}, "manifest")

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        files = {name: {"size": entry.size, "sha256": entry.sha256} for name, entry in self.files.items()}
        return {"model": self.model, "number": self.number, "files": files, "created_at": self.created_at}

    @classmethod
    def parse(cls, data: bytes, model: str, number: int) -> Manifest:
        """The manifest found at version `number` of `model`.

        Raises IntegrityError when it is damaged, of an unknown format, incomplete or belongs to another version.
        """
        where = f"{NAME} of {model}:{number}"
        tree = from_json(data, where)
        if tree.get("format") != FORMAT:
            raise IntegrityError(f"{where}: format {shown(tree.get('format'))}; expected {FORMAT}")
        if (tree.get("model"), tree.get("number")) != (model, number) or type(tree["number"]) is not int:
            owner = f"{shown(tree.get('model'))}:{shown(tree.get('number'))}"
            raise IntegrityError(f"{where}: says that it is of {owner}; publish the version anew")
        files, created_at = tree.get("files"), tree.get("created_at")
        if not isinstance(files, dict) or not isinstance(created_at, str) or set(files) != set(FILES):
            raise IntegrityError(f"{where}: damaged, expected the files {', '.join(FILES)} and created_at")
        return cls(model, number, {name: _file_entry(where, name, files[name]) for name in FILES}, created_at)

    def check(self, name: str, data: bytes) -> None:
        """Raise IntegrityError, naming the file, unless `data` is what the manifest says of it."""
        expected = self.files[name]
        where = f"file {name} of model version {self.model}:{self.number}"
        if len(data) != expected.size:
            raise IntegrityError(f"{where}: {len(data)} bytes, the manifest says {expected.size}; publish it anew")
        found = sha256_hex(data)
        if found != expected.sha256:
            raise IntegrityError(
                f"{where}: SHA-256 {found[:12]}..., the manifest says {expected.sha256[:12]}...; publish it anew"
            )


def _file_entry(where: str, name: str, fields: Any) -> FileEntry:
    if isinstance(fields, dict) and set(fields) == {"size", "sha256"}:
        size, digest = fields["size"], fields["sha256"]
        if type(size) is int and size >= 0 and isinstance(digest, str) and re.fullmatch(r"[0-9a-f]{64}", digest):
            return FileEntry(size, digest)
    raise IntegrityError(f"{where}: damaged, {name} has {shown(fields)}; expected size and sha256")


def now() -> str:
    """The time now: ISO 8601, UTC, whole milliseconds."""
    return dt.datetime.now(dt.UTC).isoformat(timespec="milliseconds")


def to_json(value: Mapping[str, Any], what: str) -> bytes:
    """JSON with sorted keys, equal for equal values. Raises UsageError for NaN, infinity and what JSON cannot hold."""
    try:
        data = (json.dumps(value, indent=2, sort_keys=True, allow_nan=False) + "\n").encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise UsageError(f"{what}: cannot be stored as JSON, {shown(str(error))}; give plain finite values") from error
    if len(data) > MAX_JSON_BYTES:
        raise UsageError(f"{what}: {len(data)} bytes of JSON; expected at most {MAX_JSON_BYTES}")
    return data


def from_json(data: bytes, what: str) -> dict[str, Any]:
    """The object in JSON bytes from the store. Raises IntegrityError."""
    try:
        if len(data) > MAX_JSON_BYTES:
            raise ValueError(f"{len(data)} bytes")  # noqa: TRY301 - told like the other faults of the bytes
        tree = json.loads(data.decode())
    except (ValueError, RecursionError) as error:
        raise IntegrityError(f"{what}: damaged, {shown(str(error))}") from error
    if not isinstance(tree, dict):
        raise IntegrityError(f"{what}: damaged, expected a JSON object")
    return tree
