"""Starting the ranks with Ray Train, and what their failures mean."""

from __future__ import annotations

import contextlib
import os
import threading
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from lepton_ray.cluster import Cluster, scratch_folder
from lepton_ray.errors import LeptonError, UnavailableError, UsageError
from lepton_ray.settings import TrainingSettings
from lepton_ray.training.controller import Order, Outcome, RunController
from lepton_ray.training.failures import explain
from lepton_ray.training.plan import OwnFunction, RankPlan, RankWork, TaskRows
from lepton_ray.training.rank_host import RayTrainWorkerHost
from lepton_ray.training.room import Elastic, cluster_room

PASSED_ON = ("RAY_TRAIN_", "RAY_CHDIR_TO_TRIAL_DIR", "NCCL_", "TORCHFT_")
"""Beginnings of the driver's environment variables that the controller and the ranks get too."""
ABORT_S = 10.0
"""Seconds that the controller is given to stop the ranks before it is killed."""


def run_rank(config: dict[str, Any]) -> dict[str, Any]:
    """What Ray Train calls in each worker process; what rank 0 returns is what the driver records."""
    from lepton_ray.training.allocator import keep_freed_memory
    from lepton_ray.training.compiler_door import keep_compiler_out
    from lepton_ray.training.process_group import join, leave

    plan: RankPlan = config["plan"]
    work: RankWork = config["work"]
    keep_freed_memory()
    if not plan.settings.training.precision.compile:
        keep_compiler_out()
    device = join(gpu=plan.settings.training.gpu)
    try:
        if isinstance(work, OwnFunction):
            from lepton_ray.training.own_loop import run_own_loop

            return run_own_loop(plan, work, device)
        from lepton_ray.training.loop import run_task

        return run_task(plan, work, device, feed_folder(plan.settings.run, plan.attempt))
    finally:
        leave()


def check_resources(settings: TrainingSettings, cluster: Cluster, resources: dict[str, float]) -> None:
    """Raise UsageError where the cluster cannot hold the workers, with the largest number that fits."""
    wanted = {"CPU": settings.cpus_per_worker, **({"GPU": 1} if settings.gpu else {})}
    most = min(int(resources.get(kind, 0) // amount) for kind, amount in wanted.items())
    least, key = (
        settings.fewest_workers,
        "training.workers" if settings.grow_after_s is None else "training.workers.min",
    )
    if least > most:
        needs = " and ".join(f"{amount * least} {kind}" for kind, amount in wanted.items())
        has = " and ".join(f"{resources.get(kind, 0):g} {kind}" for kind in wanted)
        where = "this machine" if cluster.local else "the cluster"
        raise UsageError(
            f"{key} is {least}: needs {needs}, {where} has {has}; "
            f"set {key} to {most} or less" + ("" if most else ", or add nodes")
        )


def first_workers(settings: TrainingSettings, resources: dict[str, float]) -> int:
    """Ranks of the first group: as many as there is room for now, within the range that the settings give."""
    if settings.grow_after_s is None:
        return settings.most_workers
    return max(settings.fewest_workers, min(settings.most_workers, cluster_room(resources)))


def launch(
    plan: RankPlan,
    work: RankWork,
    *,
    watch: Callable[[], None],
    lost: threading.Event,
    cluster: Cluster,
    watch_every_s: float = 0.5,
) -> dict[str, Any]:
    """Run the ranks to the end of training; `watch` is called every now and then meanwhile, in this thread.

    Ray Train replaces a failed worker group up to `max_failures` times; each new group restores from the store.
    Returns what rank 0 returned. Raises LeptonError with the cause where the run gives up or the lease is lost,
    UnavailableError where the controller's process or the cluster is gone.
    """
    import ray

    run = plan.settings.run
    if isinstance(work, TaskRows):  # one copy per node, shared by its ranks
        work = TaskRows(ray.put(work.train), ray.put(work.held_out))
    with scratch_folder() as scratch, _started(plan, work, scratch, cluster) as ending:
        while not ray.wait([ending], timeout=watch_every_s)[0]:
            if lost.is_set():
                raise LeptonError(f"run {run}: another driver took the run over; this one stops")
            watch()
        try:
            outcome: Outcome = ray.get(ending)
        except ray.exceptions.RayError as error:  # the controller's own process is gone, or never stood
            raise UnavailableError(f"run {run}: Ray Train's controller failed: {explain(error)}") from error
    if outcome.error is not None:
        raise LeptonError(f"run {run}: {outcome.error}") from RuntimeError(outcome.details)
    return dict(outcome.value)


@contextlib.contextmanager
def _started(plan: RankPlan, work: RankWork, scratch: Path, cluster: Cluster) -> Iterator[Any]:
    """The run's outcome to be (an object reference): Ray Train's controller and the first worker group, started.

    At the end of the block nothing of them is left, however it is ended.
    """
    import ray

    settings = plan.settings.training
    resources = {"CPU": float(settings.cpus_per_worker), **({"GPU": 1.0} if settings.gpu else {})}
    # what Ray Train hands on to its processes; not as a runtime environment, which would rule out Ray's idle workers
    environment = {key: value for key, value in os.environ.items() if key.startswith(PASSED_ON)}
    grow_after_s = settings.grow_after_s
    elastic = None
    if grow_after_s is not None:
        elastic = Elastic(settings.fewest_workers, settings.most_workers, grow_after_s)
    order = Order(
        name=f"{plan.settings.run}-{plan.attempt}-{uuid.uuid4().hex[:8]}", run=plan.settings.run,
        attempt=plan.attempt, store_uri=plan.store_uri, function=run_rank,
        config={"plan": plan, "work": work}, workers=first_workers(settings, resources),
        resources=resources, gpu=settings.gpu,
        max_failures=settings.max_failures, scratch=str(scratch), local=cluster.local, environment=environment,
        standby=settings.standby, elastic=elastic,
    )  # fmt: skip
    # beside the driver, whose scratch folder it uses; first, since the ranks wait for it longer than it for them
    here = {"ray.io/node-id": ray.get_runtime_context().get_node_id()}
    controller = ray.remote(num_cpus=0, label_selector=here)(RunController).remote(order)
    try:
        yield controller.run.remote(*_hosts(order))
    except BaseException:
        with contextlib.suppress(ray.exceptions.RayError):  # it ends itself, and with it the call
            ray.wait([controller.abort.remote()], timeout=ABORT_S)
        raise
    finally:
        ray.kill(controller)
        _remove_placement_groups(order.name)


def _hosts(order: Order) -> tuple[Any, list[Any]]:
    """The placement group and the processes of the first worker group, asked for but not waited for."""
    import ray
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    placement = ray.util.placement_group([order.resources] * order.workers, strategy="PACK", name=f"{order.name}-0")
    host = ray.remote(num_cpus=order.resources["CPU"], num_gpus=order.resources.get("GPU", 0))(RayTrainWorkerHost)
    places = (PlacementGroupSchedulingStrategy(placement, bundle) for bundle in range(order.workers))
    return placement, [host.options(scheduling_strategy=place).remote(order.environment) for place in places]


def _remove_placement_groups(name: str) -> None:
    """Give back what a worker group held, with all processes in it: a controller that died could not."""
    import ray

    for found in ray.util.placement_group_table().values():
        if found["name"].startswith(f"{name}-") and found["state"] != "REMOVED":
            with contextlib.suppress(ValueError):  # gone meanwhile
                ray.util.remove_placement_group(ray.util.get_placement_group(found["name"]))


def feed_folder(run: str, attempt: int) -> Path:
    """Where the ranks of this node keep the decoded rows of an attempt: in the session folder of the node's Ray."""
    import ray

    node = ray._private.worker._global_node  # noqa: SLF001 - the only way to the session folder
    return Path(node.get_session_dir_path()) / "lepton-ray-feed" / f"{run}-{attempt}"
