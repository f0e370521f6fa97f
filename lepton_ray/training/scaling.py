"""What Ray Train's controller asks for the number of ranks of an elastic run.

Ray's own elastic policy ends a running group wherever it is when there is room for more, and asks an actor of its own
for what is free. Here a group that starts takes what fits, and a running one is asked to leave by itself: its ranks do
so at their next checkpoint, so that growing costs no step.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

from ray.train.v2._internal.execution.scaling_policy import (  # noqa: TID251 - a part of the door
    NoopDecision,
    ResizeDecision,
    ScalingDecision,
    ScalingPolicy,
)

from lepton_ray.training.room import Elastic, Growth, cluster_room

_log = logging.getLogger(__name__)
LOOK_S = 2.0
"""Seconds between two looks at what is free, while a group runs."""


class ElasticPolicy(ScalingPolicy):  # type: ignore[misc] # Ray is untyped here
    """Says how many ranks the next group has, and asks the present one to leave where there is room for more.

    Args:
        scaling_config: Ray Train's.
        first: ranks of the first group.
        elastic: the range.
        resources: of each rank.
        placed: gives the placement group that the run holds, None where there is none.
        resized: told how many ranks the next group has.
    """

    def __init__(
        self,
        scaling_config: Any,
        first: int,
        elastic: Elastic,
        resources: dict[str, float],
        placed: Callable[[], Any],
        resized: Callable[[int], None],
    ) -> None:
        super().__init__(scaling_config)
        self._first, self._elastic, self._resources = first, elastic, resources
        self._placed, self._resized = placed, resized
        self._growth = Growth(elastic.most, elastic.grow_after_s)
        self._started = self._asked = self._told = False
        self._looked = 0.0

    def room(self) -> int:
        """Ranks that there is room for, those that the run holds included."""
        return min(self._elastic.most, cluster_room(self._resources, self._placed()))

    def _known_room(self) -> int | None:
        """The same; None where the cluster does not say, which is no reason to end a run."""
        try:
            return self.room()
        except Exception as error:  # noqa: BLE001 - whatever Ray raises while its head is away
            _log.warning("what is free is not known: %s", error)
            return None

    def make_decision_for_non_running_worker_group(self) -> ScalingDecision:
        """As many as fit; nothing is started where that is fewer than the run may have."""
        self._maybe_send_resource_request()
        count = self._known_room() if self._started else self._first
        if count is None:
            return NoopDecision()
        if count < self._elastic.least:
            if not self._told:
                self._told = True
                _log.warning(
                    "there is room for %d ranks, training.workers.min is %d: waiting", count, self._elastic.least
                )
            return NoopDecision()
        self._started, self._asked, self._told = True, False, False
        self._growth.forget()
        self._resized(count)
        return ResizeDecision(num_workers=count, resources_per_worker=dict(self._resources))

    def make_decision_for_running_worker_group(
        self, worker_group_state: Any, worker_group_status: Any
    ) -> ScalingDecision:
        """Always that the group stays; where there is room for more, its ranks are asked to leave."""
        self._maybe_send_resource_request()
        now = time.monotonic()
        if not self._asked and now - self._looked >= LOOK_S:
            self._looked = now
            room = self._known_room()
            target = self._growth.seen(now, worker_group_state.num_workers, room) if room is not None else None
            if target is not None:
                self._asked = True
                _log.warning("there is room for %d ranks: growing at the next checkpoint", target)
                for worker in worker_group_state.workers:
                    worker.actor.make_room.remote()
        return NoopDecision()

    def _get_num_workers_for_resource_request(self) -> int:
        return self._elastic.most
