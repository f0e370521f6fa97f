"""Ray Train's synchronisation actor, started when somebody needs it.

Ray Train starts one with every worker group, for ranks that call `ray.train.report` with a checkpoint or
`ray.train.collective`. The framework's own loop calls neither: that is a process less, two seconds of CPU less at each
start, and a hundred interruptions a second less where the ranks fill the machine's cores.
"""

from __future__ import annotations

import contextlib
import uuid
from typing import Any


class LateBarrier:
    """Stands for the actor's handle; travels to the ranks, the first of which starts the actor.

    Args:
        options: of the actor: where it must run.
        arguments: that it is made with.
    """

    def __init__(self, options: dict[str, Any], arguments: dict[str, Any]) -> None:
        self._options, self._arguments = options, arguments
        self._name = f"barrier-{uuid.uuid4().hex}"
        self._actor: Any = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_actor": None}

    def __getattr__(self, method: str) -> Any:
        """A method of the actor, as its handle has it."""
        if method.startswith("_"):
            raise AttributeError(method)
        return getattr(self._started(), method)

    def end(self) -> None:
        """End the actor, if anybody started it."""
        import ray

        with contextlib.suppress(ValueError):  # nobody did
            ray.kill(ray.get_actor(self._name))

    def _started(self) -> Any:
        from ray.train.v2._internal.execution.checkpoint.sync_actor import SynchronizationActor  # noqa: TID251

        if self._actor is None:
            made = SynchronizationActor.options(**self._options, name=self._name, get_if_exists=True)
            self._actor = made.remote(**self._arguments)
        return self._actor


class LateBarriers:
    """Stands where Ray Train makes the actor."""

    def __init__(self, options: dict[str, Any] | None = None) -> None:
        self._options = options or {}

    def options(self, **options: Any) -> LateBarriers:
        """As of the actor's class."""
        return LateBarriers({**self._options, **options})

    def remote(self, **arguments: Any) -> LateBarrier:
        """What is given instead of the actor's handle."""
        return LateBarrier(self._options, arguments)
