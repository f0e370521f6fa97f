"""The actor in which a rank lives. The driver starts it before Ray Train's controller is there.

What a rank needs to import (Ray Train, torch) takes seconds of CPU. Ray Train starts the ranks' processes when its
controller has imported as much itself; started by the driver, they import side by side. To the controller a host is
one of its own workers: it has the same methods.
"""

from __future__ import annotations

import gc
import os
import signal
import threading
import time
from collections.abc import Callable, Mapping
from types import FrameType
from typing import Any

from lepton_ray.training import notices

READY, BUSY, LEAVING = "ready", "busy", "leaving"
"""What a host says of itself after a failure: it can go on as another group's rank; it cannot; its node will go."""
POLL_S = 0.4
"""Seconds that an answer to the controller's poll may take: shorter than its time between two."""


class RayTrainWorkerHost:
    """A `ray.train` worker that is there before its controller.

    Args:
        environment: variables of the driver that Ray Train and torch read in a worker.
    """

    def __init__(self, environment: Mapping[str, str] | None = None) -> None:
        os.environ.update(environment or {})
        gc.disable()  # a collection in the midst of imports finds nothing to free
        from ray.train.v2._internal.execution.worker_group.worker import RayTrainWorker  # noqa: TID251 - a part of the door

        self._worker: Any = RayTrainWorker()
        self._drained = False
        self._before: Any = signal.signal(signal.SIGTERM, self._told_to_end)
        # not in this thread: it answers the controller meanwhile
        threading.Thread(target=_import_the_rest, name="imports", daemon=True).start()

    def execute(self, function: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
        """Call a function in this process."""
        return self._worker.execute(function, *arguments, **named)

    def run_train_fn(self, train_fn_ref: Any) -> None:
        """Start the rank's function in a thread."""
        notices.make_room(asked=False)
        self._worker.run_train_fn(train_fn_ref)

    def get_metadata(self) -> Any:
        """Where this process runs."""
        return self._worker.get_metadata()

    def mark_preempt(self, info: Any) -> None:
        """Take note that a node of the group is about to go."""
        self._drained = True
        deadline = getattr(info, "deadline_ms", None)
        notices.preempt(None if deadline is None else max(0.0, deadline / 1000 - time.time()))
        self._worker.mark_preempt(info)

    def make_room(self) -> None:
        """Take note that there is room for more ranks: all leave at their next checkpoint."""
        notices.make_room(asked=True)

    def poll_status(self) -> Any:
        """How the function is doing: told at once when it ends or has something to report, else after POLL_S.

        While this thread waits, Ray's event loop does: it would wake up a hundred times a second, and take Python's
        lock from the rank's thread each time.
        """
        execution = self._execution()
        if execution is not None and execution.training_thread_runner.is_running() and execution.result_queue.empty():
            execution.training_thread_runner._thread.join(POLL_S)  # noqa: SLF001 - nothing public waits for it
        return self._worker.poll_status()

    def clear_result_queue(self) -> bool:
        """Forget reports that nobody took."""
        return bool(self._worker.clear_result_queue())

    def rest(self, limit_s: float) -> str:
        """After a failure: wait for the function to end, and let go of what it held; `ready`, `busy` or `leaving`."""
        runner = self._runner()
        if runner is not None:
            if runner.is_running():
                runner._thread.join(limit_s)  # noqa: SLF001 - nothing public waits for it
            if runner.is_running() or not _blameless(runner.get_error()):
                return BUSY
            runner._exc = None  # noqa: SLF001 - its traceback holds the model and everything else of the rank
        gc.collect()
        if self._drained:
            return LEAVING
        return BUSY if notices.preempted() is not None else READY

    def _execution(self) -> Any:
        """What runs the rank's function; None before the rank knows its place."""
        from ray.train.v2._internal.execution.context import get_train_context  # noqa: TID251

        try:
            return get_train_context().execution_context
        except RuntimeError:
            return None

    def _runner(self) -> Any:
        """The thread of the rank's function; None before the rank knows its place."""
        execution = self._execution()
        return execution.training_thread_runner if execution is not None else None

    def _told_to_end(self, number: int, frame: FrameType | None) -> None:
        """SIGTERM: a rank that trains takes note, and leaves at the end of a step; a second one ends it as ever."""
        runner = self._runner()
        if runner is not None and runner.is_running() and notices.preempted() is None:
            notices.preempt()
        elif callable(self._before):
            self._before(number, frame)
        else:
            os._exit(128 + number)

    def shutdown(self) -> None:
        """Prepare to be stopped."""
        self._worker.shutdown()

    def init_train_context(self, **context: Any) -> None:
        """Learn rank, world size and what else a rank must know."""
        self._worker.init_train_context(**context)


def _blameless(error: BaseException | None) -> bool:
    """Whether a rank's function ended because of other ranks: nothing is known to be wrong with its process."""
    from lepton_ray.training.preemption import MadeRoom, Preempted
    from lepton_ray.training.process_group import lost_peer

    cause = getattr(error, "_base_exc", error)
    return cause is None or isinstance(cause, MadeRoom | Preempted) or lost_peer(cause)


def _import_the_rest() -> None:
    """Import what every rank uses. Whoever imports it meanwhile waits for it."""
    try:
        import lepton_ray.training.loop  # noqa: F401
    except Exception:  # noqa: BLE001, S110 - the rank's function meets it again, where it is told
        pass
    finally:
        gc.freeze()  # modules stay: later collections need not look through them
        gc.enable()
