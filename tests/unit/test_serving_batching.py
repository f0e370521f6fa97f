"""Dynamic batching: who shares a call, how long anyone waits, and what a failure costs the others."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

import pyarrow as pa
import pytest
from pydantic import BaseModel
from served_model import Gate, Notes

from lepton_ray.serving.batching import Batcher


class Doubled(BaseModel):
    value: int


class Model:
    """Doubles numbers; remembers its calls, waits at a gate where it has one, fails on 13."""

    def __init__(self, gate: Gate | None = None) -> None:
        self.calls: list[list[int]] = []
        self.gate = gate

    def __call__(self, rows: pa.Table) -> Sequence[BaseModel]:
        numbers = rows["number"].to_pylist()
        self.calls.append(numbers)
        if self.gate is not None:
            self.gate()
        if 13 in numbers:
            raise ValueError("13")
        return [Doubled(value=2 * number) for number in numbers if number != 99]


def numbers(*values: int) -> pa.Table:
    return pa.table({"number": pa.array(values, pa.int64())})


def play(
    model: Model,
    story: Callable[[Batcher], Coroutine[Any, Any, None]],
    *,
    max_batch: int = 4,
    wait_s: float = 0.0,
    alone: Callable[[], bool] = lambda: True,
) -> Notes:
    """Run a story with a batcher, in one event loop, within bounded time."""
    notes = Notes()

    async def run() -> None:
        batcher = Batcher(model, notes, max_batch=max_batch, wait_s=wait_s, alone=alone)
        try:
            async with asyncio.timeout(20):
                await story(batcher)
        finally:
            if model.gate is not None:
                model.gate.open.set()
            batcher.close()

    asyncio.run(run())
    return notes


async def entered(gate: Gate) -> None:
    """Until a call stands at the gate."""
    await asyncio.to_thread(gate.entered.wait, 20)


def values(answers: Sequence[BaseModel]) -> list[int]:
    return [answer.value for answer in answers if isinstance(answer, Doubled)]


def test_requests_that_wait_share_a_call() -> None:
    """Those that come while the model is busy go together, whole groups, oldest first, up to the batch size."""
    model = Model(Gate())

    async def story(batcher: Batcher) -> None:
        assert model.gate is not None
        first = asyncio.create_task(batcher.submit(numbers(0)))
        await entered(model.gate)
        later = [asyncio.create_task(batcher.submit(numbers(*group))) for group in ([1, 2], [3], [4, 5], [6])]
        await asyncio.sleep(0)
        model.gate.open.set()
        assert values(await first) == [0]
        assert [values(answers) for answers in await asyncio.gather(*later)] == [[2, 4], [6], [8, 10], [12]]

    notes = play(model, story)
    assert model.calls == [[0], [1, 2, 3], [4, 5, 6]]
    assert notes.observed["lepton_serving_batch_rows"] == [1, 3, 3]
    assert len(notes.observed["lepton_serving_queue_seconds"]) == 5


def test_a_lone_request_does_not_wait() -> None:
    model = Model()

    async def story(batcher: Batcher) -> None:
        began = time.perf_counter()
        await batcher.submit(numbers(1))
        assert time.perf_counter() - began < 4

    play(model, story, wait_s=5.0)


def test_others_on_their_way_are_waited_for() -> None:
    """For at most the time set, and no longer than until the batch is full."""
    model = Model()

    async def story(batcher: Batcher) -> None:
        first = asyncio.create_task(batcher.submit(numbers(1)))
        await asyncio.sleep(0.05)
        assert model.calls == []
        began = time.perf_counter()
        await asyncio.gather(first, batcher.submit(numbers(2, 3, 4)))
        assert time.perf_counter() - began < 4

    play(model, story, wait_s=5.0, alone=lambda: False)
    assert model.calls == [[1, 2, 3, 4]]
    late = Model()
    play(late, lambda batcher: story_of_one(batcher), wait_s=0.05, alone=lambda: False)  # noqa: PLW0108 - a coroutine per run
    assert late.calls == [[7]]


async def story_of_one(batcher: Batcher) -> None:
    assert values(await batcher.submit(numbers(7))) == [14]


def test_a_failure_hits_only_its_own_request() -> None:
    """The call is repeated group by group; neighbours get their answers."""
    model = Model(Gate())

    async def story(batcher: Batcher) -> None:
        assert model.gate is not None
        first = asyncio.create_task(batcher.submit(numbers(0)))
        await entered(model.gate)
        later = [asyncio.create_task(batcher.submit(numbers(number))) for number in (1, 13, 2)]
        await asyncio.sleep(0)
        model.gate.open.set()
        await first
        one, bad, two = await asyncio.gather(*later, return_exceptions=True)
        assert isinstance(bad, ValueError)
        assert not isinstance(one, BaseException)
        assert not isinstance(two, BaseException)
        assert (values(one), values(two)) == ([2], [4])

    play(model, story)
    assert model.calls == [[0], [1, 13, 2], [1], [13], [2]]


def test_too_few_answers_are_an_error() -> None:
    """A task that loses a row must not shift the others' answers."""
    model = Model()

    async def story(batcher: Batcher) -> None:
        with pytest.raises(RuntimeError, match="1 answers to 2 rows"):
            await batcher.submit(numbers(1, 99))
        assert not batcher.failed()

    play(model, story)


def test_cancelled_requests_are_left_out() -> None:
    """Rows whose client went away cost no model time."""
    model = Model(Gate())

    async def story(batcher: Batcher) -> None:
        assert model.gate is not None
        first = asyncio.create_task(batcher.submit(numbers(0)))
        await entered(model.gate)
        gone, stays = (asyncio.create_task(batcher.submit(numbers(number))) for number in (1, 2))
        await asyncio.sleep(0)
        gone.cancel()
        model.gate.open.set()
        assert values(await stays) == [4]
        await first

    play(model, story)
    assert model.calls == [[0], [2]]


def test_a_hanging_call_is_seen() -> None:
    model = Model(Gate())

    async def story(batcher: Batcher) -> None:
        assert model.gate is not None
        assert batcher.stuck_for() == 0
        waiting = asyncio.create_task(batcher.submit(numbers(1)))
        await entered(model.gate)
        assert batcher.stuck_for() > 0
        model.gate.open.set()
        await waiting
        assert batcher.stuck_for() == 0

    play(model, story)


def test_waiting_requests_end_with_the_batcher() -> None:
    """Nobody waits for ever for a replica that has gone."""
    model = Model(Gate())

    async def story(batcher: Batcher) -> None:
        assert model.gate is not None
        asyncio.create_task(batcher.submit(numbers(1)))  # noqa: RUF006 - left behind on purpose
        await entered(model.gate)
        waiting = asyncio.create_task(batcher.submit(numbers(2)))
        await asyncio.sleep(0)
        batcher.close()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        assert batcher.failed()
        with pytest.raises(RuntimeError, match="ended"):
            await batcher.submit(numbers(3))

    play(model, story)
