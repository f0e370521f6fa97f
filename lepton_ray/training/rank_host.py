"""The actor in which a rank lives. The driver starts it before Ray Train's controller is there.

What a rank needs to import (Ray Train, torch) takes seconds of CPU. Ray Train starts the ranks' processes when its
controller has imported as much itself; started by the driver, they import side by side. To the controller a host is
one of its own workers: it has the same methods.
"""

from __future__ import annotations

import gc
import os
import threading
from collections.abc import Callable, Mapping
from typing import Any


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
        # not in this thread: it answers the controller meanwhile
        threading.Thread(target=_import_the_rest, name="imports", daemon=True).start()

    def execute(self, function: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
        """Call a function in this process."""
        return self._worker.execute(function, *arguments, **named)

    def run_train_fn(self, train_fn_ref: Any) -> None:
        """Start the rank's function in a thread."""
        self._worker.run_train_fn(train_fn_ref)

    def get_metadata(self) -> Any:
        """Where this process runs."""
        return self._worker.get_metadata()

    def mark_preempt(self, info: Any) -> None:
        """Take note that a node of the group is about to go."""
        self._worker.mark_preempt(info)

    def poll_status(self) -> Any:
        """How the function is doing."""
        return self._worker.poll_status()

    def clear_result_queue(self) -> bool:
        """Forget reports that nobody took."""
        return bool(self._worker.clear_result_queue())

    def shutdown(self) -> None:
        """Prepare to be stopped."""
        self._worker.shutdown()

    def init_train_context(self, **context: Any) -> None:
        """Learn rank, world size and what else a rank must know."""
        self._worker.init_train_context(**context)


def _import_the_rest() -> None:
    """Import what every rank uses. Whoever imports it meanwhile waits for it."""
    try:
        import lepton_ray.training.loop  # noqa: F401
    except Exception:  # noqa: BLE001, S110 - the rank's function meets it again, where it is told
        pass
    finally:
        gc.freeze()  # modules stay: later collections need not look through them
        gc.enable()
