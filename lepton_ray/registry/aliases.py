"""Aliases: small records that say which version is, for example, the champion; changed by compare-and-swap."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any

from lepton_ray.errors import ConflictError, IntegrityError, NotFoundError, shown
from lepton_ray.registry.manifest import from_json, now, to_json
from lepton_ray.registry.refs import MAX_NUMBER
from lepton_ray.storage import Store

TRIES = 5
"""How often a change is tried again when the record was rewritten but the alias did not move."""
HISTORY = 100
"""Newest changes kept in the record."""


@dataclass(frozen=True)
class Alias:
    """Where an alias points."""

    model: str
    alias: str
    version: int
    digest: str
    """Digest that the version had when the alias was moved to it."""
    updated_at: str
    """ISO 8601, UTC."""
    history: tuple[dict[str, Any], ...]
    """Changes, oldest first, the last one being the present: `version`, `digest`, `at`, `reason`."""

    def moved(self, version: int, digest: str, reason: str) -> Alias:
        """The record after a change now."""
        at = now()
        change = {"version": version, "digest": digest, "at": at, "reason": reason}
        return Alias(self.model, self.alias, version, digest, at, (*self.history, change)[-HISTORY:])

    def dump(self) -> bytes:
        """The bytes that are stored."""
        return to_json({**vars(self), "history": list(self.history)}, f"alias {self.model}@{self.alias}")


def alias_key(model: str, alias: str) -> str:
    """Where the record of an alias lies."""
    return f"models/{model}/aliases/{alias}.json"


def parse_alias(data: bytes, model: str, alias: str) -> Alias:
    """The record found under this name. Raises IntegrityError when it is damaged or of another alias."""
    where = f"alias {model}@{alias}"
    tree = from_json(data, where)
    version, digest, history = tree.get("version"), tree.get("digest"), tree.get("history")
    if (tree.get("alias"), tree.get("model")) != (alias, model):
        raise IntegrityError(f"{where}: says that it is of {shown(tree.get('model'))}@{shown(tree.get('alias'))}")
    if type(version) is not int or not 1 <= version <= MAX_NUMBER or not isinstance(digest, str):
        raise IntegrityError(f"{where}: damaged, version {shown(version)}; set it anew")
    if not isinstance(history, list) or not all(isinstance(change, dict) for change in history):
        raise IntegrityError(f"{where}: damaged, no history; set it anew")
    return Alias(model, alias, version, digest, str(tree.get("updated_at")), tuple(history))


def move_alias(store: Store, model: str, alias: str, version: int, digest: str, reason: str) -> int | None:
    """Point an alias at a version; returns where it pointed before, None where it is new.

    Raises ConflictError when somebody else moves it meanwhile: of several movers one wins, the others are told.
    """
    key = alias_key(model, alias)
    before: int | None = None
    for attempt in range(TRIES):
        record, etag = Alias(model, alias, 0, "", "", ()), None
        with contextlib.suppress(NotFoundError):
            stored = store.fetch(key)
            record, etag = parse_alias(stored.data, model, alias), stored.etag
        present = record.version or None
        if attempt == 0:
            before = present
        if (present, record.digest) == (version, digest):
            return before  # there already, perhaps by somebody with the same wish
        if present != before:
            break
        new = record.moved(version, digest, reason).dump()
        with contextlib.suppress(ConflictError):
            if etag is None:
                store.put_if_absent(key, new)
            else:
                store.replace(key, new, etag)
            return before
    raise ConflictError(f"alias {model}@{alias}: alias moved by somebody else meanwhile; look at it and decide anew")
