"""Plays a scenario: real lease, real checkpoints, real writer, over a store that misbehaves where the scenario says.

Every driver runs in a thread of its own. Whoever is frozen stands in the middle of a call to the store, as a stopped
process would, and goes on there when it is thawed.
"""

from __future__ import annotations

import json
import queue
import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

from chain import Chain, digest_of_entries, digest_of_files, undisturbed
from checkers import enough_load, violations
from damage import committed, inflict, look
from faulty_store import Deed, FaultyStore, Killed
from history import FENCED, KEPT, OK, UNKNOWN, History
from scenario import Chapter, Scenario

from lepton_ray.errors import LeptonError, RefusedError
from lepton_ray.storage import Store
from lepton_ray.training.checkpoint_writer import CheckpointWriter
from lepton_ray.training.checkpoints import CheckpointStore
from lepton_ray.training.lease import RunLease, lease_key

RUN = "run"
LIMIT_S = 60.0
"""How long anybody waits for anybody else before a scenario counts as hanging."""
LONG_S = 3600.0
"""Time to live of a lease that is not renewed while a scenario lasts."""
RENEWED = {"renewal": 0.3, "intruder": 6.0}
"""Time to live by fault, where renewals are what it is about; they come three times in it."""
NO_PROCESS = 2**30


@dataclass(frozen=True)
class Parts:
    """What is under test; a broken variant exchanges one of them."""

    checkpoints: type[CheckpointStore] = CheckpointStore
    lease: type[RunLease] = RunLease
    writer: type[CheckpointWriter] = CheckpointWriter
    position: Callable[[int, int], int] = lambda step, batch: step * batch
    """Sample offset after a resume, from steps done and global batch."""


class Quiet:
    """A recorder that nobody reads."""

    def __getattr__(self, name: str) -> Callable[..., None]:
        """Any method: it does nothing."""
        return lambda *_, **__: None


class Play:
    """One scenario over one store, with a history; drivers may see the store `via` a worse connection."""

    def __init__(
        self, scenario: Scenario, store: Store, history: History, parts: Parts, via: Store | None = None
    ) -> None:
        self.scenario, self.store, self.history, self.parts = scenario, store, history, parts
        self.via = via if via is not None else store
        self.draw = random.Random(f"damage {scenario.seed}")  # noqa: S311 - not a secret
        self.news: queue.Queue[Driver] = queue.Queue()
        self.zombies: list[Driver] = []

    def run(self) -> None:
        """Play all chapters, thaw who is still frozen, and collect what dead writers left."""
        for number, chapter in enumerate(self.scenario.chapters, start=1):
            driver = Driver(self, f"driver-{number}", chapter)
            driver.thread.start()
            self.news.get(timeout=LIMIT_S)
            driver.give_up_lease()
            if driver.frozen:
                self.zombies.append(driver)
            self._damage(chapter)
            self.look()
        self.thaw(everybody=True)
        Driver(self, "janitor", Chapter("calm", 0, 0)).clean()
        self.look(collected=True)

    def look(self, **facts: Any) -> dict[str, Any]:
        """Write into the history what is stored; the checkpoints by step."""
        call = self.history.begin("look", "harness")
        found = look(self.store, RUN)
        call.answer(OK, **found, **facts)
        return dict(found["steps"])

    def thaw(self, by: Driver | None = None, *, everybody: bool = False, committed: bool = False) -> None:
        """Let zombies go on whose time has come, and wait until they are over."""
        if by is not None and by.zombie:
            return
        for zombie in list(self.zombies):
            zombie.thaw_in -= committed
            if everybody or zombie.thaw_in <= 0:
                self.zombies.remove(zombie)
                self.history.note("thaw", "harness", whom=zombie.who)
                zombie.thawed.set()
                zombie.thread.join(LIMIT_S)
                assert not zombie.thread.is_alive(), f"{zombie.who} hangs after it was thawed"

    def _damage(self, chapter: Chapter) -> None:
        for kind, which in chapter.damages:
            steps = committed(self.store, RUN)
            if which < len(steps):
                self.damage(steps[-1 - which], kind)

    def damage(self, step: int, kind: Any) -> None:
        """Damage the checkpoint of a step."""
        call = self.history.begin("damage", "harness", step=step, kind=kind)
        call.answer(OK, key=inflict(self.store, RUN, step, kind, self.draw))


class Driver:
    """One attempt at the run."""

    def __init__(self, play: Play, who: str, chapter: Chapter) -> None:
        self.play, self.who, self.chapter = play, who, chapter
        self.thread = threading.Thread(target=self._run, name=who, daemon=True)
        self.frozen = self.zombie = False
        self.thawed = threading.Event()
        self.thaw_in = chapter.thaw
        self._history = play.history
        self._store = FaultyStore(play.via, self._decide, self._dropped)
        self._lease: RunLease | None = None
        self._commits = self._writes = 0
        self._left: int | None = None
        """Calls that the fault still hits; None before it begins."""
        self._renewals: queue.Queue[Deed] = queue.Queue()

    def clean(self) -> None:
        """What a driver does before its ranks start, and nothing else."""
        self._begin().collect_orphans()
        assert self._lease is not None
        self._lease.release()

    def give_up_lease(self) -> None:
        """After a death or a freeze: nobody renews the lease, and whoever looks finds no process."""
        lease = self._lease
        if lease is None or lease._stop.is_set():
            return
        self._history.note("gone", self.who)
        lease._stop.set()
        lease._thread.join(LIMIT_S)
        held = self.play.store.fetch(lease_key(RUN))
        body = json.loads(held.data)
        body["driver"]["pid"] = NO_PROCESS
        self.play.store.replace(lease_key(RUN), json.dumps(body).encode(), held.etag)

    # --- the attempt

    def _run(self) -> None:
        try:
            self._drive()
        except (Killed, LeptonError) as error:
            self._history.note("ended", self.who, error=f"{type(error).__name__}: {error}")
        except Exception as error:  # noqa: BLE001 - a crash is a finding
            self._history.note("crash", self.who, error=f"{type(error).__name__}: {error}"[:200])
        finally:
            if not self.zombie:
                self.play.news.put(self)

    def _begin(self) -> CheckpointStore:
        play = self.play
        ttl_s = RENEWED.get(self.chapter.fault, LONG_S)
        lease_store = FaultyStore(play.via, self._decide_renewal)
        call = self._history.begin("acquire", self.who)
        try:
            self._lease = play.parts.lease.acquire(lease_store, RUN, ttl_s=ttl_s)
        except LeptonError as error:
            call.answer("refused", error=str(error))
            raise
        self.attempt = self._lease.attempt
        call.answer(OK, attempt=self.attempt)
        checkpoints = play.parts.checkpoints(self._store, RUN, self.attempt)
        self._watch(checkpoints)
        return checkpoints

    def _drive(self) -> None:
        scenario, parts = self.play.scenario, self.play.parts
        checkpoints = self._begin()
        assert self._lease is not None
        checkpoints.collect_orphans()
        chain = self._resume(checkpoints)
        self.play.thaw(self)
        alone = SimpleNamespace(rank=0, world_size=1, all_write=False)
        writer = parts.writer(checkpoints, scenario.keep, Quiet(), alone)  # type: ignore[arg-type]  # what it uses of them
        done: list[int] = []
        try:
            while chain.step < scenario.total:
                chain.advance()
                done.append(chain.step)
                if chain.step % scenario.every == 0 or chain.step == scenario.total:
                    writer.submit(chain.step, chain.copy(), chain.state(self.attempt))
                    if chain.step < scenario.total:
                        writer.settle()  # one at a time: which write comes when must not depend on the machine
        finally:
            self._history.note("train", self.who, steps=done)
        writer.finish()
        self._history.note("finish", self.who, **chain.outcome())
        self._history.note("gone", self.who)
        self._lease.release()

    def _resume(self, checkpoints: CheckpointStore) -> Chain:
        scenario = self.play.scenario
        chain = Chain(scenario.rows, scenario.batch, scenario.seed)
        call = self._history.begin("resume", self.who, attempt=self.attempt)
        found = checkpoints.newest()
        files = found.files if found is not None else {}
        step = found.step if found is not None and files else 0
        call.answer(OK, step=step, digest=digest_of_files(files), skipped=found.skipped if found is not None else [])
        if files:
            chain.restore(files, self.play.parts.position(step, scenario.batch))
        return chain

    def _watch(self, checkpoints: CheckpointStore) -> None:
        """Enter what is asked of the checkpoints, and what they answer, into the history."""
        commit, retain = checkpoints.commit, checkpoints.retain

        def watched_commit(step: int, entries: Any, facts: Any) -> Any:
            offered = digest_of_entries(entries)
            call = self._history.begin(
                "commit", self.who, attempt=self.attempt, step=step, offered=offered, digest=offered
            )
            try:
                stands = commit(step, entries, facts)
            except RefusedError:
                call.answer(FENCED)
                raise
            except LeptonError as error:
                call.answer(UNKNOWN, error=str(error))
                raise
            digest = digest_of_entries(stands)
            call.answer(OK if digest == offered else KEPT, digest=digest)
            self._commits += 1
            self.play.thaw(self, committed=True)
            return stands

        def watched_retain(keep: int, best: int | None = None) -> list[int]:
            call = self._history.begin("retain", self.who, attempt=self.attempt, keep=keep)
            deleted = retain(keep, best)
            call.answer(OK, deleted=deleted)
            return deleted

        # on the object, whatever variant of the class it is of
        checkpoints.commit, checkpoints.retain = watched_commit, watched_retain  # type: ignore[method-assign]

    def _dropped(self, step: int) -> None:
        found = self.play.look()  # what is dropped was perhaps wrong before, and soon nobody can see it any more
        self._history.note("drop", self.who, step=step, good=[int(name) for name in found if found[name]["whole"]])

    # --- the faults

    def _decide(self, writes: bool, key: str) -> Deed:
        chapter = self.chapter
        if self._left is None:
            if not writes or self._commits < max(1, chapter.warm) or chapter.fault == "calm":
                return "pass"
            if chapter.aimed and not key.endswith("/manifest.json"):
                return "pass"
            self._writes += 1
            if self._writes <= chapter.at:
                return "pass"
            self._left = chapter.calls
            self._history.note("fault", self.who, kind=chapter.fault, warm=chapter.warm, key=key)
            return self._strike(key)
        if self._left > 0 and chapter.fault in ("away", "lost") and (writes or chapter.fault == "away"):
            self._left -= 1
            return "away" if chapter.fault == "away" else "lost"
        if chapter.fault == "zombie_after" and not self.zombie:
            self._left -= 1
            if self._left < 0:
                self._freeze()
        return "pass"

    def _strike(self, key: str) -> Deed:
        """What the fault does to the very write that it hits."""
        fault = self.chapter.fault
        self._left = self.chapter.calls - 1
        deeds: dict[str, Deed] = {"kill": "die", "kill_after": "die_after", "away": "away", "lost": "lost"}
        if fault == "zombie":
            self._freeze()
        elif fault == "collect":
            self.play.parts.checkpoints(self.play.store, RUN, self.attempt).collect_orphans()
        elif fault == "rot":
            self._rot()
        elif fault == "renewal":
            self._lose_a_renewal()
        elif fault == "intruder":
            self._meet_an_intruder()
        return deeds.get(fault, "pass")

    def _freeze(self) -> None:
        self.frozen = self.zombie = True
        self.play.news.put(self)
        if not self.thawed.wait(LIMIT_S):
            self._store.dead = True

    def _rot(self) -> None:
        steps = committed(self.play.store, RUN)
        for step in steps[-1 - self.chapter.calls % 2 :][:1]:
            self.play.damage(step, "truncate" if self.chapter.calls < 3 else "delete")

    def _decide_renewal(self, writes: bool, key: str) -> Deed:
        try:
            return self._renewals.get_nowait() if writes else "pass"
        except queue.Empty:
            return "pass"

    def _lose_a_renewal(self) -> None:
        """The answer to one renewal is lost, and two more renewals follow."""
        assert self._lease is not None
        deeds: tuple[Deed, ...] = ("lost", "pass", "pass")
        for deed in deeds:
            self._renewals.put(deed)
        lost = self._lease.lost
        deadline = time.monotonic() + LIMIT_S
        while not lost.wait(0.02) and not self._renewals.empty():  # a renewal that went well sets no event
            assert time.monotonic() < deadline, "the lease is not renewed"
        if lost.is_set():
            self._history.note("lost", self.who, attempt=self.attempt)

    def _meet_an_intruder(self) -> None:
        """Another driver wants the run, which this one holds and renews."""
        intruder = Driver(self.play, "intruder", Chapter("calm", 0, 0))
        try:
            intruder.clean()
        except RefusedError:
            return


def play(
    scenario: Scenario, store: Store, history: History, parts: Parts | None = None, via: Store | None = None
) -> list[str]:
    """Play a scenario and judge it: all violations in words; none is a pass."""
    Play(scenario, store, history, parts or Parts(), via).run()
    events = history.events()
    outcome = undisturbed(scenario.rows, scenario.batch, scenario.seed, scenario.total)
    load = enough_load(events, commits=scenario.total // scenario.every // 2, steps=scenario.total)
    return [*(f"too little load: {words}" for words in load), *violations(events, outcome)]


def with_parts(**parts: Any) -> Parts:
    """The real parts but for these."""
    return replace(Parts(), **parts)
