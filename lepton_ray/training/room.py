"""Room: how many ranks a cluster could hold, and when it has been enough for more of them for long enough.

Elastic runs (`training.workers: {min, max}`) start with what fits, go on with what is left after a loss, and grow when
there is room again. Values only, but for `cluster_room`, which asks Ray.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Elastic:
    """The range of an elastic run's ranks."""

    least: int
    most: int
    grow_after_s: float
    """Seconds for which there must be room for more before the run grows."""


def ranks_that_fit(
    free: Mapping[str, Mapping[str, float]], held: Mapping[str, int], resources: Mapping[str, float]
) -> int:
    """Ranks that the nodes could hold together.

    Args:
        free: what each living node has that nobody holds, by kind (CPU, GPU).
        held: ranks of this run that have their place on a node already; what lies on a lost node does not count.
        resources: of each rank.
    """
    total = 0
    for node, amounts in free.items():
        more = min(int((amounts.get(kind, 0.0) + 1e-6) // need) for kind, need in resources.items())
        total += held.get(node, 0) + more
    return total


def cluster_room(resources: Mapping[str, float], placement: Any = None) -> int:
    """Ranks that the cluster could hold now.

    Args:
        resources: of each rank.
        placement: the placement group that the run holds; None where it holds nothing.
    """
    import ray
    from ray._private.state import state

    alive = {node["NodeID"] for node in ray.nodes() if node["Alive"]}
    free = {node: amounts for node, amounts in state.available_resources_per_node().items() if node in alive}
    return ranks_that_fit(free, held_by(placement), resources)


def held_by(placement: Any) -> dict[str, int]:
    """Bundles of a placement group by node; nothing where it is gone."""
    import ray

    if placement is None:
        return {}
    found = ray.util.placement_group_table(placement)
    if not found or found.get("state") == "REMOVED":
        return {}
    held: dict[str, int] = {}
    for node in found["bundles_to_node_id"].values():
        if node:
            held[node] = held.get(node, 0) + 1
    return held


def places(placement: Any) -> int:
    """Bundles of a placement group that lie on living nodes."""
    import ray

    alive = {node["NodeID"] for node in ray.nodes() if node["Alive"]}
    return sum(count for node, count in held_by(placement).items() if node in alive)


class Growth:
    """Says when there has been room for more ranks for long enough.

    Args:
        most: ranks that the run never has more of.
        hold_s: seconds for which there must be room without a break.
    """

    def __init__(self, most: int, hold_s: float) -> None:
        self._most, self._hold_s = most, hold_s
        self._since: float | None = None
        self._least = 0

    def seen(self, now: float, workers: int, fit: int) -> int | None:
        """How many ranks to go on with, once there has been room for them all along; None while the run stays.

        Args:
            now: seconds of a clock that only goes forward.
            workers: ranks that the run has.
            fit: ranks that there is room for, those of the run included.
        """
        fit = min(fit, self._most)
        if fit <= workers:
            self._since = None
            return None
        if self._since is None:
            self._since, self._least = now, fit
        self._least = min(self._least, fit)
        return self._least if now - self._since >= self._hold_s else None

    def forget(self) -> None:
        """Begin anew: the run has another number of ranks."""
        self._since = None
