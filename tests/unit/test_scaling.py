"""What an elastic run decides about its size, with a cluster that says what it is told to say."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from ray.train.v2._internal.execution.scaling_policy import NoopDecision, ResizeDecision  # noqa: TID251 - the seams

from lepton_ray.training import scaling
from lepton_ray.training.room import Elastic
from lepton_ray.training.scaling import ElasticPolicy


class Cluster:
    """Says how many ranks there is room for, and keeps what is asked of the ranks."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, first: int = 2, **changes: Any) -> None:
        self.room: int | Exception = first
        self.sizes: list[int] = []
        self.asked = 0
        elastic = Elastic(**{"least": 1, "most": 4, "grow_after_s": 0.0, **changes})
        self.policy = ElasticPolicy(None, first, elastic, {"CPU": 1.0}, lambda: None, self.sizes.append)
        monkeypatch.setattr(self.policy, "_maybe_send_resource_request", lambda: None)
        monkeypatch.setattr(scaling, "cluster_room", lambda *_: self._told())
        monkeypatch.setattr(scaling, "LOOK_S", 0.0)

    def _told(self) -> int:
        if isinstance(self.room, Exception):
            raise self.room
        return self.room

    def start(self) -> int | None:
        """The size of the next group; None where none is started."""
        decision = self.policy.make_decision_for_non_running_worker_group()
        return decision.num_workers if isinstance(decision, ResizeDecision) else None

    def look(self, workers: int) -> None:
        """The group of so many ranks runs, and the controller looks at it."""

        def remote() -> None:
            self.asked += 1

        host = SimpleNamespace(actor=SimpleNamespace(make_room=SimpleNamespace(remote=remote)))
        state = SimpleNamespace(num_workers=workers, workers=[host] * workers)
        assert isinstance(self.policy.make_decision_for_running_worker_group(state, None), NoopDecision)


def test_the_next_group_has_what_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first as many as the driver found room for, later ones what is left, never more than the most."""
    cluster = Cluster(monkeypatch)
    cluster.room = 9
    assert cluster.start() == 2
    assert cluster.start() == 4
    cluster.room = 1
    assert cluster.start() == 1
    assert cluster.sizes == [2, 4, 1]


def test_too_little_room_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is started below the least, nor while the cluster does not answer."""
    cluster = Cluster(monkeypatch, least=2)
    assert cluster.start() == 2
    cluster.room = 1
    assert cluster.start() is None
    cluster.room = RuntimeError("the head is away")
    assert cluster.start() is None
    cluster.room = 3
    assert cluster.start() == 3


def test_a_running_group_is_asked_once_to_make_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each rank is told, once; a cluster that does not answer changes nothing."""
    cluster = Cluster(monkeypatch)
    cluster.start()
    cluster.room = RuntimeError("the head is away")
    cluster.look(2)
    cluster.room = 2
    cluster.look(2)
    assert not cluster.asked
    cluster.room = 3
    cluster.look(2)
    cluster.look(2)
    assert cluster.asked == 2
    assert cluster.start() == 3
    cluster.room = 4
    cluster.look(3)
    assert cluster.asked == 5
