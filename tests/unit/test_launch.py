"""What the start of the ranks relies on in Ray Train, and how failures are told; without starting Ray."""

from __future__ import annotations

import inspect
import threading
from datetime import timedelta

import pytest
import torch.distributed as dist
from ray.train.v2._internal.execution.callback import WorkerGroupCallback  # noqa: TID251 - the seams themselves
from ray.train.v2._internal.execution.controller import TrainController  # noqa: TID251 - the seams themselves
from ray.train.v2._internal.execution.scaling_policy import FixedScalingPolicy  # noqa: TID251 - the seams themselves
from ray.train.v2._internal.execution.worker_group import (  # noqa: TID251 - the seams themselves
    ActorMetadata,
    RayTrainWorker,
    WorkerGroup,
    WorkerGroupContext,
)

from lepton_ray.training import process_group
from lepton_ray.training.controller import FirstGroup, Order, RunController, _group_class
from lepton_ray.training.launch import explain
from lepton_ray.training.rank_host import RayTrainWorkerHost


def public(kind: type) -> set[str]:
    return {name for name, _ in inspect.getmembers(kind, inspect.isfunction) if not name.startswith("_")}


def test_host_can_all_that_ray_trains_worker_can():
    """The controller calls a host as it calls Ray Train's own worker; another version's new method shows here."""
    assert public(RayTrainWorkerHost) == public(RayTrainWorker)


def test_controller_offers_what_ranks_and_driver_call():
    """Ranks hold a handle to our actor where Ray Train means its controller."""
    assert public(RunController) == {"run", "abort", "get_all_reported_checkpoints"}
    assert public(RunController) <= public(TrainController)


@pytest.mark.parametrize(
    ("owner", "name", "parameters"),
    [
        (WorkerGroup, "_create_placement_group", ["self", "scaling_config", "worker_group_context"]),
        (WorkerGroup, "_create_workers", ["self", "num_workers", "placement_group", "resources_per_worker"]),
        (WorkerGroup, "_assign_worker_ranks", ["workers", "starting_world_rank", "world_size", "replica_group_size"]),
        (FixedScalingPolicy, "_send_resource_request", ["self"]),
        (FixedScalingPolicy, "_maybe_send_resource_request", ["self"]),
        (FixedScalingPolicy, "_cancel_resource_request", ["self"]),
        (WorkerGroupCallback, "after_worker_group_poll_status", ["self", "worker_group_status"]),
    ],
)
def test_ray_train_has_the_seams_that_are_used(owner, name, parameters):
    """What is overridden is still there with the parameters it had; else a start would fail or silently be slow."""
    assert list(inspect.signature(getattr(owner, name)).parameters)[: len(parameters)] == parameters
    assert TrainController.worker_group_cls is WorkerGroup
    assert WorkerGroup._worker_cls is RayTrainWorker


class Host:
    """A handle that gives where its process runs, at once."""

    def __init__(self, node: str) -> None:
        self.about = ActorMetadata(hostname="h", node_id=node, node_ip="10.0.0.1", pid=1, accelerator_ids={})

    @property
    def get_metadata(self) -> Host:
        return self

    def remote(self) -> ActorMetadata:
        return self.about


def test_first_group_takes_the_hosts_that_stand_and_the_next_one_does_not(monkeypatch):
    """A placement group and processes of the driver serve once; after a failure Ray Train makes new ones, by name."""
    asked: list[str] = []
    made: list[int] = []

    def placement_group(bundles, strategy, name):
        asked.append(name)
        return object()

    monkeypatch.setattr("ray.get", lambda found: found)
    monkeypatch.setattr("ray.util.placement_group", placement_group)
    monkeypatch.setattr(WorkerGroup, "_create_workers", lambda _self, count, *_: made.append(count))
    first = FirstGroup(object(), [Host("b"), Host("a"), Host("b")])
    order = Order("run-1", print, {}, 3, {"CPU": 1.0}, False, 0, "/scratch", True)
    group = object.__new__(_group_class(order, first))
    context = WorkerGroupContext("id", None, 3, {"CPU": 1.0})

    placed = group._create_placement_group(None, context).placement_group
    workers = group._create_workers(3, placed, {"CPU": 1.0})
    assert placed is first.placement
    assert [worker.distributed_context.world_rank for worker in workers] == [0, 1, 2]
    assert {worker.actor for worker in workers} == set(first.hosts)
    assert not asked
    assert not made

    placed = group._create_placement_group(None, context).placement_group
    group._create_workers(3, placed, {"CPU": 1.0})
    assert asked == ["run-1-2"]
    assert made == [3]
    assert group._worker_cls is RayTrainWorkerHost


def test_ranks_meet_at_the_port_rank_zero_listens_on(monkeypatch):
    """The port is taken from the moment it is known, and the store then serves it."""
    monkeypatch.setattr("ray.util.get_node_ip_address", lambda: "127.0.0.1")
    address, port = process_group.listen()
    process_group.meet_at(address, port)
    listening = process_group._meeting.socket
    assert listening is not None
    master = dist.TCPStore(
        address, port, is_master=True, wait_for_workers=False, master_listen_fd=listening.detach(),
        timeout=timedelta(seconds=20),
    )  # fmt: skip
    seen = []
    other = threading.Thread(
        target=lambda: seen.append(
            dist.TCPStore(address, port, is_master=False, timeout=timedelta(seconds=20)).get("k")
        )
    )
    other.start()
    master.set("k", "v")
    other.join(20)
    assert seen == [b"v"]
    assert (process_group._meeting.address, process_group._meeting.port) == (address, port)


def test_rank_that_failed_first_is_named_and_not_those_who_waited():
    """A rank that lost its peer in a collective tells less than the peer that died."""
    failed = RuntimeError()
    failed.worker_failures = {  # type: ignore[attr-defined]
        0: RuntimeError("[gloo] Connection closed by peer"),
        1: ValueError("no space left on device"),
    }
    assert explain(failed) == "rank 1 failed: no space left on device"
    assert explain(RuntimeError("first line\nthe cause")) == "the cause"
    assert explain(RuntimeError()) == "RuntimeError"
