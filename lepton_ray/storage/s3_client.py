"""One call to S3: bounded in time, tried again where that helps, its errors in the house's own words.

s3fs brings the connection, the credentials and the event loop. Its own retries are switched off: they know neither a
deadline nor that the answer to a conditional write may be lost although the write was done.
"""

from __future__ import annotations

import asyncio
import http.client
import os
import random
import threading
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import s3fs
from aiobotocore.session import AioSession
from botocore.loaders import Loader

from lepton_ray.errors import UnavailableError
from lepton_ray.storage.s3_faults import endpoint, endpoint_url, judge, region

T = TypeVar("T")
_SERVICE_MODELS = Loader()
"""Shared by all stores of the process: reading S3's interface description takes a tenth of a second."""


@dataclass(frozen=True)
class Patience:
    """How long a call may take. A transfer gets more in proportion to its bytes."""

    connect_s: float = 5.0
    """For a connection to stand."""
    call_s: float = 15.0
    """For one try without its transfer."""
    total_s: float = 45.0
    """From the first try to giving up."""
    slowest_bytes_per_s: float = 262_144.0
    """A transfer that is slower than this counts as hanging."""
    first_wait_s: float = 0.2
    """Upper bound of the random wait after the first failure; doubled with each further one."""
    longest_wait_s: float = 5.0
    """Where the doubling ends."""

    def wait_s(self, failures: int) -> float:
        """Seconds until the next try; full jitter, as ranks that failed together must not come back together."""
        bound = min(self.longest_wait_s, self.first_wait_s * 2 ** min(failures - 1, 16))
        return random.uniform(0, bound)  # noqa: S311 - not a secret


class PreconditionError(Exception):
    """The server did not write because a condition does not hold (412), or the object or upload is gone (404).

    It may be an earlier try of the very same call that made the condition fail: tries are repeated here, in the HTTP
    library and by proxies, whenever an answer is lost. Whoever writes must look whose object is there.
    """

    def __init__(self, code: str) -> None:
        super().__init__(code)
        self.code = code


class S3Client:
    """Calls for one bucket, from any thread of any process (each process makes its own connection)."""

    def __init__(self, uri: str, patience: Patience) -> None:
        self._uri = uri
        self._patience = patience
        self._making = threading.Lock()
        self._made: tuple[int, Any] | None = None

    def call(self, method: str, arguments: Mapping[str, Any], total_s: float | None = None) -> dict[str, Any]:
        """The answer to one call; a body comes as bytes.

        Raises PreconditionError for 412 and 404, UsageError, LeptonError, and UnavailableError when the deadline
        passes.
        """
        return self._run(self._call(method, arguments, total_s))

    def call_each(
        self, method: str, make: Callable[[int], Mapping[str, Any]], count: int, at_once: int
    ) -> list[dict[str, Any]]:
        """The answers to calls with `make(0)` to `make(count - 1)`, `at_once` in parallel; errors as for `call`."""
        return self._run(self._call_each(method, make, count, at_once))

    async def _call_each(
        self, method: str, make: Callable[[int], Mapping[str, Any]], count: int, at_once: int
    ) -> list[dict[str, Any]]:
        gate = asyncio.Semaphore(at_once)

        async def one(index: int) -> dict[str, Any]:
            async with gate:
                return await self._call(method, make(index), None)

        try:
            async with asyncio.TaskGroup() as group:  # the first failure stops the others
                tasks = [group.create_task(one(index)) for index in range(count)]
        except ExceptionGroup as errors:
            raise errors.exceptions[0] from errors
        return [task.result() for task in tasks]

    async def _call(self, method: str, arguments: Mapping[str, Any], total_s: float | None) -> dict[str, Any]:
        """Try until an answer comes that further tries would not change, or the deadline passes."""
        patience = self._patience
        clock = asyncio.get_running_loop().time
        transfer_s = len(arguments.get("Body", b"")) / patience.slowest_bytes_per_s
        started = clock()
        deadline = started + (total_s or patience.total_s) + 2 * transfer_s
        tries = 0
        while True:
            tries += 1
            try:
                left_s = max(0.001, deadline - clock())
                return await self._try(method, arguments, min(left_s, patience.call_s + transfer_s))
            except Exception as error:
                fault = judge(error)
                if fault.condition:
                    raise PreconditionError(fault.code) from error
                if not fault.again:
                    raise fault.kind(f"store {self._uri}: {fault.reason}") from error
                wait_s = patience.wait_s(tries)
                if clock() + wait_s >= deadline:
                    raise UnavailableError(
                        f"store {self._uri}: no answer from {endpoint()} to {method} in {clock() - started:.0f} s and "
                        f"{tries} tries, the last: {fault.reason}; check the endpoint and try again"
                    ) from error
            await asyncio.sleep(wait_s)

    async def _try(self, method: str, arguments: Mapping[str, Any], limit_s: float) -> dict[str, Any]:
        async with asyncio.timeout(limit_s) as timer:
            # call_s3 itself would wait without a limit and could not be stopped
            answer: dict[str, Any] = await self._filesystem()._call_s3(method, **arguments)  # noqa: SLF001
            body = answer.get("Body")
            if body is not None:
                expected = int(answer["ContentLength"])
                timer.reschedule(
                    asyncio.get_running_loop().time() + limit_s + expected / self._patience.slowest_bytes_per_s
                )
                async with body as stream:
                    answer["Body"] = await stream.read()
                if len(answer["Body"]) != expected:
                    raise http.client.IncompleteRead(answer["Body"], expected)
        return answer

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        """Wait for work on the file system's event loop; Ctrl-C stops it."""
        future = asyncio.run_coroutine_threadsafe(work, self._filesystem().loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    def _filesystem(self) -> Any:
        with self._making:
            if self._made is None or self._made[0] != os.getpid():  # a forked child must not share the connection
                self._made = (os.getpid(), self._connect())
            return self._made[1]

    def _connect(self) -> Any:
        """A file system without caches and retries; it touches credentials and network at its first call."""
        config: dict[str, Any] = {
            "connect_timeout": self._patience.connect_s,
            "read_timeout": self._patience.call_s,
            "retries": {"total_max_attempts": 1},
            "max_pool_connections": 16,
        }
        if endpoint_url():
            config["s3"] = {"addressing_style": "path"}  # one's own server seldom has a name per bucket
        session = AioSession()
        session.register_component("data_loader", _SERVICE_MODELS)
        filesystem = s3fs.S3FileSystem(
            session=session,
            config_kwargs=config,
            client_kwargs={"region_name": region()} if region() else {},
            use_listings_cache=False,
            skip_instance_cache=True,
        )
        filesystem.retries = 1
        return filesystem
