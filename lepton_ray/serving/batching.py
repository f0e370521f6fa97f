"""Dynamic batching: rows of concurrent requests share one call of the model, which runs in a thread of its own.

Ray Serve's own `@serve.batch` is not used: it makes every request wait the full time even where it is the only one,
counts requests rather than rows, puts what does not fit behind later arrivals, and needs a replica around it.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Protocol

import pyarrow as pa
from pydantic import BaseModel

Call = Callable[[pa.Table], Sequence[BaseModel]]
"""Answers for table rows, in their order; called in the batcher's thread."""


class Meter(Protocol):
    """What the serving room records with: the part of `monitoring.Recorder` it uses."""

    def count(self, metric: str, /, amount: float = 1.0, **labels: object) -> None:
        """Add to a counter."""

    def set(self, metric: str, /, value: float, **labels: object) -> None:
        """Set a gauge."""

    def observe(self, metric: str, /, value: float, **labels: object) -> None:
        """Add one observation to a histogram."""


@dataclass(eq=False)
class _Group:
    """The rows of one request. They stay together: one request, one call."""

    rows: pa.Table
    answer: asyncio.Future[Sequence[BaseModel]]
    arrived: float = field(default_factory=time.perf_counter)


class Batcher:
    """Joins waiting groups of rows, oldest first, and calls the model with them, one call at a time.

    A call takes as many whole groups as fit into `max_batch` rows. It starts at once while the model is idle and no
    other request is on its way (`alone`), else as soon as `max_batch` rows wait or the oldest has waited `wait_s`.
    Rows whose request was cancelled or timed out meanwhile are left out. A call that fails is repeated group by group,
    so that a request never fails for the sake of its neighbours.

    Lives in one event loop; `close` ends it.
    """

    def __init__(self, call: Call, meter: Meter, *, max_batch: int, wait_s: float, alone: Callable[[], bool]) -> None:
        self._call = call
        self._meter = meter
        self._max_batch = max_batch
        self._wait_s = wait_s
        self._alone = alone
        self._waiting: deque[_Group] = deque()
        self._rows = 0
        self._arrival = asyncio.Event()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="model")
        self._task: asyncio.Task[None] | None = None
        self._call_began: float | None = None

    async def submit(self, rows: pa.Table) -> Sequence[BaseModel]:
        """Answers for one request's rows (at most `max_batch`). Raises what the model's call raised."""
        if self._task is None:
            self._task = asyncio.get_running_loop().create_task(self._run())
        if self._task.done():
            raise RuntimeError("the batcher has ended")
        group = _Group(rows, asyncio.get_running_loop().create_future())
        self._waiting.append(group)
        self._rows += rows.num_rows
        self._arrival.set()
        return await group.answer

    def stuck_for(self) -> float:
        """Seconds that the call in work has taken so far; 0 while the model is idle."""
        began = self._call_began
        return 0.0 if began is None else time.perf_counter() - began

    def failed(self) -> bool:
        """Whether the loop that makes the calls has ended, so that no request would ever be answered."""
        return self._task is not None and self._task.done()

    def close(self) -> None:
        """End: waiting requests are cancelled, a call in work runs out in its thread."""
        if self._task is not None:
            self._task.cancel()
        for group in self._waiting:
            group.answer.cancel()
        self._thread.shutdown(wait=False, cancel_futures=True)

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await self._fill()
            groups = self._take()
            if not groups:
                continue
            began = self._call_began = time.perf_counter()
            for group in groups:
                self._meter.observe("lepton_serving_queue_seconds", began - group.arrived)
            try:
                outcomes = await loop.run_in_executor(self._thread, self._answer, [group.rows for group in groups])
            finally:
                self._call_began = None
            for group, outcome in zip(groups, outcomes, strict=True):
                if group.answer.done():
                    continue
                if isinstance(outcome, Exception):
                    group.answer.set_exception(outcome)
                else:
                    group.answer.set_result(outcome)

    async def _fill(self) -> None:
        """Wait until there is a batch to start with."""
        while not self._waiting:
            self._arrival.clear()
            await self._arrival.wait()
        deadline = self._waiting[0].arrived + self._wait_s
        while self._rows < self._max_batch and not self._alone():
            left = deadline - time.perf_counter()
            if left <= 0:
                return
            self._arrival.clear()
            try:
                async with asyncio.timeout(left):
                    await self._arrival.wait()
            except TimeoutError:
                return

    def _take(self) -> list[_Group]:
        groups: list[_Group] = []
        rows = 0
        while self._waiting and (not groups or rows + self._waiting[0].rows.num_rows <= self._max_batch):
            group = self._waiting.popleft()
            self._rows -= group.rows.num_rows
            if not group.answer.done():
                groups.append(group)
                rows += group.rows.num_rows
        return groups

    def _answer(self, parts: list[pa.Table]) -> list[Any]:
        """In the thread: the answers of each part, or the exception that it gets."""
        try:
            return self._split(parts, self._timed(pa.concat_tables(parts)))
        except Exception as error:  # noqa: BLE001 - whatever the model raises is the answer to that request
            if len(parts) == 1:
                return [error]
        return [outcome for part in parts for outcome in self._answer([part])]

    def _timed(self, rows: pa.Table) -> Sequence[BaseModel]:
        began = time.perf_counter()
        answers = self._call(rows)
        self._meter.observe("lepton_serving_model_seconds", time.perf_counter() - began)
        self._meter.observe("lepton_serving_batch_rows", rows.num_rows)
        if len(answers) != rows.num_rows:
            raise RuntimeError(f"the task gave {len(answers)} answers to {rows.num_rows} rows")
        return answers

    @staticmethod
    def _split(parts: list[pa.Table], answers: Sequence[BaseModel]) -> list[Any]:
        """The answers cut along the parts they belong to."""
        found, start = [], 0
        for part in parts:
            found.append(answers[start : start + part.num_rows])
            start += part.num_rows
        return found
