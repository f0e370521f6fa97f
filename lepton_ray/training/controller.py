"""Ray Train's controller of one run, in an actor that the driver starts.

Ray Train's own way (`trainer.fit()`) has the driver import all of Ray Train, and gives the controller and the ranks a
runtime environment, so that none of them can take one of the idle workers that Ray keeps ready. Here the driver names
what is to be run, the controller's process alone imports Ray Train, and both it and the ranks' hosts take the job's own
environment. What the controller does is Ray Train's: health checks, failures, preemption; the groups of ranks are those
of `worker_group`.
"""

from __future__ import annotations

import gc
import os
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lepton_ray.training.room import Elastic
from lepton_ray.training.worker_group import FirstGroup, Restart, group_class

PREEMPTION_WATCH_AFTER_S = 10.0
"""Seconds after the start of a worker group before its preemption watcher, one more process, is started: preemptions
are told half a minute ahead at least, and at first the machine has better things to do."""
POLL_S, POLL_PER_RANK_S = 0.5, 0.005
"""Seconds between two looks at the ranks: at least so many, and so many for each rank."""
WAIT_S = 1.0
"""Seconds between two looks for room, while there is too little for the ranks."""
UNUSED = ("PlacementGroupCleanerCallback", "DatasetsCallback")
"""Callbacks of Ray Train that start a process each: the driver removes what a dead controller leaves, and ranks read
their rows themselves."""


@dataclass(frozen=True)
class Order:
    """What is to be run."""

    name: str
    """Unique, also the prefix of the placement groups' names."""
    run: str
    attempt: int
    store_uri: str
    function: Callable[[dict[str, Any]], Any]
    config: dict[str, Any]
    workers: int
    resources: dict[str, float]
    """Of each worker."""
    gpu: bool
    max_failures: int
    scratch: str
    """A folder of the driver's node for what Ray Train insists on writing."""
    local: bool
    """A local cluster: nobody adds nodes to it or takes them away."""
    environment: Mapping[str, str] = field(default_factory=dict)
    elastic: Elastic | None = None
    """The range of the number of workers, where it is not fixed; `workers` is that of the first group."""
    standby: bool = True
    """Whether to keep a process ready on each node that takes a lost rank's place."""


@dataclass(frozen=True)
class Outcome:
    """How a run ended. Plain values, so that the driver needs no Ray Train to read it."""

    value: Any = None
    """What rank 0 returned."""
    error: str | None = None
    """The cause in one line, where the run gave up."""
    details: str = ""
    """The traceback of the cause."""


class RunController:
    """The actor. Its method names are those of Ray Train's controller, which ranks may call."""

    def __init__(self, order: Order) -> None:
        os.environ.update(order.environment)
        # the controller waits for ranks inside its event loop, on purpose
        os.environ.setdefault("RAY_WARN_BLOCKING_GET_INSIDE_ASYNC", "0")
        self._first = FirstGroup()
        gc.disable()  # a collection in the midst of imports finds nothing to free
        try:
            self._policy, self._controller = _make(order, self._first)
        finally:
            gc.enable()

    async def run(self, placement: Any = None, hosts: Sequence[Any] = ()) -> Outcome:
        """Run to the end, over all worker groups; the first one on these hosts in this placement group."""
        self._first.placement, self._first.hosts = placement, hosts
        await self._controller.run()
        result = self._controller.get_result()
        if result.error is None:
            return Outcome(result.return_value)
        from lepton_ray.training.failures import explain

        return Outcome(
            error=self._policy.gave_up or explain(result.error),
            details="".join(traceback.format_exception(result.error)),
        )

    async def abort(self) -> None:
        """Stop the ranks and end this process."""
        await self._controller.abort()

    async def get_all_reported_checkpoints(self, *arguments: Any, **named: Any) -> Any:
        """For ranks that use Ray Train's own checkpoints."""
        return await self._controller.get_all_reported_checkpoints(*arguments, **named)


def _make(order: Order, first: FirstGroup) -> tuple[Any, Any]:
    """Our failure policy, and Ray Train's controller with it, our worker group and our callbacks."""
    from ray.train import RunConfig, ScalingConfig  # noqa: TID251 - a part of the door
    from ray.train.v2._internal.util import ObjectRefWrapper  # noqa: TID251
    from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer  # noqa: TID251

    from lepton_ray.training.failure_handling import RunFailurePolicy
    from lepton_ray.training.failure_policy import Limits
    from lepton_ray.training.process_group import RankGroup

    # Ray's own checkpoints are not used, and its folder has a new name each time: what a run is resumed from is the
    # store alone
    trainer = DataParallelTrainer(
        order.function,
        train_loop_config=order.config,
        backend_config=RankGroup(),
        scaling_config=ScalingConfig(
            num_workers=order.workers, use_gpu=order.gpu, resources_per_worker=dict(order.resources)
        ),
        run_config=RunConfig(name=order.name, storage_path=order.scratch),
    )
    policy = RunFailurePolicy(
        order.store_uri, order.run, order.attempt, Limits(max_failures=order.max_failures), workers=order.workers,
        minimum=order.elastic.least if order.elastic else None,
    )  # fmt: skip
    restart = Restart(
        name=order.name, resources=dict(order.resources), gpu=order.gpu, environment=dict(order.environment),
        standby=order.standby, first=first,
    )  # fmt: skip
    scaling = _scaling(order, trainer.scaling_config, restart, policy)
    if order.local:  # no autoscaler to talk to: one process less
        for name in ("_send_resource_request", "_maybe_send_resource_request", "_cancel_resource_request"):
            setattr(scaling, name, lambda: None)

    controller = _controller_class(restart, policy)(
        train_fn_ref=ObjectRefWrapper(trainer._get_train_func()),  # noqa: SLF001 - as DataParallelTrainer.fit does
        train_run_context=trainer.train_run_context,
        scaling_policy=scaling,
        failure_policy=policy,
        callbacks=[c for c in trainer._create_default_callbacks() if type(c).__name__ not in UNUSED],  # noqa: SLF001
    )
    # each poll is one call per rank: of few ranks they may come often, and a lost one is noticed by them
    controller._health_check_interval_s = max(POLL_S, order.workers * POLL_PER_RANK_S)  # noqa: SLF001
    _watch_preemptions_later(controller)
    return policy, controller


def _scaling(order: Order, config: Any, restart: Restart, policy: Any) -> Any:
    """Ray Train's policy for a fixed number of ranks, ours for an elastic run."""
    if order.elastic is None:
        from ray.train.v2._internal.execution.scaling_policy import create_scaling_policy  # noqa: TID251

        return create_scaling_policy(config)
    from lepton_ray.training.scaling import ElasticPolicy

    def resized(count: int) -> None:
        policy.workers = count

    scaling = ElasticPolicy(
        config, order.workers, order.elastic, dict(order.resources), lambda: restart.placed, resized
    )
    policy.room = restart.room = scaling.room
    return scaling


def _controller_class(restart: Restart, policy: Any) -> Any:
    """Ray Train's controller: its groups follow one another in place, after the pause that the policy asks for."""
    import asyncio

    from ray.train.v2._internal.execution.controller import TrainController  # noqa: TID251

    class Controller(TrainController):  # type: ignore[misc] # Ray is untyped here
        worker_group_cls = group_class(restart, policy.watch_memory)
        _paused: Any = None

        async def _step(self) -> Any:
            if policy.last is not self._paused:
                self._paused = policy.last
                await asyncio.sleep(policy.pause_s)
            result = await super()._step()
            if result.next_state is result.previous_state:  # no room for the ranks yet
                await asyncio.sleep(WAIT_S)
            return result

        def _execute_resize_decision(self, decision: Any) -> Any:
            restart.in_place = True  # a group that is shut down in here is followed by another
            try:
                return super()._execute_resize_decision(decision)
            finally:
                restart.in_place = False

    return Controller


def _watch_preemptions_later(controller: Any) -> None:
    """Put off the start of the preemption watcher's process until the ranks have begun."""
    import time

    from ray.train.v2._internal.callbacks.preemption_callback import PreemptionCallback  # noqa: TID251

    class Later(PreemptionCallback):  # type: ignore[misc] # Ray is untyped here
        _group: Any = None
        _started = 0.0

        def after_worker_group_start(self, worker_group: Any) -> None:
            self._stop_watcher()
            self._group, self._started = worker_group, time.monotonic()

        def after_worker_group_poll_status(self, worker_group_status: Any) -> None:
            if self._group is not None and time.monotonic() - self._started > PREEMPTION_WATCH_AFTER_S:
                group, self._group = self._group, None
                super().after_worker_group_start(group)

        def _stop_watcher(self) -> None:
            self._group = None
            super()._stop_watcher()

    callbacks = controller._worker_group_callbacks_to_propagate  # noqa: SLF001 - Ray Train makes it without being asked
    for position, callback in enumerate(callbacks):
        if type(callback) is PreemptionCallback:
            callbacks[position] = Later()
