"""The registry: versions of models in the store, found by name, number or alias."""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from lepton_ray.errors import ConflictError, IntegrityError, NotFoundError, RefusedError, UsageError, shown
from lepton_ray.registry.aliases import alias_key, move_alias, parse_alias
from lepton_ray.registry.manifest import (
    CARD,
    NAME,
    TRANSFORMS,
    WEIGHTS,
    Manifest,
    from_json,
    now,
    to_json,
)
from lepton_ray.registry.refs import Ref, checked_name, checked_number, parse_ref
from lepton_ray.registry.weights import check_weights
from lepton_ray.storage import Store, sha256_hex

CHAMPION = "champion"
"""The alias that a bare model name means, where it is set."""
CLAIMS = 1000
"""Version numbers tried in a row when others publish at the same time."""
MAX_REASON = 1000
_MANIFEST_KEY = re.compile(r"models/(?P<model>[^/]+)/versions/(?P<number>[1-9][0-9]{0,8})/manifest\.json", re.ASCII)


@dataclass(frozen=True)
class ModelVersion:
    """A published version: immutable, named by its digest."""

    model: str
    number: int
    digest: str
    """SHA-256 of the manifest's bytes."""
    card: dict[str, Any]
    """`model.json`: task, metrics, lineage, framework."""

    @property
    def ref(self) -> str:
        """The reference that always means this version, e.g. `digits:3`."""
        return f"{self.model}:{self.number}"


@dataclass(frozen=True)
class LoadedVersion:
    """The content of a version, verified."""

    card: dict[str, Any]
    transforms: dict[str, Any]
    weights: bytes
    """safetensors."""


class Registry:
    """Model versions under `models/` of a store.

    A version exists once its manifest does, which is written last; a number that was claimed by a publisher that died
    is never used again.
    """

    def __init__(self, store: Store) -> None:
        self._store = store

    def publish(
        self, model: str, *, weights: bytes, card: Mapping[str, Any], transforms: Mapping[str, Any]
    ) -> ModelVersion:
        """Store a new version; the card gets `model`, `version` and, where it has none, `created_at`.

        Raises UsageError or RefusedError, before anything is written, for weights that are not sound safetensors with
        finite values and for a card or transforms that are not plain JSON.
        """
        checked_name("model", model)
        check_weights(weights)
        transforms_data = to_json(transforms, "transforms")
        to_json(card, "card")  # told before a number is claimed
        number = self._claim(model)
        full_card = {"created_at": now(), **card, "model": model, "version": number}
        files = {WEIGHTS: weights, TRANSFORMS: transforms_data, CARD: to_json(full_card, "card")}
        for name, data in files.items():
            self._store.put(_key(model, number, name), data)
        manifest = Manifest.of(model, number, files).dump()
        self._store.put_if_absent(_key(model, number, NAME), manifest)
        return ModelVersion(model, number, sha256_hex(manifest), from_json(files[CARD], "card"))

    def resolve(self, ref: str) -> ModelVersion:
        """The version that a reference means: `digits` its champion, else its newest; `digits@alias`; `digits:3`.

        Raises UsageError for a malformed reference, NotFoundError naming what there is instead, IntegrityError when
        the alias, the manifest or the card is damaged.
        """
        parsed = parse_ref(ref)
        numbers = self.numbers(parsed.model)
        if not numbers:
            there = _some(self.models())
            raise NotFoundError(
                f"model {shown(parsed.model)}: no version in store {self._store.uri}; models there: {there}"
            )
        if parsed.number is not None:
            return self.version(parsed.model, parsed.number)
        alias = parsed.alias
        if alias is None and self._store.exists(alias_key(parsed.model, CHAMPION)):
            alias = CHAMPION
        if alias is None:
            return self.version(parsed.model, numbers[-1])
        return self._version_of_alias(Ref(parsed.model, alias))

    def version(self, model: str, number: int) -> ModelVersion:
        """One version by its number, manifest and card verified. Raises NotFoundError naming those that there are."""
        checked_name("model", model)
        try:
            data = self._store.get(_key(model, checked_number(model, number), NAME))
        except NotFoundError as error:
            there = _some(str(number) for number in self.numbers(model))
            raise NotFoundError(
                f"model {shown(model)}: no version {number} in store {self._store.uri}; versions there: {there}"
            ) from error
        manifest = Manifest.parse(data, model, number)
        card = from_json(self._read(manifest, CARD), f"file {CARD} of model version {model}:{number}")
        return ModelVersion(model, number, sha256_hex(data), card)

    def models(self) -> list[str]:
        """Names of all models that have a version, sorted."""
        return sorted(self._published("models"))

    def numbers(self, model: str) -> list[int]:
        """Numbers of all versions of a model, ascending; none for a model that does not exist."""
        checked_name("model", model)
        return sorted(self._published(f"models/{model}/versions").get(model, []))

    def versions(self, model: str) -> list[ModelVersion]:
        """All versions of a model by ascending number. Raises IntegrityError for the first damaged one."""
        return [self.version(model, number) for number in self.numbers(model)]

    def aliases(self, model: str) -> dict[str, int]:
        """The version number behind each alias of a model."""
        checked_name("model", model)
        names = [name.removesuffix(".json") for name in self._store.list_names(f"models/{model}/aliases")]
        return {name: parse_alias(self._store.get(alias_key(model, name)), model, name).version for name in names}

    def set_alias(self, model: str, alias: str, number: int, *, reason: str = "") -> int | None:
        """Point an alias at a version, every file of which is verified first; returns the number it had before.

        Raises RefusedError for a version that is missing or damaged, ConflictError when somebody else moves the alias
        at the same time.
        """
        checked_name("alias", alias)
        if len(reason) > MAX_REASON:
            raise UsageError(f"reason {shown(reason)}: {len(reason)} characters; expected at most {MAX_REASON}")
        try:
            version = self.version(model, number)
            self.verify(version)
        except (NotFoundError, IntegrityError) as error:
            raise RefusedError(f"alias {model}@{alias} stays as it is: {error}") from error
        return move_alias(self._store, model, alias, number, version.digest, reason)

    def verify(self, version: ModelVersion) -> None:
        """Read and hash every file. Raises IntegrityError naming the file that is not what the manifest says."""
        self._load(version)

    def load(self, version: ModelVersion) -> LoadedVersion:
        """The content of a version, every byte verified. Raises IntegrityError naming the file."""
        files = self._load(version)
        where = f"of model version {version.ref}"
        return LoadedVersion(
            card=from_json(files[CARD], f"file {CARD} {where}"),
            transforms=from_json(files[TRANSFORMS], f"file {TRANSFORMS} {where}"),
            weights=files[WEIGHTS],
        )

    def manifest(self, version: ModelVersion) -> Manifest:
        """The manifest of a version. Raises IntegrityError unless it is the one with the version's digest."""
        try:
            data = self._store.get(_key(version.model, version.number, NAME))
        except NotFoundError as error:
            raise IntegrityError(f"{NAME} of model version {version.ref}: missing; publish it anew") from error
        found = sha256_hex(data)
        if found != version.digest:
            raise IntegrityError(
                f"{NAME} of model version {version.ref}: SHA-256 {found[:12]}..., expected {version.digest[:12]}..."
            )
        return Manifest.parse(data, version.model, version.number)

    def _load(self, version: ModelVersion) -> dict[str, bytes]:
        """All files of a version, verified."""
        manifest = self.manifest(version)
        return {name: self._read(manifest, name) for name in manifest.files}

    def _read(self, manifest: Manifest, name: str) -> bytes:
        """One file, verified."""
        try:
            data = self._store.get(_key(manifest.model, manifest.number, name))
        except NotFoundError as error:
            where = f"file {name} of model version {manifest.model}:{manifest.number}"
            raise IntegrityError(f"{where}: missing; publish it anew") from error
        manifest.check(name, data)
        return data

    def _version_of_alias(self, ref: Ref) -> ModelVersion:
        """The version behind `ref.alias`, its digest being the one that the alias was set to."""
        alias = str(ref.alias)
        try:
            record = parse_alias(self._store.get(alias_key(ref.model, alias)), ref.model, alias)
        except NotFoundError as error:
            there = _some(sorted(self.aliases(ref.model)))
            raise NotFoundError(
                f"model {shown(ref.model)}: no alias {shown(alias)} in store {self._store.uri}; aliases there: {there}"
            ) from error
        version = self.version(ref.model, record.version)
        if version.digest != record.digest:
            raise IntegrityError(
                f"alias {ref.model}@{alias}: was set to digest {shown(record.digest[:12])}..., but {version.ref} has "
                f"{version.digest[:12]}...; verify the version and set the alias anew"
            )
        return version

    def _published(self, prefix: str) -> dict[str, list[int]]:
        """The version numbers of each model, from one listing."""
        found: dict[str, list[int]] = {}
        for entry in self._store.list(prefix):
            match = _MANIFEST_KEY.fullmatch(entry.key)
            if match:
                found.setdefault(match["model"], []).append(int(match["number"]))
        return found

    def _claim(self, model: str) -> int:
        """A version number that nobody else has or ever had: the next above the highest."""
        claim = to_json({"host": socket.gethostname(), "pid": os.getpid(), "claimed_at": now()}, "claim")
        names = self._store.list_names(f"models/{model}/versions")
        highest = max((int(name) for name in names if re.fullmatch(r"[1-9][0-9]{0,8}", name, re.ASCII)), default=0)
        for number in range(highest + 1, highest + 1 + CLAIMS):
            try:
                self._store.put_if_absent(_key(model, checked_number(model, number), "claim.json"), claim)
            except ConflictError:
                continue
            return number
        raise ConflictError(f"model {shown(model)}: {CLAIMS} version numbers were taken by others; try again")


def _key(model: str, number: int, name: str) -> str:
    """Where a file of a version lies."""
    return f"models/{model}/versions/{number}/{name}"


def _some(names: Iterable[str], limit: int = 10) -> str:
    """A few names for a message."""
    listed = list(names)
    more = f" and {len(listed) - limit} more" if len(listed) > limit else ""
    return ", ".join(listed[-limit:]) + more if listed else "none"
