"""Ray Train's controller of one run, in an actor that the driver starts.

Ray Train's own way (`trainer.fit()`) has the driver import all of Ray Train, and gives the controller and the ranks a
runtime environment, so that none of them can take one of the idle workers that Ray keeps ready. Here the driver names
what is to be run, the controller's process alone imports Ray Train, and both it and the ranks' hosts take the job's own
environment. What the controller does is Ray Train's: group, health checks, failures, preemption.
"""

from __future__ import annotations

import gc
import os
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

PREEMPTION_WATCH_AFTER_S = 10.0
"""Seconds after the start of a worker group before its preemption watcher, one more process, is started: preemptions
are told half a minute ahead at least, and at first the machine has better things to do."""
UNUSED = ("PlacementGroupCleanerCallback", "DatasetsCallback")
"""Callbacks of Ray Train that start a process each: the driver removes what a dead controller leaves, and ranks read
their rows themselves."""


@dataclass(frozen=True)
class Order:
    """What is to be run."""

    name: str
    """Unique, also the prefix of the placement groups' names."""
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


@dataclass
class FirstGroup:
    """What the driver has started already of the first worker group."""

    placement: Any = None
    """Its placement group; asked for, perhaps not there yet."""
    hosts: Sequence[Any] = ()
    """Handles of its `RayTrainWorkerHost` actors, by bundle."""


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
            self._controller = _make(order, self._first)
        finally:
            gc.enable()

    async def run(self, placement: Any = None, hosts: Sequence[Any] = ()) -> Outcome:
        """Run to the end, over all worker groups; the first one on these hosts in this placement group."""
        self._first.placement, self._first.hosts = placement, hosts
        await self._controller.run()
        result = self._controller.get_result()
        if result.error is None:
            return Outcome(result.return_value)
        from lepton_ray.training.launch import explain

        return Outcome(error=explain(result.error), details="".join(traceback.format_exception(result.error)))

    async def abort(self) -> None:
        """Stop the ranks and end this process."""
        await self._controller.abort()

    async def get_all_reported_checkpoints(self, *arguments: Any, **named: Any) -> Any:
        """For ranks that use Ray Train's own checkpoints."""
        return await self._controller.get_all_reported_checkpoints(*arguments, **named)


def _make(order: Order, first: FirstGroup) -> Any:
    """Ray Train's controller with our scaling policy, worker group and callbacks."""
    from ray.train import FailureConfig, RunConfig, ScalingConfig  # noqa: TID251 - a part of the door
    from ray.train.v2._internal.execution.controller import TrainController  # noqa: TID251
    from ray.train.v2._internal.execution.failure_handling import create_failure_policy  # noqa: TID251
    from ray.train.v2._internal.execution.scaling_policy import create_scaling_policy  # noqa: TID251
    from ray.train.v2._internal.util import ObjectRefWrapper  # noqa: TID251
    from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer  # noqa: TID251

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
        run_config=RunConfig(
            name=order.name,
            storage_path=order.scratch,
            failure_config=FailureConfig(max_failures=order.max_failures),
        ),
    )
    policy = create_scaling_policy(trainer.scaling_config)
    if order.local:  # no autoscaler to talk to: one process less
        for name in ("_send_resource_request", "_maybe_send_resource_request", "_cancel_resource_request"):
            setattr(policy, name, lambda: None)
    kind = type("Controller", (TrainController,), {"worker_group_cls": _group_class(order, first)})
    controller = kind(
        train_fn_ref=ObjectRefWrapper(trainer._get_train_func()),  # noqa: SLF001 - as DataParallelTrainer.fit does
        train_run_context=trainer.train_run_context,
        scaling_policy=policy,
        failure_policy=create_failure_policy(trainer.run_config.failure_config),
        callbacks=[c for c in trainer._create_default_callbacks() if type(c).__name__ not in UNUSED],  # noqa: SLF001
    )
    _watch_preemptions_later(controller)
    return controller


def _group_class(order: Order, first: FirstGroup) -> Any:
    """A worker group whose first start takes the hosts that the driver has started already."""
    from ray.train.v2._internal.execution.worker_group import Worker, WorkerGroup  # noqa: TID251
    from ray.train.v2._internal.execution.worker_group.placement_group_handle import (  # noqa: TID251
        DefaultPlacementGroupHandle,
    )

    from lepton_ray.training.rank_host import RayTrainWorkerHost

    starts: list[int] = []

    class Group(WorkerGroup):  # type: ignore[misc] # Ray is untyped here
        _worker_cls = RayTrainWorkerHost

        def _create_placement_group(self, scaling_config: Any, context: Any) -> Any:
            import ray

            starts.append(context.num_workers)
            if len(starts) == 1 and first.placement is not None:
                return DefaultPlacementGroupHandle(first.placement)
            # named, so that the driver finds it should this process die
            bundles = [context.resources_per_worker] * context.num_workers
            name = f"{order.name}-{len(starts)}"
            return DefaultPlacementGroupHandle(
                ray.util.placement_group(bundles, strategy=context.placement_strategy, name=name)
            )

        def _create_workers(
            self, num_workers: int, placement_group: Any, resources_per_worker: dict[str, float], **options: Any
        ) -> list[Any]:
            if placement_group is not first.placement or num_workers != len(first.hosts):
                made: list[Any] = super()._create_workers(num_workers, placement_group, resources_per_worker, **options)
                return made
            return _workers_of(first.hosts, resources_per_worker, Worker, WorkerGroup)

    return Group


def _workers_of(hosts: Sequence[Any], resources: dict[str, float], worker: Any, group: Any) -> list[Any]:
    """The hosts as Ray Train's workers, with their ranks."""
    import ray
    from ray.exceptions import RayActorError
    from ray.train.v2._internal.exceptions import WorkerGroupStartupFailedError  # noqa: TID251

    try:
        found = ray.get([host.get_metadata.remote() for host in hosts])
    except RayActorError as error:  # the group is started again, by Ray Train
        raise WorkerGroupStartupFailedError(f"a rank's process did not start: {error}") from error
    workers = [
        worker(host, about, resources, placement_group_bundle_index=bundle)
        for bundle, (host, about) in enumerate(zip(hosts, found, strict=True))
    ]
    ranked: list[Any] = group._assign_worker_ranks(workers, 0, None, None)  # noqa: SLF001 - as its _create_workers does
    return ranked


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
