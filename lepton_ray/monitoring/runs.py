"""Reading run folders: records, rank entries and spec, each checked and bounded."""

from __future__ import annotations

import difflib
import json
import re
from dataclasses import replace
from typing import Any

from lepton_ray.errors import IntegrityError, NotFoundError, shown
from lepton_ray.monitoring.goodput import Goodput, goodput
from lepton_ray.monitoring.ledger import RankEntry, seconds
from lepton_ray.settings.tree import NAME_PATTERN
from lepton_ray.storage import Store

MAX_JSON_BYTES = 4 * 2**20
"""Longest JSON file that is read here: 4 MiB."""


def is_name(text: str) -> bool:
    """Whether `text` can be the name of a run or endpoint."""
    return re.fullmatch(NAME_PATTERN, text) is not None


def read_json(store: Store, key: str) -> dict[str, Any]:
    """The JSON object under `key`. NotFoundError, or IntegrityError where it is no JSON object of bearable size."""
    data = store.get(key)
    if len(data) > MAX_JSON_BYTES:
        raise IntegrityError(f"{shown(key)}: {len(data)} bytes; expected at most {MAX_JSON_BYTES}")
    try:
        value = json.loads(data, parse_constant=lambda _: None)  # NaN and infinities are no JSON: absent
    except (ValueError, RecursionError) as error:
        raise IntegrityError(f"{shown(key)}: is not JSON; restore it from a copy or delete it") from error
    if not isinstance(value, dict):
        raise IntegrityError(f"{shown(key)}: holds {shown(value)}; expected a JSON object")
    return value


def list_runs(store: Store) -> list[str]:
    """Names of the runs in a store, sorted."""
    return [name for name in store.list_names("runs") if is_name(name)]


def read_record(store: Store, run: str) -> dict[str, Any]:
    """The record of a run. NotFoundError naming near runs; IntegrityError for a damaged record."""
    if not is_name(run):
        raise NotFoundError(f"run {shown(run)}: is no name of a run; see lepton-ray runs list")
    key = f"runs/{run}/record.json"
    try:
        record = read_json(store, key)
    except NotFoundError as error:
        near = difflib.get_close_matches(run, list_runs(store), n=1)
        hint = f"did you mean {near[0]!r}?" if near else "see lepton-ray runs list"
        raise NotFoundError(f"run {shown(run)}: not found in store {store.uri}; {hint}") from error
    try:
        goodput(record, ())  # its times and workers are what everything here needs
    except ValueError as error:
        raise IntegrityError(f"{key}: {error}; restore the record from a copy") from error
    return record


def read_entries(store: Store, run: str) -> tuple[list[RankEntry], int]:
    """All rank entries of a run, and how many files were skipped as damaged."""
    entries, skipped = [], 0
    for found in store.list(f"runs/{run}/ledger"):
        try:
            entries.append(RankEntry.parse(read_json(store, found.key)))
        except (ValueError, IntegrityError, NotFoundError):
            skipped += 1
    return entries, skipped


def driver_alive_at(store: Store, run: str, record: dict[str, Any]) -> float:
    """When the driver of the newest attempt last renewed its lease, unix seconds; 0 where that is not known."""
    try:
        lease = read_json(store, f"runs/{run}/lease.json")
        attempts = record.get("attempts") or [{}]
        newest = attempts[-1].get("attempt") == lease.get("attempt") and lease.get("released") is False
        return seconds(lease, "renewed_at") if newest else 0.0
    except (IntegrityError, NotFoundError, ValueError, TypeError, AttributeError, LookupError):
        return 0.0


def run_goodput(store: Store, run: str, record: dict[str, Any], now: float | None = None) -> Goodput:
    """The goodput of a run from its folder; see `goodput`."""
    entries, skipped = read_entries(store, run)
    found = goodput(record, entries, now, driver_alive_at(store, run, record))
    return replace(found, skipped=found.skipped + skipped)
