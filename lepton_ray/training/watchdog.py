"""The watchdog of a run: a thread of the driver that looks at all ranks, tells stragglers, and ends a hung rank.

It is not in the ranks' processes, so none of them can silence it. What is decided is decided purely (`hang`,
`straggler`); here it is done: an incident with the stacks of all ranks is kept with the run, and the rank that holds
the others up is killed, after which the run goes on as after any lost worker. It never stops training by a fault of its
own, and touches no process but the ranks of its own attempt.
"""

from __future__ import annotations

import contextlib
import logging
import re
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from lepton_ray.cluster import Cluster
from lepton_ray.monitoring.incidents import Incident, IncidentKind, report
from lepton_ray.storage import Store
from lepton_ray.training.beat_reading import Sighting
from lepton_ray.training.hang import JUMP_S, Limits, Observation, Reading, Verdict, decide
from lepton_ray.training.node_watch import NodeWatch
from lepton_ray.training.plan import RankPlan
from lepton_ray.training.straggler import Straggler, StragglerWatch

_log = logging.getLogger(__name__)
EVERY_S = 0.5
"""Seconds between two looks."""
NODES_EVERY_S = 5.0
"""Seconds between two questions where the ranks are, while some are not seen."""
ANSWER_S = 2.0
"""Seconds that another node is given to answer."""
STACKS_S = 2.0
"""Seconds that the ranks are given to write their stacks."""
TELL_S = 3.0
"""Seconds that the store is given to keep the incident before a rank is killed."""
STACKS_CHARACTERS = 600_000
"""Of all ranks' stacks together: an incident is one small file."""
LOG_EVERY = 240
"""Looks that fail in a row, of which one is logged."""
AGAIN = 3.0
"""Limits after which all ranks of a group are killed that is still there although its culprit was."""
_OWN = ""
"""Stands for the driver's own node."""


class Watchdog:
    """Watches the ranks of one attempt.

    Args:
        plan: what the ranks are told.
        store: where incidents are kept.
        local: whether all ranks are on this machine.
    """

    def __init__(self, plan: RankPlan, store: Store, *, local: bool) -> None:
        settings = plan.settings.training.watchdog
        self._limits = Limits(settings.floor_s, settings.factor)
        self._run, self._attempt, self._store = plan.settings.run, plan.attempt, store
        self._about = (plan.store_uri, self._run, plan.created_at, plan.attempt)
        self._local = local
        self._nodes: dict[str, Any] = {_OWN: NodeWatch(*self._about)}
        self._asked_at = 0.0
        self._generation = 0
        self._observation = Observation()
        self._stragglers = StragglerWatch()
        self._acted_at: float | None = None
        self._patience = 0.0
        self._faults = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def start(self) -> None:
        """Begin to watch."""
        self._thread.start()

    def stop(self) -> None:
        """End the watch, and remove what the ranks left for it."""
        self._stop.set()
        self._thread.join(timeout=10)
        for name, node in list(self._nodes.items()):
            with contextlib.suppress(Exception):  # the node may be gone
                self._ask(name, "clear")
                if name != _OWN:
                    import ray

                    ray.kill(node)

    def _watch(self) -> None:
        while not self._stop.wait(EVERY_S):
            try:
                self._look()
            except Exception:  # noqa: BLE001 - monitoring never stops training
                if self._faults % LOG_EVERY == 0:
                    _log.exception("run %s: a look at the ranks failed", self._run)
                self._faults += 1

    def _look(self) -> None:
        started = time.monotonic()
        seen = self._sightings()
        if time.monotonic() - started > JUMP_S:
            self._observation = Observation()  # some of it was seen long ago
            return
        ranks = [each for _, each in seen]
        if not ranks:
            return
        readings = self._observation.see(ranks)
        times = {each.rank: each.times for each in ranks}
        for straggler in self._stragglers.see(times) if all(each.settled for each in ranks) else ():
            self._tell_straggler(straggler, readings)
        if self._acted_at is not None:
            if time.monotonic() - self._acted_at >= self._patience:
                self._end_all(seen, readings)
            return
        verdict = decide(readings, ranks[0].world_size, self._limits)
        if verdict is not None:
            self._end(verdict, seen, readings)

    def _sightings(self) -> list[tuple[str, Sighting]]:
        """The ranks of the newest worker group, each with its node's name, by rank."""
        seen = [(name, each) for name in list(self._nodes) for each in self._ask(name, "sight") or ()]
        newest = max((each.generation for _, each in seen), default=0)
        if newest > self._generation:
            self._generation, self._acted_at = newest, None
            self._observation, self._stragglers = Observation(), StragglerWatch()
        seen = [(name, each) for name, each in seen if each.generation == self._generation]
        if not self._local and (not seen or len(seen) < seen[0][1].world_size):
            self._find_nodes()
        return sorted(seen, key=lambda each: each[1].rank)

    def _find_nodes(self) -> None:
        """Put a watch on each node that holds a placement group of this attempt."""
        now = time.monotonic()
        if now - self._asked_at < NODES_EVERY_S:
            return
        self._asked_at = now
        import ray

        named = re.compile(rf"{re.escape(self._run)}-{self._attempt}-[0-9a-f]{{8}}(-.*)?")
        found = {
            str(node)
            for group in ray.util.placement_group_table().values()
            if named.fullmatch(str(group["name"])) and group["state"] == "CREATED"
            for node in (group.get("bundles_to_node_id") or {}).values()
        }
        for node in found - {self._here(), *self._nodes}:
            here = {"ray.io/node-id": node}
            self._nodes[node] = ray.remote(num_cpus=0, label_selector=here)(NodeWatch).remote(*self._about)

    def _here(self) -> str:
        """The driver's own node, which it looks at itself."""
        import ray

        return str(ray.get_runtime_context().get_node_id())

    def _ask(self, name: str, method: str, *arguments: Any, within_s: float = ANSWER_S) -> Any:
        """What a node answers; None where another node does not. A watch that is gone is forgotten, to be made anew."""
        node = self._nodes.get(name)
        if node is None:
            return None
        if name == _OWN:
            return getattr(node, method)(*arguments)
        import ray

        try:
            return ray.get(getattr(node, method).remote(*arguments), timeout=within_s)
        except ray.exceptions.GetTimeoutError:
            return None
        except ray.exceptions.RayError:
            self._nodes.pop(name, None)
            return None

    def _end(self, verdict: Verdict, seen: Sequence[tuple[str, Sighting]], readings: Sequence[Reading]) -> None:
        """Keep why, and kill who is to blame, or all ranks where nobody is."""
        culprits = verdict.ranks or tuple(each.rank for each in readings)
        one = verdict.ranks[0] if len(verdict.ranks) == 1 else None
        step = min((each.step for each in readings if each.rank in culprits), default=None)
        self._end_ranks(culprits, seen, readings, f"{verdict.words}; killed, to be replaced", one, step, {
            "found": verdict.evidence, "limit_s": verdict.limit_s,
        })  # fmt: skip
        self._acted_at = time.monotonic()
        self._patience = max(AGAIN * verdict.limit_s, AGAIN * self._limits.floor_s)

    def _end_all(self, seen: Sequence[tuple[str, Sighting]], readings: Sequence[Reading]) -> None:
        """The group is still there although somebody was killed: kill what is left of it, once."""
        self._acted_at, self._patience = time.monotonic(), float("inf")
        left = [each.rank for each in readings if each.gone_s == 0.0 and each.still_s >= self._limits.floor_s]
        if left:
            words = f"ranks {left} still stand where they stood when a hung rank was killed; killed, to be replaced"
            self._end_ranks(left, seen, readings, words, None, None, {"found": "not replaced"})

    def _end_ranks(
        self, ranks: Sequence[int], seen: Sequence[tuple[str, Sighting]], readings: Sequence[Reading], reason: str,
        one: int | None, step: int | None, evidence: Mapping[str, Any],
    ) -> None:  # fmt: skip
        """Take everybody's stacks, keep the incident, and kill these ranks.

        In that order, since whoever asks why a rank is gone looks for the incident.
        """
        at, stacks = time.time(), self._stacks(seen)
        telling = threading.Thread(target=self._report, daemon=True, args=("hang", reason, at, one, step, {
            **evidence, "ranks": list(ranks), "readings": [asdict(each) for each in readings], "stacks": stacks,
        }))  # fmt: skip
        telling.start()
        telling.join(TELL_S)
        for name, each in seen:
            if each.rank in ranks and not self._ask(name, "kill", each):
                _log.warning("run %s: rank %d could not be killed; it is gone already, perhaps", self._run, each.rank)

    def _stacks(self, seen: Sequence[tuple[str, Sighting]]) -> dict[str, str]:
        """The stacks of all ranks that give them, by rank."""
        stacks: dict[int, str] = {}
        for name in {name for name, _ in seen}:
            ranks = [each for node, each in seen if node == name]
            stacks |= self._ask(name, "stacks", ranks, STACKS_S, within_s=STACKS_S + ANSWER_S) or {}
        share = STACKS_CHARACTERS // max(1, len(stacks))
        return {str(rank): text[-share:] for rank, text in sorted(stacks.items())}

    def _tell_straggler(self, straggler: Straggler, readings: Sequence[Reading]) -> None:
        step = next((each.step for each in readings if each.rank == straggler.rank), None)
        evidence = {**asdict(straggler), "own_s": {str(rank): own for rank, own in straggler.own_s.items()}}
        self._report("straggler", straggler.words, time.time(), straggler.rank, step, evidence)

    def _report(
        self,
        kind: IncidentKind,
        reason: str,
        at: float,
        rank: int | None,
        step: int | None,
        evidence: Mapping[str, Any],
    ) -> None:
        _log.warning("run %s: %s", self._run, reason)
        report(self._store, self._run, Incident(
            kind=kind, reason=reason, at=at, attempt=self._attempt, generation=self._generation, rank=rank, step=step,
            evidence=dict(evidence),
        ))  # fmt: skip


@contextlib.contextmanager
def watching(plan: RankPlan, store: Store, cluster: Cluster) -> Iterator[None]:
    """Watch the ranks of an attempt for the length of a `with` block, as `training.watchdog` says."""
    if not plan.settings.training.watchdog.enabled:
        yield
        return
    watchdog = Watchdog(plan, store, local=cluster.local)
    watchdog.start()
    try:
        yield
    finally:
        watchdog.stop()
