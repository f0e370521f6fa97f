"""What disks do to files that were good once, and a look at what is stored that trusts no code under test."""

from __future__ import annotations

import json
import random
import re
from typing import Any

from chain import digest_of_files
from scenario import Damage

from lepton_ray.errors import NotFoundError
from lepton_ray.storage import Store, sha256_hex

_MANIFEST = re.compile(r".*/step-([0-9]+)/manifest\.json")


def committed(store: Store, run: str) -> list[int]:
    """Steps that have a manifest, ascending."""
    found = [_MANIFEST.fullmatch(entry.key) for entry in store.list(f"runs/{run}/checkpoints")]
    return sorted(int(match.group(1)) for match in found if match)


def flipped(data: bytes, draw: random.Random) -> bytes:
    """The same bytes but for one bit."""
    bad = bytearray(data)
    bad[draw.randrange(len(bad))] ^= 1 << draw.randrange(8)
    return bytes(bad)


def inflict(store: Store, run: str, step: int, kind: Damage, draw: random.Random) -> str:
    """Damage the checkpoint of a step; returns the key that was hit."""
    folder = f"runs/{run}/checkpoints/step-{step:012d}"
    keys = [entry.key for entry in store.list(folder)]
    files = [key for key in keys if not key.endswith("/manifest.json")]
    key = f"{folder}/manifest.json" if kind.endswith("_manifest") or not files else draw.choice(files)
    data = store.get(key)
    if kind == "delete":
        store.delete(key)
    elif kind == "empty":
        store.put(key, b"")
    elif kind.startswith("truncate"):
        store.put(key, data[: draw.randrange(max(1, len(data)))])
    else:
        store.put(key, flipped(data, draw) if data else b"\x01")
    return key


def look(store: Store, run: str) -> dict[str, Any]:
    """What is stored of a run: by step, which content its manifest stands for and whether every byte is there.

    `steps` holds for each manifest `attempt`, `digest` of the bytes found, `whole`; `strays` counts files that no
    manifest names and that a collection should have removed.
    """
    prefix = f"runs/{run}/checkpoints"
    keys = {entry.key for entry in store.list(prefix)}
    steps: dict[str, Any] = {}
    strays: set[str] = {key for key in keys if not key.endswith("/manifest.json")}
    for key in sorted(keys):
        if not (found := _MANIFEST.fullmatch(key)):
            continue
        folder = key.removesuffix("/manifest.json")
        strays = {stray for stray in strays if not stray.startswith(f"{folder}/")}
        steps[str(int(found.group(1)))] = checkpoint = _checkpoint(store, folder)
        if checkpoint["whole"]:  # beside a damaged one everything is left for whoever looks
            strays |= _unnamed(store, folder, keys)
    return {"steps": steps, "strays": len(strays)}


def _unnamed(store: Store, folder: str, keys: set[str]) -> set[str]:
    """Files beside a manifest that it does not name."""
    entries = json.loads(store.get(f"{folder}/manifest.json"))["files"].values()
    named = {f"{folder}/{entry['path']}" for entry in entries} | {f"{folder}/manifest.json"}
    return {key for key in keys if key.startswith(f"{folder}/")} - named


def _checkpoint(store: Store, folder: str) -> dict[str, Any]:
    try:
        manifest = json.loads(store.get(f"{folder}/manifest.json"))
        files, whole = {}, True
        for name, entry in manifest["files"].items():
            data = store.get(f"{folder}/{entry['path']}")
            whole = whole and (len(data), sha256_hex(data)) == (entry["size"], entry["sha256"])
            files[name] = data
        return {"attempt": manifest["attempt"], "digest": digest_of_files(files), "whole": whole}
    except (ValueError, KeyError, TypeError, AttributeError, NotFoundError) as error:
        return {"attempt": _attempt(store, folder), "digest": None, "whole": False, "why": str(error)[:120]}


def _attempt(store: Store, folder: str) -> int | None:
    """Whose manifest it is, as far as it can be read."""
    try:
        return int(json.loads(store.get(f"{folder}/manifest.json"))["attempt"])
    except (ValueError, KeyError, TypeError, AttributeError, NotFoundError):
        return None
