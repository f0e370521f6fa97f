"""Starting the ranks with Ray Train, and what their failures mean."""

from __future__ import annotations

import threading
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from lepton_ray.cluster import Cluster, scratch_folder
from lepton_ray.errors import LeptonError, UsageError, escaped
from lepton_ray.settings import TrainingSettings
from lepton_ray.training.plan import RankPlan


@dataclass(frozen=True)
class RankInputs:
    """References to the rows of a run in Ray's object store: one copy per node, shared by its ranks."""

    train: Any
    held_out: Any


def run_rank(config: dict[str, Any]) -> dict[str, Any]:
    """What Ray Train calls in each worker process."""
    import ray
    import torch.distributed as dist

    from lepton_ray.training.loop import train
    from lepton_ray.training.process_group import join
    from lepton_ray.training.rank import Rank

    plan: RankPlan = config["plan"]
    rows: RankInputs = config["rows"]
    device = join(gpu=plan.settings.training.gpu)
    tables: list[pa.Table] = ray.get([rows.train, rows.held_out])
    rank = Rank(plan, tables[0], tables[1], device)
    try:
        outcome = train(rank)
    finally:
        rank.close()
    dist.destroy_process_group()
    return outcome


def check_resources(settings: TrainingSettings, cluster: Cluster, resources: dict[str, float]) -> None:
    """Raise UsageError where the cluster cannot hold the workers, with the largest number that fits."""
    wanted = {"CPU": settings.cpus_per_worker, **({"GPU": 1} if settings.gpu else {})}
    most = min(int(resources.get(kind, 0) // amount) for kind, amount in wanted.items())
    if settings.workers > most:
        needs = " and ".join(f"{amount * settings.workers} {kind}" for kind, amount in wanted.items())
        has = " and ".join(f"{resources.get(kind, 0):g} {kind}" for kind in wanted)
        where = "this machine" if cluster.local else "the cluster"
        raise UsageError(
            f"training.workers is {settings.workers}: needs {needs}, {where} has {has}; "
            f"set training.workers to {most} or less" + ("" if most else ", or add nodes")
        )


def launch(
    plan: RankPlan,
    train: pa.Table,
    held_out: pa.Table,
    *,
    watch: Callable[[], None],
    lost: threading.Event,
    cluster: Cluster,
    watch_every_s: float = 0.5,
) -> dict[str, Any]:
    """Run the ranks to the end of training; `watch` is called every now and then meanwhile, in this thread.

    Ray Train replaces a failed worker group up to `max_failures` times; each new group restores from the store.
    Returns what rank 0 returned. Raises LeptonError with the cause where the run gives up or the lease is lost.
    """
    import ray
    from ray.train import FailureConfig, RunConfig, ScalingConfig

    from lepton_ray.training.process_group import RankGroup

    settings = plan.settings.training
    rows = RankInputs(ray.put(train), ray.put(held_out))
    resources = {"CPU": float(settings.cpus_per_worker), **({"GPU": 1.0} if settings.gpu else {})}
    with scratch_folder() as scratch:
        # Ray's own checkpoints are not used, and its folder has a new name each time: what a run is resumed from
        # is the store alone
        trainer = _trainer_class(cluster)(
            run_rank,
            train_loop_config={"plan": plan, "rows": rows},
            backend_config=RankGroup(),
            scaling_config=ScalingConfig(
                num_workers=settings.workers, use_gpu=settings.gpu, resources_per_worker=resources
            ),
            run_config=RunConfig(
                name=f"{plan.settings.run}-{plan.attempt}-{uuid.uuid4().hex[:8]}",
                storage_path=str(scratch),
                failure_config=FailureConfig(max_failures=settings.max_failures),
            ),
        )
        outcome: list[Any] = []
        # fit() waits without end and takes over Ctrl-C when it runs in the main thread, so it does not
        thread = threading.Thread(target=_fit, args=(trainer, outcome), name="ray-train", daemon=True)
        thread.start()
        while thread.is_alive():
            thread.join(watch_every_s)
            if lost.is_set():
                raise LeptonError(f"run {plan.settings.run}: another driver took the run over; this one stops")
            watch()
    result = outcome[0]
    if isinstance(result, BaseException):
        raise LeptonError(f"run {plan.settings.run}: {explain(result)}") from result
    return dict(result.return_value)


def _trainer_class(cluster: Cluster) -> Any:
    """Ray's trainer; on a local cluster without its placement-group cleaner.

    The cleaner is one more process, which asks a dashboard that a local cluster does not have every second; what it
    cleans up is gone with the local cluster anyway.
    """
    from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

    if not cluster.local:
        return DataParallelTrainer

    class LocalTrainer(DataParallelTrainer):  # type: ignore[misc] # Ray is untyped here
        def _create_default_callbacks(self) -> list[Any]:
            made: list[Any] = super()._create_default_callbacks()
            return [callback for callback in made if type(callback).__name__ != "PlacementGroupCleanerCallback"]

    return LocalTrainer


def _fit(trainer: Any, outcome: list[Any]) -> None:
    try:
        outcome.append(trainer.fit())
    except BaseException as error:  # noqa: BLE001 - handed to the thread that waits
        outcome.append(error)


def explain(error: BaseException) -> str:
    """The cause of a failed run in one line: the error of the rank that failed first, not of those who waited."""
    failures = dict(getattr(error, "worker_failures", {}) or {})
    if not failures:
        return escaped(str(error).strip().splitlines()[-1] if str(error).strip() else type(error).__name__, 300)

    def waited(cause: BaseException) -> bool:
        return any(word in str(cause) for word in ("gloo", "Connection closed by peer", "Connection reset by peer"))

    number, cause = min(failures.items(), key=lambda item: (waited(item[1]), item[0]))
    lines = [line for line in str(getattr(cause, "cause", None) or cause).strip().splitlines() if line.strip()]
    return f"rank {number} failed: {escaped(lines[-1] if lines else type(cause).__name__, 300)}"
