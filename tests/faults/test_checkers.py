"""Each checker sees what it is there for, and nothing in a history in which all went well."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from checkers import enough_load, violations
from history import FENCED, KEPT, OK, UNKNOWN, Event, History, read
from scenario import Scenario


def event(act: str, start: float, who: str = "a", answer: str = OK, **facts: Any) -> Event:
    """An act of a tenth of a second."""
    return Event(act, who, start, math.inf if answer in (UNKNOWN, FENCED) else start + 0.1, answer, facts)


def commit(start: float, step: int, digest: str, who: str = "a", attempt: int = 1, answer: str = OK) -> Event:
    return event("commit", start, who, answer, step=step, digest=digest, offered=digest, attempt=attempt)


def stored(start: float, attempt: int = 2, **steps: str) -> Event:
    """A look at whole checkpoints: `s10="x"` is content x at step 10; an empty content is a torn one."""
    found = {n[1:]: {"digest": d or None, "whole": bool(d), "attempt": attempt} for n, d in steps.items()}
    return event("look", start, "harness", steps=found, strays=0)


GOOD = [
    event("acquire", 0, attempt=1),
    event("resume", 1, step=0, digest="", attempt=1),
    commit(2, 10, "x"),
    commit(3, 20, "y"),
    stored(4, s10="x", s20="y"),
    event("train", 5, steps=list(range(1, 26))),
    event("gone", 5),
    event("acquire", 6, "b", attempt=2),
    event("resume", 7, "b", step=20, digest="y", attempt=2),
    event("retain", 8, "b", attempt=2, keep=1),
    event("drop", 8.01, "b", step=10, good=[20]),
    event("train", 9, "b", steps=[21, 22]),
    event("finish", 9, "b", step=20, link="end"),
    stored(10, s20="y"),
]


def test_a_good_history_is_good() -> None:
    assert violations(GOOD, {"step": 20, "link": "end"}) == []


BAD = {
    "has disappeared": [*GOOD, commit(10.5, 30, "z", "b", 2), stored(11, s20="y")],
    "cannot be read": [*GOOD, stored(11, s20="")],
    "was changed": [*GOOD, stored(11, s20="other")],
    "with another content": [*GOOD, commit(11, 20, "other", "b", 2)],
    "not its files": [*GOOD, stored(11, s20="y", s30="")],
    "after it was taken over": [*GOOD, commit(11, 30, "z", "a", 1), stored(12, s20="y", s30="z")],
    "from what nobody committed": [*GOOD, event("resume", 11, "b", step=20, digest="flipped", attempt=2)],
    "is committed and good": [*GOOD, event("resume", 11, "b", step=0, digest="", attempt=2)],
    "as attempt 2 after attempt 2": [*GOOD, event("gone", 10.5, "b"), event("acquire", 11, "c", attempt=2)],
    "which was alive": [*GOOD, event("acquire", 11, "c", attempt=3)],
    "which nobody had taken over": [*GOOD, event("lost", 11, "b", attempt=2)],
    "which no retention asked for": [*GOOD, event("drop", 11, "a", step=20, good=[20])],
    "with 0 good ones above it": [*GOOD, event("drop", 8.5, "b", step=20, good=[20])],
    "with step 40 not committed": [*GOOD, event("finish", 11, "b", step=40, link="end")],
    "another link": [*GOOD, event("finish", 11, "b", step=20, link="other")],
    "crashed": [*GOOD, event("crash", 11, "b", error="KeyError")],
    "did steps": [*GOOD, event("train", 11, "b", steps=[22])],
    "files of dead writers": [*GOOD, event("look", 11, "harness", steps={}, strays=2, collected=True)],
}


@pytest.mark.parametrize("words", BAD)
def test_a_bad_history_is_bad(words: str) -> None:
    found = violations(BAD[words], {"step": 20, "link": "end"})
    assert any(words in told for told in found), found


def test_damage_and_ambiguous_answers_excuse_what_they_explain() -> None:
    """A damaged checkpoint may be torn and committed anew; a commit without an answer may show at any time."""
    history = [
        *GOOD,
        event("damage", 11, "harness", step=20),
        stored(12, s20=""),
        commit(13, 30, "z", "b", 2, UNKNOWN),
        stored(14, s20="", s30="z"),
        event("gone", 14.5, "b"),
        event("acquire", 15, "c", attempt=3),
        event("resume", 16, "c", step=30, digest="z", attempt=3),
        commit(17, 20, "new", "c", 3),
        stored(18, s20="new", s30="z"),
    ]
    assert violations(history) == []
    assert violations([*GOOD, commit(11, 20, "y", "b", 2, KEPT), stored(12, s20="y")]) == []


def test_an_idle_system_proves_nothing() -> None:
    idle = [event("fault", 2.5, "a", kind="kill", warm=2)]
    assert list(enough_load([*GOOD, *idle], commits=2, steps=20)) == ["kill hit a after 1 commits, expected 2"]
    assert len(list(enough_load(GOOD, commits=3, steps=100))) == 2


def test_an_act_without_an_answer_never_ends(tmp_path: Path) -> None:
    """What a killed process began may still show: only an answer ends it. Half a line is no line."""
    history = History(tmp_path / "history.jsonl")
    history.begin("commit", "a", step=1)
    history.begin("commit", "a", step=2).answer(OK, digest="x")
    history.begin("commit", "a", step=3).answer(UNKNOWN)
    history.close()
    with history.path.open("ab") as file:
        file.write(b'{"at": 1, "beg')
    first, second, third = read(history.path)
    assert (first.end, first.answer) == (math.inf, UNKNOWN)
    assert first.start < second.start < second.end < math.inf
    assert (second["digest"], third.end) == ("x", math.inf)


def test_a_seed_is_a_scenario() -> None:
    assert Scenario.draw(7) == Scenario.draw(7)
    assert len({Scenario.draw(seed) for seed in range(50)}) == 50
