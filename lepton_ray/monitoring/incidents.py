"""Incidents: what went wrong in a run and what was done about it, one small JSON file each.

They lie under `runs/<run>/incidents/` and are never changed. The name holds time and kind, so that counting them needs
no reading. Whoever meets an incident reports it; a report that cannot be written is logged and forgotten.
"""

from __future__ import annotations

import json
import logging
import math
import re
import time
import uuid
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, get_args

from lepton_ray.errors import IntegrityError, LeptonError, NotFoundError, escaped
from lepton_ray.monitoring.runs import read_json
from lepton_ray.storage import Store

_log = logging.getLogger(__name__)

IncidentKind = Literal[
    "worker_lost", "error", "out_of_memory", "hang", "straggler", "divergence", "preempted", "no_progress", "storage"
]
INCIDENT_KINDS: tuple[str, ...] = get_args(IncidentKind)
MAX_INCIDENTS = 200
"""Newest incidents of a run that are read."""
MAX_TEXT = 32_768
"""Characters of one text in the evidence."""
MAX_EVIDENCE_BYTES = 2**20
MAX_REASON = 1000
_NAME = re.compile(r"(\d{13,16})-([a-z_]{1,32})-[0-9a-f]{8}\.json")


@dataclass(frozen=True, kw_only=True)
class Incident:
    """One thing that went wrong."""

    kind: IncidentKind
    reason: str
    """One sentence for people, with the rank and the figures."""
    at: float = field(default_factory=time.time)
    """Unix seconds."""
    attempt: int = 0
    """The driver's attempt at the run."""
    generation: int | None = None
    """The worker group; None where there was none, or it is not known."""
    rank: int | None = None
    """The rank it was about; None where it was about none or all."""
    step: int | None = None
    """Steps that were done."""
    evidence: dict[str, Any] = field(default_factory=dict)
    """What the reason rests on, as JSON has it: figures, readings, stacks."""

    @classmethod
    def parse(cls, value: Mapping[str, Any]) -> Incident:
        """The incident in a JSON object. ValueError naming the field that is missing or wrong."""
        kind, reason, at, evidence = (value.get(name) for name in ("kind", "reason", "at", "evidence"))
        if kind not in INCIDENT_KINDS:
            raise ValueError(f"kind: expected one of {', '.join(INCIDENT_KINDS)}")
        if not isinstance(at, int | float) or isinstance(at, bool) or not 0 <= at < 1e12:
            raise ValueError("at: expected unix seconds")
        if not isinstance(reason, str) or not isinstance(evidence, dict):
            raise ValueError("reason: expected a sentence, and evidence an object")  # noqa: TRY004 - one error class for all damage
        numbers = {name: _whole(value, name) for name in ("attempt", "generation", "rank", "step")}
        attempt = numbers.pop("attempt")
        return cls(
            kind=kind, reason=reason[:MAX_REASON], at=float(at), attempt=attempt or 0, evidence=evidence, **numbers
        )


def report(store: Store, run: str, incident: Incident) -> None:
    """Keep an incident with its run. Never raises: what cannot be written is logged."""
    try:
        content = {**asdict(incident), "reason": escaped(incident.reason, MAX_REASON)}
        content["evidence"] = _plain(content["evidence"])
        body = json.dumps(content, allow_nan=False)
        if len(body) > MAX_EVIDENCE_BYTES:
            content["evidence"] = {"left_out": f"{len(body)} bytes; at most {MAX_EVIDENCE_BYTES} are kept"}
            body = json.dumps(content, allow_nan=False)
        name = f"{round(incident.at * 1000):013}-{incident.kind}-{uuid.uuid4().hex[:8]}.json"
        store.put_if_absent(f"runs/{run}/incidents/{name}", body.encode())
    except Exception as error:  # noqa: BLE001 - monitoring never stops training
        _log.warning("run %s: incident %s was not written: %s", run, incident.kind, escaped(str(error)))


def incidents(store: Store, run: str) -> list[Incident]:
    """The newest incidents of a run, oldest first; at most MAX_INCIDENTS. Damaged ones are left out.

    Raises the store's errors where it is away.
    """
    found = []
    for name in _names(store, run)[-MAX_INCIDENTS:]:
        try:
            found.append(Incident.parse(read_json(store, f"runs/{run}/incidents/{name}")))
        except (ValueError, IntegrityError, NotFoundError) as error:
            _log.warning("run %s: incident %s is left out: %s", run, name, error)
    return found


def newest_of(store: Store, run: str, kind: IncidentKind) -> Incident | None:
    """The newest incident of a kind; None where there is none, or the store cannot give it. Reads one file."""
    try:
        names = [name for name in _names(store, run) if _kind(name) == kind]
        return Incident.parse(read_json(store, f"runs/{run}/incidents/{names[-1]}")) if names else None
    except (ValueError, LeptonError) as error:
        _log.warning("run %s: its newest incident could not be read: %s", run, error)
        return None


def count_incidents(store: Store, run: str) -> dict[str, int]:
    """Incidents of a run by kind, from their names alone; every kind is there."""
    counted = Counter(kind for name in _names(store, run) if (kind := _kind(name)))
    return {kind: counted[kind] for kind in INCIDENT_KINDS}


def summarised(store: Store, run: str) -> list[dict[str, Any]]:
    """The incidents of a run as JSON-able objects, oldest first; [] where the store cannot give them."""
    try:
        return [asdict(incident) for incident in incidents(store, run)]
    except LeptonError as error:
        _log.warning("run %s: incidents could not be read: %s", run, error)
        return []


def _names(store: Store, run: str) -> list[str]:
    """Names of the incident files, oldest first."""
    return sorted(name for name in store.list_names(f"runs/{run}/incidents") if _kind(name))


def _kind(name: str) -> str | None:
    found = _NAME.fullmatch(name)
    return found.group(2) if found and found.group(2) in INCIDENT_KINDS else None


def _whole(value: Mapping[str, Any], key: str) -> int | None:
    number = value.get(key)
    if number is not None and (not isinstance(number, int) or isinstance(number, bool) or number < 0):
        raise ValueError(f"{key}: expected a whole number or null")
    return number


def _plain(value: Any, depth: int = 8) -> Any:
    """A value as strict JSON has it: texts cut, numbers finite, anything else as text."""
    if isinstance(value, bool | int) or value is None:
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if depth and isinstance(value, Mapping):
        return {str(key)[:200]: _plain(inner, depth - 1) for key, inner in value.items()}
    if depth and isinstance(value, list | tuple | set | frozenset):
        return [_plain(inner, depth - 1) for inner in value]
    text = str(value)
    return text if len(text) <= MAX_TEXT else f"{text[:MAX_TEXT]} ... ({len(text)} characters)"
