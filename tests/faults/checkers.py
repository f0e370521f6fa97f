"""What must hold of any history, whatever was done to the run: pure functions from events to violations in words.

None of them knows the code under test. Times are compared as a linearisable register's would be: an act lies somewhere
between its start and its end, and one without a clear answer may show at any time from its start on.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from history import KEPT, OK, Event

Events = Sequence[Event]


def acts(events: Events, *kinds: str) -> list[Event]:
    """The events of some kinds."""
    return [event for event in events if event.act in kinds]


def acknowledged(events: Events) -> list[Event]:
    """Commits that somebody was told are done."""
    return [event for event in acts(events, "commit") if event.answer in (OK, KEPT)]


def _gone(events: Events, step: int, after: float, before: float) -> bool:
    """Whether the checkpoint of a step was damaged by the harness, or dropped by retention, in a span of time."""
    return any(e["step"] == step and after < e.start < before for e in acts(events, "damage", "drop"))


def _taken_over(events: Events, attempt: int, before: float) -> float:
    """When an attempt was taken over by a later one; infinity where it was not before a time."""
    later = [e.end for e in acts(events, "acquire") if e.answer == OK and e["attempt"] > attempt]
    return min((at for at in later if at < before), default=math.inf)


def commits_stand(events: Events) -> Iterable[str]:
    """A checkpoint that was acknowledged is there, whole and unchanged, at every later look."""
    for look in acts(events, "look"):
        for commit in acknowledged(events):
            step = commit["step"]
            if commit.end >= look.start or _gone(events, step, commit.start, look.end):
                continue
            found = look["steps"].get(str(step))
            if found is None:
                yield f"step {step}, committed by {commit.who}, has disappeared"
            elif not found["whole"]:
                yield f"step {step}, committed by {commit.who}, cannot be read"
            elif found["digest"] != commit["digest"]:
                yield f"step {step}, committed by {commit.who}, was changed"


def one_content_per_step(events: Events) -> Iterable[str]:
    """No step is acknowledged with two contents, unless the first was damaged or dropped."""
    done = acknowledged(events)
    for index, first in enumerate(done):
        for second in done[index + 1 :]:
            if first["step"] != second["step"] or first["digest"] == second["digest"]:
                continue
            if not _gone(events, first["step"], first.start, second.end):
                yield f"step {first['step']} was committed by {first.who} and by {second.who} with another content"


def manifests_are_whole(events: Events) -> Iterable[str]:
    """Nothing that looks committed is torn, unless the harness damaged it or a fenced attempt left it behind."""
    for look in acts(events, "look"):
        for name, found in look["steps"].items():
            if found["whole"] or _gone(events, int(name), -math.inf, look.end):
                continue
            attempt = found["attempt"]
            if attempt is None or _taken_over(events, attempt, look.start) == math.inf:
                yield f"step {name} has a manifest, but not its files ({found.get('why', 'torn')})"


def fenced_attempts_commit_nothing(events: Events) -> Iterable[str]:
    """No commit that an attempt began after it was taken over is acknowledged."""
    for commit in acknowledged(events):
        if _taken_over(events, commit["attempt"], commit.start) < commit.start:
            yield f"{commit.who} committed step {commit['step']} after it was taken over"


def resumed_is_committed(events: Events) -> Iterable[str]:
    """A resume takes a content that was committed for that step, and none older than the newest that it must know."""
    offered = acts(events, "commit")
    for resume in acts(events, "resume"):
        step = resume["step"]
        before = [c for c in offered if c["step"] == step and c.start < resume.end]
        known = {c[name] for c in before for name in ("offered", "digest")}
        if step and resume["digest"] not in known:
            yield f"{resume.who} resumed step {step} from what nobody committed"
        for commit in acknowledged(events):
            there = commit.end < resume.start and not _gone(events, commit["step"], commit.start, resume.end)
            if there and commit["step"] > step:
                yield f"{resume.who} resumed from step {step} although step {commit['step']} is committed and good"


def attempts_rise(events: Events) -> Iterable[str]:
    """Each take-over has a larger attempt number than all before: it is what fences."""
    taken = sorted((e for e in acts(events, "acquire") if e.answer == OK), key=lambda e: e.end)
    for before, after in itertools.pairwise(taken):
        if after["attempt"] <= before["attempt"]:
            yield f"{after.who} took the run over as attempt {after['attempt']} after attempt {before['attempt']}"


def one_driver(events: Events) -> Iterable[str]:
    """Nobody takes the run from a driver that lives."""
    taken = [e for e in acts(events, "acquire") if e.answer == OK]
    for held in taken:
        over = min((e.start for e in acts(events, "gone") if e.who == held.who), default=math.inf)
        for other in taken:
            if other.who != held.who and held.end < other.end < over:
                yield f"{other.who} took the run from {held.who}, which was alive"


def leases_are_kept(events: Events) -> Iterable[str]:
    """A driver that nobody took the run from does not believe so."""
    for lost in acts(events, "lost"):
        if _taken_over(events, lost["attempt"], lost.end) == math.inf:
            yield f"{lost.who} gave the run up, which nobody had taken over"


def retention_is_safe(events: Events) -> Iterable[str]:
    """What is dropped had `keep` good checkpoints above it when retention began, which was before any take-over."""
    for drop in acts(events, "drop"):
        begun = [e for e in acts(events, "retain") if e.who == drop.who and e.start < drop.start]
        if not begun:
            yield f"{drop.who} deleted the checkpoint of step {drop['step']}, which no retention asked for"
            continue
        retain = begun[-1]
        if _taken_over(events, retain["attempt"], retain.start) < retain.start:
            yield f"{drop.who} deleted step {drop['step']} after it was taken over"
        since = [e["step"] for e in acts(events, "damage", "drop") if retain.start < e.start < drop.start]
        good = {step for step in (*drop["good"], *since) if step > drop["step"]}
        if len(good) < retain["keep"]:
            yield f"{drop.who} deleted step {drop['step']} with {len(good)} good ones above it, not {retain['keep']}"


def finished_is_committed(events: Events) -> Iterable[str]:
    """A run that says it is finished has its last step committed."""
    for finish in acts(events, "finish"):
        done = [e for e in (*acknowledged(events), *acts(events, "resume")) if e["step"] == finish["step"]]
        if not any(e.end <= finish.start for e in done):
            yield f"{finish.who} finished with step {finish['step']} not committed"


def collection_leaves_nothing(events: Events) -> Iterable[str]:
    """After the last collection there is no file that no manifest names."""
    looks = acts(events, "look")
    if looks and looks[-1].facts.get("collected") and looks[-1]["strays"]:
        yield f"{looks[-1]['strays']} files of dead writers are left"


def nobody_crashed(events: Events) -> Iterable[str]:
    """Damaged bytes and lost answers are told as errors of the house, never as those of a library."""
    for crash in acts(events, "crash"):
        yield f"{crash.who} crashed: {crash['error']}"


def steps_are_in_order(events: Events) -> Iterable[str]:
    """An attempt does each step once, one after the other, from where it resumed."""
    for train in acts(events, "train"):
        first = next((e["step"] + 1 for e in acts(events, "resume") if e.who == train.who), 0)
        expected = list(range(first, first + len(train["steps"])))
        if train["steps"] != expected:
            yield f"{train.who} did steps {train['steps']}, expected {expected}"


def ends_as_undisturbed(outcome: dict[str, Any]) -> Callable[[Events], Iterable[str]]:
    """A checker: the run finished, and every finish has the final state and the samples of the undisturbed run."""

    def check(events: Events) -> Iterable[str]:
        finishes = acts(events, "finish")
        if not finishes:
            yield "the run did not finish"
        for finish in finishes:
            for name, value in outcome.items():
                if finish[name] != value:
                    yield f"{finish.who} finished with another {name} than the undisturbed run"

    return check


def enough_load(events: Events, *, commits: int, steps: int) -> Iterable[str]:
    """Faults hit a run that was working: without that a passed scenario proves nothing."""
    if len(acknowledged(events)) < commits:
        yield f"{len(acknowledged(events))} commits, expected {commits} at least"
    if sum(len(e["steps"]) for e in acts(events, "train")) < steps:
        yield f"fewer than {steps} steps"
    for fault in acts(events, "fault"):
        before = [c for c in acknowledged(events) if c.who == fault.who and c.end < fault.start]
        if len(before) < fault["warm"]:
            yield f"{fault['kind']} hit {fault.who} after {len(before)} commits, expected {fault['warm']}"


ALWAYS: tuple[Callable[[Events], Iterable[str]], ...] = (
    commits_stand, one_content_per_step, manifests_are_whole, fenced_attempts_commit_nothing, resumed_is_committed,
    attempts_rise, one_driver, leases_are_kept, retention_is_safe, finished_is_committed, collection_leaves_nothing,
    nobody_crashed, steps_are_in_order,
)  # fmt: skip
"""What holds of every history."""


def violations(events: Events, outcome: dict[str, Any] | None = None) -> list[str]:
    """All that is wrong with a history, each once; `outcome` is that of the undisturbed run."""
    checks = [*ALWAYS, ends_as_undisturbed(outcome)] if outcome is not None else list(ALWAYS)
    return list(dict.fromkeys(words for check in checks for words in check(events)))
