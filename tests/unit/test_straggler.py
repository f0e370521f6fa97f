"""A rank that is persistently slower is named once, with figures; what is noise is not."""

from __future__ import annotations

import math
import random
from collections.abc import Callable

import pytest

from lepton_ray.training.beat_reading import StepTime
from lepton_ray.training.straggler import Straggler, StragglerWatch

Own = Callable[[int, int], float]
"""Own compute of (step, rank), seconds."""


def run(own: Own, steps: int, world_size: int = 2, *, every: int = 4) -> list[tuple[int, Straggler]]:
    """Who is named, and after which step, where the watch looks every few steps at the newest 64 of each rank."""
    watch = StragglerWatch()
    kept: dict[int, list[StepTime]] = {rank: [] for rank in range(world_size)}
    found = []
    for step in range(1, steps + 1):
        times = [own(step, rank) for rank in range(world_size)]
        whole = max((time for time in times if not math.isnan(time)), default=0.0) + 0.005
        for rank, time in enumerate(times):
            kept[rank] = [*kept[rank][-63:], StepTime(step, whole, time)]
        if step % every == 0:
            found += [(step, each) for each in watch.see(kept)]
    return found


def slow(rank: int, times: float = 4.0, seconds: float = 0.1, *, after: int = 0) -> Own:
    """One rank takes a multiple of the time of the others, who vary by a fifth."""
    draw = random.Random(1)  # noqa: S311 - a test's noise

    def own(step: int, each: int) -> float:
        factor = times if each == rank and step > after else 1.0
        return factor * seconds * draw.uniform(0.9, 1.1)

    return own


@pytest.mark.parametrize("world_size", [2, 3, 8])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_at_a_quarter_of_its_speed_is_named_within_twenty_steps(world_size: int, rank: int) -> None:
    [(step, found)] = run(slow(rank), 200, world_size)
    assert step <= 20
    assert found.rank == rank
    assert found.ratio == pytest.approx(4.0, rel=0.1)
    assert f"rank {rank} computes {found.ratio:.1f} times as long as the others" in found.words


def test_a_rank_that_becomes_slow_is_named_within_twenty_steps_of_it() -> None:
    [(step, found)] = run(slow(1, after=50), 200)
    assert 50 < step <= 70
    assert found.rank == 1


def test_a_quota_that_lets_some_short_steps_pass_does_not_hide_a_straggler() -> None:
    """Steps of 5 ms under a quota of 25 ms in 100: five at full speed, then none for 75 ms."""
    [(_, found)] = run(lambda step, rank: 0.08 if rank == 1 and step % 5 == 0 else 0.005, 2000)
    assert found.rank == 1
    assert found.ratio == pytest.approx(4.0, rel=0.1)


CALM: dict[str, Own] = {
    "equal ranks": slow(0, 1.0),
    "a little slower": slow(1, 1.3),
    "what others wait for anyway": slow(1, 3.0, 0.0001),
    "one long stop": lambda step, rank: 5.0 if (step, rank) == (50, 1) else 0.1,
    "a stop of several steps": lambda step, rank: 0.3 if rank == 1 and 50 <= step < 60 else 0.1,
    "each in its turn": lambda step, rank: 0.3 if step // 5 % 2 == rank else 0.1,
    "own compute that is not known": lambda _, rank: math.nan if rank == 0 else 1.0,
    "every third step of one": lambda step, rank: 0.4 if rank == 1 and step % 3 == 0 else 0.1,
}


@pytest.mark.parametrize("own", CALM.values(), ids=CALM.keys())
def test_noise_names_nobody(own: Own) -> None:
    assert run(own, 400) == []


def test_noise_of_many_kinds_names_nobody() -> None:
    """A hundred runs in which each rank is now and then three times as slow for a while."""
    for seed in range(100):
        draw = random.Random(seed)  # noqa: S311 - a test's noise
        until = {0: 0, 1: 0}

        def own(step: int, rank: int, draw: random.Random = draw, until: dict[int, int] = until) -> float:
            if draw.random() < 0.01:
                until[rank] = step + draw.randint(1, 6)
            return 0.1 * draw.uniform(0.8, 1.2) * (3.0 if step < until[rank] else 1.0)

        assert run(own, 300) == [], seed


def test_one_rank_alone_is_never_a_straggler() -> None:
    assert run(slow(0), 100, world_size=1) == []


def test_a_straggler_is_told_once_and_again_after_it_had_recovered() -> None:
    def own(step: int, rank: int) -> float:
        return 0.4 if rank == 1 and (step <= 100 or step > 200) else 0.1

    assert [found.rank for _, found in run(own, 300)] == [1, 1]


def test_steps_that_not_all_ranks_have_are_left_for_later() -> None:
    """The pages of the ranks are read one after the other."""
    watch = StragglerWatch()
    mine = [StepTime(step, 0.4, 0.4) for step in range(1, 31)]
    others = [StepTime(step, 0.4, 0.1) for step in range(1, 31)]
    assert watch.see({0: mine, 1: []}) == []
    assert watch.see({0: mine, 1: others[:8]}) == []
    assert [found.rank for found in watch.see({0: mine, 1: others})] == [0]
