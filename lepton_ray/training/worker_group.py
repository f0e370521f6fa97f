"""Ray Train's worker group, restarted in place: the processes that survived a failure stay, the lost one is replaced.

Ray Train ends all processes of a group when one of them fails, and starts new ones, which import torch and everything
else anew: seconds of CPU each. Here a survivor's function ends with an error (a collective fails when a rank is gone),
its process stays, and so do the placement group and what each node holds in shared memory. The lost rank's place is
taken by a standby of its node, a process that has imported everything already, or by a new process in the same bundle.

Where that is not safe, everything is started anew, as Ray Train does it: on GPUs (a failed collective can leave the
device's context unusable), when a node is gone or about to go, and when the number of workers changes.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

from lepton_ray.training.barrier import LateBarrier, LateBarriers
from lepton_ray.training.rank_host import BUSY, LEAVING, READY, RayTrainWorkerHost
from lepton_ray.training.room import places

REST_S = 5.0
"""Seconds that a survivor's function is given to end; one that does not (it hangs) is replaced too."""
STANDBY_AFTER_S = 15.0
"""Seconds after the start of a group before its standbys are started: short runs need none, and the first seconds of a
long one belong to the ranks."""
LOOK_S = 2.0
"""Seconds between two looks whether the processes of a new group still have their places."""
ANSWER_S = 2.0
"""Seconds within which an idle process must answer."""


@dataclass
class FirstGroup:
    """What the driver has started already of the first worker group."""

    placement: Any = None
    """Its placement group; asked for, perhaps not there yet."""
    hosts: Sequence[Any] = ()
    """Handles of its `RayTrainWorkerHost` actors, by bundle."""


@dataclass
class Kept:
    """What a group leaves to the one after it."""

    placement: Any
    """Ray Train's handle of the placement group."""
    hosts: dict[int, Any]
    """Survivors by bundle."""
    nodes: dict[int, str]
    """Node of each bundle."""


@dataclass
class Restart:
    """What the groups of one run hand from one to the next.

    Args:
        name: beginning of the placement groups' names.
        resources: of each worker.
        gpu: whether the workers compute on GPUs.
        environment: for new processes.
        standby: whether to keep a process ready on each node.
        first: what the driver has started.
    """

    name: str
    resources: dict[str, float]
    gpu: bool
    environment: dict[str, str]
    standby: bool
    first: FirstGroup
    in_place: bool = False
    """Whether the group that is shut down now is followed by another."""
    starts: int = 0
    """Placement groups that were asked for."""
    room: Callable[[], int] | None = None
    """Of an elastic run: gives the ranks that there is room for."""
    placed: Any = None
    """The placement group that the run holds."""
    _kept: Kept | None = None
    _standbys: dict[str, Any] = field(default_factory=dict)
    _began: float = 0.0

    def keep(self, state: Any) -> None:
        """Take over what is alive of a group; end the rest of it."""
        import ray

        answers = self._answers(state.workers)
        alive = {node["NodeID"] for node in ray.nodes() if node["Alive"]}
        nodes = {worker.placement_group_bundle_index: worker.metadata.node_id for worker in state.workers}
        if self.gpu or not set(nodes.values()) <= alive or LEAVING in answers.values():
            state.shutdown()
            return
        hosts = {
            worker.placement_group_bundle_index: worker.actor for worker in state.workers
            if answers[worker.placement_group_bundle_index] == READY
        }  # fmt: skip
        state.sync_actor.end()
        self._kept = Kept(state.placement_group_handle, hosts, nodes)

    def _answers(self, workers: Sequence[Any]) -> dict[int, str]:
        """What the processes say of themselves, by bundle; those that cannot go on are ended as soon as they say so.

        A process that stays keeps its connections: the ranks that wait for the one that failed of its own error are
        told by its end.
        """
        import ray
        from ray.exceptions import RayError

        asked = {worker.actor.rest.remote(REST_S): worker for worker in workers}
        answers = {worker.placement_group_bundle_index: BUSY for worker in workers}
        waiting, until = list(asked), time.monotonic() + REST_S + ANSWER_S
        while waiting:
            done, waiting = ray.wait(waiting, timeout=max(0.0, until - time.monotonic()))
            for reference in done or waiting:
                worker, said = asked[reference], BUSY
                with contextlib.suppress(RayError):
                    said = ray.get(reference, timeout=0)
                answers[worker.placement_group_bundle_index] = said
                if said != READY:
                    ray.kill(worker.actor)
            if not done:
                break
        return answers

    def placement(self, bundles: int, strategy: str) -> Any:
        """The placement group of the next group: the kept one where it fits, the driver's, or a new one."""
        import ray

        if self._kept is not None and len(self._kept.nodes) == bundles:
            return self._kept.placement
        self.drop()
        self.starts += 1
        if self.starts == 1 and self.first.placement is not None:
            self.placed = self.first.placement
        else:  # named, so that the driver finds it should this process die
            name = f"{self.name}-{self.starts}"
            self.placed = ray.util.placement_group([self.resources] * bundles, strategy=strategy, name=name)
        return _handle(self, self.placed, bundles)

    def hosts(self, count: int, placement: Any) -> list[Any]:
        """The actors of the next group, by bundle."""
        import ray
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        kept, self._kept = self._kept, None
        self._began = time.monotonic()
        if kept is None and placement is self.first.placement and len(self.first.hosts) == count:
            return list(self.first.hosts)
        made = ray.remote(num_cpus=self.resources["CPU"], num_gpus=self.resources.get("GPU", 0))(RayTrainWorkerHost)
        hosts = []
        for bundle in range(count):
            host = (kept.hosts.get(bundle) or self._from_standby(kept.nodes[bundle])) if kept else None
            place = PlacementGroupSchedulingStrategy(placement, bundle)
            hosts.append(host or made.options(scheduling_strategy=place).remote(self.environment))
        return hosts

    def stand_by(self, nodes: Sequence[str]) -> None:
        """Some time into a group's life: have a process ready on each of its nodes."""
        import ray

        if not self.standby or self.gpu or time.monotonic() - self._began < STANDBY_AFTER_S:
            return
        for node in nodes:
            if node not in self._standbys:
                # it holds no CPU of the cluster: it takes over those of the rank that it replaces
                host = ray.remote(num_cpus=0, label_selector={"ray.io/node-id": node})(RayTrainWorkerHost)
                self._standbys[node] = host.remote(self.environment)

    def drop(self) -> None:
        """End what was kept for a group that will not be."""
        import ray

        kept, self._kept = self._kept, None
        if kept is not None:
            for host in kept.hosts.values():
                ray.kill(host)
            kept.placement.shutdown()

    def _from_standby(self, node: str) -> Any | None:
        """The standby of a node, if it is there and answers."""
        import ray
        from ray.exceptions import RayError

        host = self._standbys.pop(node, None)
        if host is None:
            return None
        try:
            ray.get(host.get_metadata.remote(), timeout=ANSWER_S)
        except RayError:
            ray.kill(host)
            return None
        return host


def _handle(restart: Restart, placement: Any, bundles: int) -> Any:
    """Ray Train's handle of a placement group; an elastic run does not wait for one that there is no room for."""
    from ray.train.v2._internal.execution.worker_group.placement_group_handle import (  # noqa: TID251 - a part of the door
        DefaultPlacementGroupHandle,
    )

    class Handle(DefaultPlacementGroupHandle):  # type: ignore[misc] # Ray is untyped here
        def wait(self, timeout_seconds: float = 30) -> bool:
            until = time.monotonic() + timeout_seconds
            while not (ready := super().wait(min(LOOK_S, max(0.0, until - time.monotonic())))):
                if time.monotonic() >= until or (restart.room is not None and restart.room() < bundles):
                    break
            return bool(ready)

        def shutdown(self) -> None:
            restart.drop()  # survivors whose group is not to be
            super().shutdown()

    return Handle(placement)


def group_class(restart: Restart, started: Callable[[dict[int, int]], None]) -> Any:
    """Ray Train's worker group with the restart in place.

    `started` is called with the process ids of the ranks of this node, by rank, whenever there are new ones.
    """
    import ray
    from ray.train.v2._internal.execution.worker_group import Worker, WorkerGroup, state, worker_group  # noqa: TID251
    from ray.train.v2._internal.util import invoke_context_managers  # noqa: TID251

    worker_group.SynchronizationActor = LateBarriers()
    state._shutdown_sync_actor = LateBarrier.end  # noqa: SLF001 - it is no actor's handle

    class Group(WorkerGroup):  # type: ignore[misc] # Ray is untyped here
        _worker_cls = RayTrainWorkerHost

        def _create_placement_group(self, _scaling_config: Any, context: Any) -> Any:
            return restart.placement(context.num_workers, context.placement_strategy)

        def _create_workers(
            self, num_workers: int, placement_group: Any, resources_per_worker: dict[str, float], **_options: Any
        ) -> list[Any]:
            hosts = restart.hosts(num_workers, placement_group)
            workers = _workers_of(hosts, placement_group, resources_per_worker, Worker, WorkerGroup)
            here = ray.get_runtime_context().get_node_id()
            beside = [worker for worker in workers if worker.metadata.node_id == here]
            started({worker.distributed_context.world_rank: worker.metadata.pid for worker in beside})
            return workers

        def poll_status(self, timeout: float | None = None) -> Any:
            restart.stand_by(sorted({worker.metadata.node_id for worker in self.get_workers()}))
            return super().poll_status(timeout)

        def shutdown(self) -> None:
            if not (restart.in_place and self.has_started()):
                restart.drop()
                super().shutdown()
                return
            with invoke_context_managers([callback.on_worker_group_shutdown for callback in self._callbacks]):
                for callback in self._callbacks:
                    callback.before_worker_group_shutdown(self)
                restart.keep(self._worker_group_state)
                self._clear_state()
                for callback in self._callbacks:
                    callback.after_worker_group_shutdown(self._worker_group_context)

    return Group


def _workers_of(
    hosts: Sequence[Any], placement: Any, resources: dict[str, float], worker: Any, group: Any
) -> list[Any]:
    """The hosts as Ray Train's workers, with their ranks. Waits for their processes, as long as each has a place."""
    import ray
    from ray.exceptions import RayActorError
    from ray.train.v2._internal.exceptions import (  # noqa: TID251 - a part of the door
        WorkerGroupStartupFailedError,
        WorkerGroupStartupTimeoutError,
    )

    def end(failed: Exception, cause: BaseException | None = None) -> NoReturn:
        for host in hosts:
            ray.kill(host)
        raise failed from cause

    told = [host.get_metadata.remote() for host in hosts]
    waiting = told
    while waiting:
        waiting = ray.wait(waiting, num_returns=len(waiting), timeout=LOOK_S)[1]
        if waiting and places(placement) < len(hosts):
            end(WorkerGroupStartupTimeoutError(len(hosts)))
    try:
        found = ray.get(told)
    except RayActorError as error:  # the group is started again, by Ray Train
        if places(placement) < len(hosts):  # a node was lost, which a failure before has told of
            end(WorkerGroupStartupTimeoutError(len(hosts)), error)
        end(WorkerGroupStartupFailedError(f"a rank's process did not start: {error}"), error)
    workers = [
        worker(host, about, resources, placement_group_bundle_index=bundle)
        for bundle, (host, about) in enumerate(zip(hosts, found, strict=True))
    ]
    ranked: list[Any] = group._assign_worker_ranks(workers, 0, None, None)  # noqa: SLF001 - as its _create_workers does
    return ranked
