"""What the start of the ranks relies on in Ray Train, and how failures are told; without starting Ray."""

from __future__ import annotations

import inspect
import threading
from datetime import timedelta

import pytest
import torch.distributed as dist
from ray.train.v2._internal.execution.callback import WorkerGroupCallback  # noqa: TID251 - the seams themselves
from ray.train.v2._internal.execution.controller import TrainController  # noqa: TID251 - the seams themselves
from ray.train.v2._internal.execution.scaling_policy import (  # noqa: TID251 - the seams themselves
    ElasticScalingPolicy,
    FixedScalingPolicy,
)
from ray.train.v2._internal.execution.worker_group import (  # noqa: TID251 - the seams themselves
    ActorMetadata,
    RayTrainWorker,
    WorkerGroup,
    WorkerGroupContext,
    state,
    worker_group,
)
from ray.train.v2._internal.execution.worker_group.placement_group_handle import (  # noqa: TID251 - the seams themselves
    DefaultPlacementGroupHandle,
)
from ray.train.v2._internal.execution.worker_group.state import WorkerGroupState  # noqa: TID251 - the seams themselves

from lepton_ray.training import process_group
from lepton_ray.training.controller import RunController
from lepton_ray.training.launch import explain
from lepton_ray.training.rank_host import BUSY, LEAVING, READY, RayTrainWorkerHost
from lepton_ray.training.worker_group import FirstGroup, Restart, group_class


def public(kind: type) -> set[str]:
    return {name for name, _ in inspect.getmembers(kind, inspect.isfunction) if not name.startswith("_")}


def test_host_can_all_that_ray_trains_worker_can():
    """The controller calls a host as it calls Ray Train's own worker; another version's new method shows here."""
    assert public(RayTrainWorkerHost) == public(RayTrainWorker) | {"rest", "make_room"}


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
        (WorkerGroup, "shutdown", ["self"]),
        (WorkerGroup, "_clear_state", ["self"]),
        (state, "_shutdown_sync_actor", ["sync_actor"]),
        (ElasticScalingPolicy, "make_decision_for_non_running_worker_group", ["self"]),
        (
            ElasticScalingPolicy,
            "make_decision_for_running_worker_group",
            ["self", "worker_group_state", "worker_group_status"],
        ),
        (DefaultPlacementGroupHandle, "wait", ["self", "timeout_seconds"]),
        (WorkerGroup, "poll_status", ["self", "timeout"]),
        (TrainController, "_step", ["self"]),
        (TrainController, "_execute_resize_decision", ["self", "decision"]),
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


class Call:
    """A method of a handle, and a reference to what it gave."""

    def __init__(self, outcome: object) -> None:
        self.outcome = outcome

    def remote(self, *_: object) -> Call:
        return Call(self.outcome)


class Host:
    """A handle that answers at once: where its process runs, and what it says after a failure."""

    def __init__(self, node: str, says: str = READY) -> None:
        about = ActorMetadata(hostname="h", node_id=node, node_ip="10.0.0.1", pid=1, accelerator_ids={})
        self.get_metadata, self.rest, self.shutdown = Call(about), Call(says), Call(None)


class Barrier:
    """What stands for Ray Train's synchronisation actor, which nobody started."""

    def end(self) -> None:
        pass


class Cluster:
    """Ray as far as a restart asks it; keeps what was asked for."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.groups: list[str] = []
        self.made: list[Host] = []
        self.killed: list[object] = []
        self.alive = ["a", "b"]
        monkeypatch.setattr(worker_group, "SynchronizationActor", worker_group.SynchronizationActor)  # to be put back
        monkeypatch.setattr(state, "_shutdown_sync_actor", state._shutdown_sync_actor)
        for name, found in {
            "get": lambda found, **_: [one.outcome for one in found] if isinstance(found, list) else found.outcome,
            "wait": lambda refs, num_returns=1, **_: (refs[:num_returns], refs[num_returns:]),
            "kill": self.killed.append,
            "nodes": lambda: [{"NodeID": node, "Alive": node in self.alive} for node in ("a", "b")],
            "remote": lambda **_: lambda _kind: self, "get_runtime_context": lambda: self,
            "util.placement_group": lambda _bundles, name, **_: self.groups.append(name) or object(),
        }.items():  # fmt: skip
            monkeypatch.setattr(f"ray.{name}", found)

    def get_node_id(self) -> str:
        return "a"

    def options(self, **_: object) -> Cluster:
        return self

    def remote(self, *_: object) -> Host:
        self.made.append(Host("b"))
        return self.made[-1]


class Groups:
    """The groups of a run, one after the other."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *hosts: Host, gpu: bool = False) -> None:
        self.cluster = Cluster(monkeypatch)
        self.first = FirstGroup(object(), hosts)
        self.restart = Restart("run-1", {"CPU": 1.0}, gpu, {}, standby=True, first=self.first)
        self.started: list[dict[int, int]] = []
        self.kind = group_class(self.restart, self.started.append)
        self.ended: list[object] = []

    def start(self, count: int) -> list[object]:
        """The actors of the next group, by bundle."""
        group = object.__new__(self.kind)
        handle = group._create_placement_group(None, WorkerGroupContext("id", None, count, {"CPU": 1.0}))
        self.workers = group._create_workers(count, handle.placement_group, {"CPU": 1.0})
        self.handle = handle
        return [worker.actor for worker in sorted(self.workers, key=lambda one: one.placement_group_bundle_index)]

    def fail(self) -> None:
        """The group has failed, and another follows."""
        group = WorkerGroupState(0.0, self.handle, self.workers, Barrier())
        object.__setattr__(group, "shutdown", lambda: self.ended.append(group))
        self.restart.keep(group)


def test_first_group_takes_the_hosts_that_the_driver_started(monkeypatch):
    """Their ranks go by node, and nothing else is started."""
    groups = Groups(monkeypatch, Host("b"), Host("a"), Host("b"))
    assert groups.start(3) == list(groups.first.hosts)
    assert [worker.distributed_context.world_rank for worker in groups.workers] == [0, 1, 2]
    assert groups.handle.placement_group is groups.first.placement
    assert groups.started == [{worker.distributed_context.world_rank: 1 for worker in groups.workers
                               if worker.metadata.node_id == "a"}]  # fmt: skip
    assert not groups.cluster.groups
    assert not groups.cluster.made


def test_survivors_stay_and_the_lost_rank_is_replaced_in_its_place(monkeypatch):
    """The next group has the same processes and the same placement group, but for the one that did not end."""
    groups = Groups(monkeypatch, Host("a"), Host("b", says=BUSY), Host("b"))
    first = groups.start(3)
    groups.fail()
    second = groups.start(3)
    assert second == [first[0], groups.cluster.made[0], first[2]]
    assert groups.cluster.killed == [first[1]]
    assert not groups.cluster.groups
    assert not groups.ended


def test_a_standby_of_the_lost_ranks_node_takes_its_place(monkeypatch):
    """It is started some time into the group's life, and used before anything new is."""
    groups = Groups(monkeypatch, Host("b", says=BUSY), Host("b"))
    groups.start(2)
    groups.restart.stand_by(["b"])
    assert not groups.cluster.made, "a short run needs none"
    monkeypatch.setattr("lepton_ray.training.worker_group.STANDBY_AFTER_S", 0.0)
    groups.restart.stand_by(["b"])
    groups.restart.stand_by(["b"])
    (standby,) = groups.cluster.made
    groups.fail()
    assert groups.start(2)[0] is standby


@pytest.mark.parametrize("why", ["gpu", "node", "leaving", "number"])
def test_everything_is_started_anew_where_in_place_is_not_safe(monkeypatch, why):
    """On GPUs, when a node is gone or about to go, and when the number of workers changes."""
    groups = Groups(monkeypatch, Host("a"), Host("b", says=LEAVING if why == "leaving" else READY), gpu=why == "gpu")
    first = groups.start(2)
    removed: list[object] = []
    monkeypatch.setattr(type(groups.handle), "shutdown", lambda _: removed.append(None))
    groups.cluster.alive = ["a"] if why == "node" else ["a", "b"]
    groups.fail()
    count = 1 if why == "number" else 2
    second = groups.start(count)
    assert not set(second) & set(first)
    assert len(groups.cluster.made) == count
    assert groups.cluster.groups == ["run-1-2"]
    assert bool(groups.ended) != bool(removed), "the old group is ended, once"


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
