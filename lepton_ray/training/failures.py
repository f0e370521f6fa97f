"""What a failure was: one kind and one line, from the errors that Ray Train hands over for each rank.

When one rank fails, the others fail in its wake: their collective breaks. So the cause is looked for among all, and
what is only a consequence is told where nothing else is known. Classes are known by their names: this module is read by
the driver, which imports no Ray Train.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lepton_ray.errors import (
    ConflictError,
    LeptonError,
    NotFoundError,
    RefusedError,
    UnavailableError,
    UsageError,
    escaped,
)
from lepton_ray.training.failure_policy import Failure, FailureKind

LONGEST_WORDS = 300
_WRAPPERS = (
    ("UserExceptionWithTraceback", "_base_exc"),
    ("WorkerHealthCheckFailedError", "health_check_failure"),
    ("RayTaskError", "cause"),
    ("ControllerError", "controller_failure"),
)
"""Ray's classes that carry the error itself in an attribute."""
_CONSEQUENCES = (
    "gloo", "Connection closed by peer", "Connection reset by peer", "Broken pipe", "remote process exited",
    "ncclRemoteError", "ncclSystemError", "recvValue failed", "Socket Timeout",
)  # fmt: skip
"""What a collective says when another rank is gone."""
_MEMORY = ("out of memory", "can't allocate memory", "Cannot allocate memory", "std::bad_alloc")
_ORDER = ("preempted", "resize", "out_of_memory", "divergence", "hang", "storage", "error", "worker_lost", "waiting")
"""Of several ranks' errors the first of these is the cause. An error of the code comes before a lost worker, since
libraries end their process when a collective breaks; a process that memory ran out for comes before both."""
_PROCESS = re.compile(r"\bpid: (\d+)")
_NODE = re.compile(r"\bip: ([0-9a-fA-F.:]+)")
_NODE_GONE = re.compile(r"\bnode\b.*\b(died|dead|terminated)\b", re.IGNORECASE)
_EXIT = re.compile(r"Worker exit type: (\w+)")


@dataclass(frozen=True)
class _Cause:
    """What one rank's error says."""

    kind: FailureKind
    words: str
    final: bool = False
    consequence: bool = False


def classify(
    error: BaseException, *, step: int | None = None, at: float = 0.0, out_of_memory: Mapping[int, str] | None = None
) -> Failure:
    """What a run's error was.

    Args:
        error: what Ray Train's controller has: of the worker group, the controller or a preemption.
        step: the newest step that the run is known to have done.
        at: when it was seen, in seconds of the clock that `failure_policy.decide` is given.
        out_of_memory: ranks in whose cgroup the kernel ended a process for its memory, with the figures.
    """
    if _is(error, "PreemptionError"):
        return Failure("preempted", None, step, _line(error), at)
    ranks = dict(getattr(error, "worker_failures", None) or {})
    if not ranks:
        cause = _cause(error, None)
        if _is(error, "ControllerError") and not _again(error):
            cause = _Cause(cause.kind, cause.words, final=True)
        return Failure(cause.kind, None, step, cause.words, at, cause.final)
    seen = {rank: _cause(each, (out_of_memory or {}).get(rank)) for rank, each in ranks.items()}
    number, cause = min(seen.items(), key=lambda item: (item[1].consequence, _ORDER.index(item[1].kind), item[0]))
    if cause.kind in ("preempted", "resize"):
        return Failure(cause.kind, None, step, cause.words, at)
    if cause.consequence:  # whoever closed the connection has not been seen yet
        return Failure("worker_lost", None, step, f"rank {number} failed: {cause.words}", at)
    return Failure(cause.kind, number, step, f"rank {number} failed: {cause.words}", at, cause.final)


def explain(error: BaseException) -> str:
    """The cause of a failed run in one line: the error of the rank that failed first, not of those who waited."""
    return classify(error).words


def words_of_ranks(error: BaseException) -> dict[str, str]:
    """What each rank said, in one line each, by its number as text."""
    ranks = dict(getattr(error, "worker_failures", None) or {})
    return {str(rank): _cause(each, None).words for rank, each in sorted(ranks.items())}


def _cause(error: BaseException, out_of_memory: str | None) -> _Cause:
    cause = _unwrapped(error)
    found = _of_ray(error) or _of_memory(cause, out_of_memory) or _of_process(cause) or _of_ours(cause)
    return found or _Cause("error", _line(cause), consequence=_in_the_wake(cause))


def _of_ray(error: BaseException) -> _Cause | None:
    """What Ray Train itself found: a rank that does not answer, a group that did not start."""
    if _is(error, "WorkerHealthCheckTimeoutError") or _is(error, "NCCLHangError"):
        return _Cause("hang", _first(error))
    start = _inner(error, "controller_failure") if _is(error, "ControllerError") else None
    if _is(start, "WorkerGroupStartupTimeoutError"):
        return _Cause("waiting", _first(start))
    return _Cause("worker_lost", _line(start)) if _is(start, "WorkerGroupStartupFailedError") else None


def _of_memory(cause: BaseException, out_of_memory: str | None) -> _Cause | None:
    """The kernel's, Ray's, a GPU's or an allocator's word that there is no memory left."""
    if out_of_memory is not None and _is(cause, "RayActorError"):
        return _Cause("out_of_memory", f"out of memory: {out_of_memory}")
    refused = isinstance(cause, RuntimeError) and any(word in str(cause) for word in _MEMORY)
    if refused or isinstance(cause, MemoryError) or _is(cause, "OutOfMemoryError"):
        return _Cause("out_of_memory", f"out of memory: {_first(cause)}")
    return None


def _of_process(cause: BaseException) -> _Cause | None:
    """A process that is gone, or is about to be taken away."""
    if _is(cause, "MadeRoom"):
        return _Cause("resize", _line(cause))
    if _is(cause, "Preempted") or getattr(cause, "preempted", False) is True:
        return _Cause("preempted", _line(cause))
    lost = any(_is(cause, name) for name in ("RayActorError", "NodeDiedError", "WorkerCrashedError"))
    return _Cause("worker_lost", _death(cause)) if lost else None


def _of_ours(cause: BaseException) -> _Cause | None:
    """An error of the framework, which says what it is."""
    if _is(cause, "Diverged"):
        return _Cause("divergence", _line(cause))
    if isinstance(cause, UnavailableError):
        return _Cause("storage", _line(cause))
    if not isinstance(cause, LeptonError):
        return None
    stays = isinstance(cause, UsageError | NotFoundError | RefusedError) and not isinstance(cause, ConflictError)
    return _Cause("error", _line(cause), final=stays)


def _again(error: BaseException) -> bool:
    """Whether an error of the controller is one of those that starting the group once more may cure."""
    inner = _inner(error, "controller_failure")
    return _is(inner, "WorkerGroupStartupFailedError") or _is(inner, "WorkerGroupStartupTimeoutError")


def _in_the_wake(cause: BaseException) -> bool:
    named = any(kind.__name__ in ("DistError", "DistBackendError", "DistNetworkError") for kind in type(cause).__mro__)
    return named or any(word in str(cause) for word in _CONSEQUENCES)


def _death(cause: BaseException) -> str:
    """How a process ended, from what Ray says: its own list of what may have been the reason is the same each time."""
    text = str(cause)
    if getattr(cause, "actor_init_failed", False) is True:
        return f"its process did not start: {_line(cause)}"
    process, node, how = _PROCESS.search(text), _NODE.search(text), _EXIT.search(text)
    place = ", ".join(
        part for part in (f"pid {process.group(1)}" if process else "", f"on {node.group(1)}" if node else "") if part
    )
    if _NODE_GONE.search(text):
        return f"its node is gone ({place})" if place else f"its node is gone: {_line(cause)}"
    if not place:
        return _line(cause)
    if how is not None and how.group(1) != "SYSTEM_ERROR":
        return f"its process ended, {how.group(1)} ({place})"
    return f"its process was killed or crashed ({place})"


def _unwrapped(error: BaseException) -> BaseException:
    for _ in range(8):
        inner = next((found for name, at in _WRAPPERS if _is(error, name) and (found := _inner(error, at))), None)
        if inner is None:
            return error
        error = inner
    return error


def _inner(error: BaseException | None, attribute: str) -> BaseException | None:
    found: Any = getattr(error, attribute, None)
    return found if isinstance(found, BaseException) else None


def _is(error: BaseException | None, name: str) -> bool:
    return any(kind.__name__ == name for kind in type(error).__mro__)


def _line(error: BaseException | None) -> str:
    """The last line of an error: where libraries print a traceback in front, that is what happened."""
    lines = [line for line in str(error).strip().splitlines() if line.strip()]
    return escaped(lines[-1], LONGEST_WORDS) if lines else type(error).__name__


def _first(error: BaseException | None) -> str:
    """The first line of an error that goes on with advice."""
    lines = [line for line in str(error).strip().splitlines() if line.strip()]
    return escaped(lines[0], LONGEST_WORDS) if lines else type(error).__name__
