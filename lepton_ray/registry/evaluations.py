"""What is known of a model version beside its own card: how its run split the rows, and later evaluations of it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from lepton_ray.errors import ConflictError, IntegrityError, NotFoundError, UsageError
from lepton_ray.registry.manifest import from_json, now, to_json
from lepton_ray.registry.registry import ModelVersion
from lepton_ray.settings.loading import describe_errors, parse_yaml
from lepton_ray.settings.tree import SplitSettings
from lepton_ray.storage import Store, sha256_hex

_FILE = re.compile(r"[-a-z0-9_]{1,200}\.json")


def trained_split(store: Store, card: Mapping[str, Any]) -> SplitSettings | None:
    """How the run that trained a version split its table; None where that is not known any more.

    Raises IntegrityError where the run's settings are damaged.
    """
    run = (card.get("lineage") or {}).get("run")
    if not isinstance(run, str):
        return None
    key = f"runs/{run}/spec.yaml"
    try:
        data = store.get(key)
    except NotFoundError:
        return None
    try:
        told = (parse_yaml(data.decode(), key).get("data") or {}).get("split") or {}
        return SplitSettings.model_validate(told)
    except ValidationError as error:
        raise IntegrityError(f"{key}: data.split: {describe_errors(error, SplitSettings)}") from error
    except (AttributeError, UnicodeDecodeError, UsageError) as error:
        raise IntegrityError(f"{key}: damaged; restore it from a backup, or evaluate with --split all") from error


def store_evaluation(store: Store, version: ModelVersion, evaluation: Mapping[str, Any]) -> tuple[str, bool]:
    """Keep an evaluation of a version under `models/<name>/evaluations/<number>/`; nothing there is ever overwritten.

    Args:
        store: where the version is.
        version: what was evaluated.
        evaluation: plain JSON with at least `table` (`name@version`), `split` and `metrics`.

    Returns:
        Its key, and whether it is new: the same figures for the same rows are kept once.
    """
    record = {"model": version.ref, "digest": version.digest, **evaluation}
    # made of what was evaluated and what came out, not of when: the same again has the same name
    digest = sha256_hex(to_json(record, "evaluation"))
    table = str(evaluation["table"]).replace("@", "-v")
    key = f"{_folder(version)}/{table}-{evaluation['split']}-{digest[:12]}.json"
    try:
        store.put_if_absent(key, to_json({**record, "created_at": now()}, "evaluation"))
    except ConflictError:
        return key, False
    return key, True


def evaluations_of(store: Store, version: ModelVersion) -> list[dict[str, Any]]:
    """All stored evaluations of a version, oldest first. Raises IntegrityError for a damaged one."""
    folder = _folder(version)
    names = [name for name in store.list_names(folder) if _FILE.fullmatch(name)]
    found = [from_json(store.get(f"{folder}/{name}"), f"{folder}/{name}") for name in sorted(names)]
    return sorted(found, key=lambda each: str(each.get("created_at")))


def _folder(version: ModelVersion) -> str:
    return f"models/{version.model}/evaluations/{version.number}"
