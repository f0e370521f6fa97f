"""Real code passes the seeded scenarios, and each deliberate mistake is caught in one of them."""

from __future__ import annotations

import queue
import shutil
from functools import cache
from pathlib import Path

import pytest
from broken import BROKEN
from history import History
from player import Parts, play
from results import Table, repeats
from scenario import FAULTS, Kind, Scenario

from lepton_ray.storage import open_store

SEARCHED = 150
"""Seeds in which a mistake must show."""


def played(folder: Path, seed: int, faults: tuple[Kind, ...], parts: Parts | None = None) -> list[str]:
    """What is wrong after a scenario on a local store."""
    scenario = Scenario.draw(seed, faults)
    place = folder / f"seed-{seed}"
    history = History(place / "history.jsonl")
    try:
        return play(scenario, open_store((place / "store").as_uri()), history, parts)
    except (queue.Empty, AssertionError) as error:
        return [f"{scenario.describe()}: hangs ({error})"]
    finally:
        history.close()
        shutil.rmtree(place, ignore_errors=True)


def test_the_real_code_passes(fast_folder: Path, table: Table) -> None:
    """Kills, zombies, outages, lost answers, collections, damage: nothing is lost, doubled or changed."""
    count = repeats(60, 2000)
    wrong = {}
    for seed in range(count):
        if found := played(fast_folder, seed, FAULTS):
            wrong[Scenario.draw(seed, FAULTS).describe()] = found
    assert not wrong, "\n".join(f"{name}: {words}" for name, words in wrong.items())
    table.add("F15-F41", "mixed faults of 1 to 4 attempts", "calls to a local store", count, "0 violations")


@cache
def _real(folder: Path, seed: int, faults: tuple[Kind, ...]) -> tuple[str, ...]:
    return tuple(played(folder, seed, faults))


@pytest.mark.parametrize("name", BROKEN)
def test_a_mistake_is_caught_where_the_real_code_passes(name: str, fast_folder: Path, table: Table) -> None:
    """The first seed in which the mistake shows; the real code passes that very scenario."""
    variant = BROKEN[name]
    first = 0 if repeats(0, 1) else variant.seed
    for seed in range(first, first + SEARCHED):
        found = played(fast_folder, seed, variant.faults, variant.parts)
        found = [words for words in found if not words.startswith("too little load")]
        if found:
            break
    else:
        pytest.fail(f"{name} was not caught in {SEARCHED} scenarios")
    assert _real(fast_folder, seed, variant.faults) == ()
    table.add("re-find", name, f"scenario of seed {seed}", seed + 1 - first, f"caught: {found[0]}")
