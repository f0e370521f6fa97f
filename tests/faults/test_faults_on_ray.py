"""Real runs on a real local Ray, struck at random steps: they end bit for bit as the run that nothing happened to."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from checkers import one_content_per_step
from digits_slice import fill, small_settings
from fault_proxy import Deed, FaultProxy, Request
from history import History
from results import Table, repeats
from seaweed import SeaweedS3
from strikes import Hand, Onlooker, draw_strikes

from lepton_ray.cluster import connect
from lepton_ray.storage import Store, open_store
from lepton_ray.training.trainer import Trainer, TrainingResult, final_checkpoint

pytestmark = [pytest.mark.ray, pytest.mark.s3]
TOTAL = 290


@pytest.fixture(scope="module")
def proxy(s3: SeaweedS3) -> Iterator[FaultProxy]:
    """One local Ray for the tests of this file, whose processes reach S3 through a proxy."""
    with FaultProxy(s3.port) as made, pytest.MonkeyPatch.context() as patch:
        for name, value in {**s3.environment, "AWS_ENDPOINT_URL": made.endpoint}.items():
            patch.setenv(name, value)
        with connect():
            yield made


@dataclass(frozen=True)
class Ended:
    """What a run is compared by."""

    weights: bytes
    metrics: dict[str, float]
    step: int


def ended(store: Store, result: TrainingResult) -> Ended:
    """The end of a run."""
    return Ended(final_checkpoint(store, result).files["model.safetensors"], result.metrics, result.step)


@pytest.fixture(scope="module")
def undisturbed(proxy: FaultProxy, tmp_path_factory: pytest.TempPathFactory) -> Ended:
    """What every struck run must equal."""
    store = open_store(tmp_path_factory.mktemp("calm").as_uri())
    fill(store)
    result = Trainer(None, small_settings("struck"), store=store).fit()
    assert result.step == TOTAL
    return ended(store, result)


def test_struck_runs_end_as_the_undisturbed_one(undisturbed: Ended, tmp_path: Path, table: Table) -> None:
    """SIGKILL of one rank or of all, twice in a run, at random steps."""
    count, struck, worst = repeats(1, 10), 0, {"kill one": 0, "kill all": 0}
    for seed in range(count):
        store = open_store((tmp_path / f"store-{seed}").as_uri())
        fill(store)
        history = History(tmp_path / f"history-{seed}.jsonl")
        strikes = draw_strikes(seed, TOTAL, ("kill one", "kill one", "kill all"), 2)
        with Hand(store, "struck", strikes, history, seed) as hand:
            result = Trainer(None, small_settings("struck", max_failures=10), store=store).fit()
        assert len(hand.done) == len(strikes), f"seed {seed}: the run was over before {strikes[len(hand.done) :]}"
        assert result.samples_exact, f"seed {seed}"
        assert ended(store, result) == undisturbed, f"seed {seed}: {strikes}"
        for deed, step, generation in hand.done:
            worst[deed] = max(worst[deed], step + 1 - first_step_after(store, "struck", generation))
        struck += len(hand.done)
        assert list(one_content_per_step(history.events())) == []
        history.close()
    assert worst["kill one"] <= 1
    assert worst["kill all"] <= 40, "no more than a checkpoint's interval"
    outcome = f"{count} of {count} equal bit for bit, samples exact; most steps repeated: {worst}"
    table.add("F01, F07", "SIGKILL of one rank or of all", "2 per run", f"{struck} strikes, {count} runs", outcome)


def first_step_after(store: Store, run: str, generation: int) -> int:
    """The first step that the worker group after this one did."""
    numbers = sorted(int(name.split("-")[0][1:]) for name in store.list_names(f"runs/{run}/ledger") if "rank0" in name)
    after = next(number for number in numbers if number > generation)
    return int(json.loads(store.get(f"runs/{run}/ledger/g{after}-rank0.json"))["first_step"])


def test_a_run_trains_on_while_storage_is_away(
    undisturbed: Ended, proxy: FaultProxy, s3: SeaweedS3, tmp_path: Path, table: Table
) -> None:
    """No connection to S3 gets through for seconds: steps go on, nothing fails, the end is committed and equal."""
    store = open_store(s3.uri(f"faults-{tmp_path.name}"))
    fill(store)
    outage = Outage(Onlooker(store, "struck"), after=3, steps=60)
    proxy.rule = outage.rule
    watch = threading.Thread(target=outage.watch, daemon=True)
    watch.start()
    settings = small_settings("struck", checkpoint={"every_steps": 20})
    result = Trainer(None, settings, store=store).fit()
    watch.join(10)
    proxy.rule = lambda _: "pass"
    assert outage.refused > 0
    assert outage.gained >= 60, "steps went on while storage was away"
    assert result.samples_exact
    assert result.record["failures"] == 0
    assert ended(store, result) == undisturbed
    outcome = f"0 steps lost, {outage.gained} steps meanwhile, equal bit for bit"
    table.add("F33", "storage away during a run on Ray", f"{outage.refused} requests unanswered", 1, outcome)


class Outage:
    """Drops every request from the n-th commit on, until the run has done some steps without storage."""

    def __init__(self, onlooker: Onlooker, after: int, steps: int) -> None:
        self._onlooker, self._after, self._wanted = onlooker, after, steps
        self.refused = self.gained = 0
        self._manifests = 0
        self._away, self._back = threading.Event(), threading.Event()

    def rule(self, request: Request) -> Deed:
        """What is done with a request."""
        if request.method == "PUT" and "/manifest.json" in request.path and "/checkpoints/" in request.path:
            self._manifests += 1
            if self._manifests == self._after:
                self._away.set()
        if self._away.is_set() and not self._back.is_set():
            self.refused += 1
            return "drop"
        return "pass"

    def watch(self) -> None:
        """Bring storage back when enough steps were done without it, or after half a minute."""
        while not self._away.wait(0.01):
            self._onlooker.ranks()  # learns where to look while the store can still say it
        start, deadline = self._onlooker.step(), time.monotonic() + 30
        while time.monotonic() < deadline and self.gained < self._wanted:
            self.gained = max(self.gained, self._onlooker.step() - start)
            time.sleep(0.01)  # a page of shared memory has no event
        self._back.set()
