"""What ranks find out together at the end of a step: preemption, silent divergence, the interval of checkpoints."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from digits_slice import small_settings
from engine_runs import CPU, CREATED_AT, run_here
from ranks import run_ranks

from lepton_ray.monitoring.incidents import incidents
from lepton_ray.storage import open_store
from lepton_ray.training.interval import Failures

PLAIN: dict[str, Any] = {
    "epochs": 4, "global_batch": 16, "checkpoint": {"every_steps": 5, "keep": 10, "hot": False},
    "divergence_every_steps": 3,
}  # fmt: skip
Tampering = Callable[[Any, int], None]
"""Called before each step with the rank's object and how many steps this process has begun before."""


def tampered_run(folder: str, name: str, training: dict[str, Any], tamper: Tampering, **options: Any) -> Any:
    """A run with something done to its ranks before each step; how it ended, on each rank."""
    from lepton_ray.training import agreement, hot_copies, loop, notices
    from lepton_ray.training.divergence import Diverged
    from lepton_ray.training.preemption import Preempted

    hot_copies.OVERHEAD, agreement.MOST_STEPS = 1e6, 3
    notices.clear()
    whole, begun = loop.take_step, 0

    def step(rank: Any) -> str:
        nonlocal begun
        tamper(rank, begun)
        begun += 1
        return whole(rank)

    loop.take_step = step
    try:
        return run_here(folder, name, training, **options)
    except Preempted as gone:
        return {"preempted": gone.step, "ranks": gone.ranks, "committed": gone.committed, "begun": begun}
    except Diverged as error:
        return {"diverged": str(error)}
    finally:
        loop.take_step = whole
        notices.clear()


def tell(rank: Any, begun: int, *, at: int, who: int, grace_s: float | None = None) -> None:
    """One rank is told once that it will be taken away."""
    from lepton_ray.training import notices

    if begun == at and rank.context.number == who:
        notices.preempt(grace_s)


def nothing(_rank: Any, _begun: int) -> None:
    """An undisturbed run."""


def flip(rank: Any, begun: int, *, at: tuple[int, ...], who: int, part: str, bit: int = 3) -> None:
    """One bit of one rank's memory turns round, before its `at`-th steps."""
    if begun not in at or rank.context.number != who:
        return
    parameter = rank.parameters[0]
    value = parameter if part == "weight" else rank.optimizer.state[parameter]["exp_avg"]
    with torch.no_grad():
        value.view(torch.int32).view(-1)[7] ^= 1 << bit


def spoil(rank: Any, begun: int, *, at: int, who: int) -> None:
    """A weight of one rank becomes infinite."""
    if begun == at and rank.context.number == who:
        with torch.no_grad():
            rank.parameters[0].view(-1)[7] = torch.inf


def told_in_turn(folder: str, runs: list[tuple[str, dict[str, Any], Tampering]]) -> list[Any]:
    """Several runs one after the other in the same processes, for the price of one start."""
    return [tampered_run(folder, *run) for run in runs]


def outcomes(folder: Path, *runs: tuple[str, dict[str, Any], Tampering], world_size: int = 2) -> list[list[Any]]:
    """How each run ended, on each rank."""
    return [list(each) for each in zip(*run_ranks(told_in_turn, world_size, str(folder), list(runs)), strict=True)]


def equal(left: dict[str, Any], right: dict[str, Any]) -> bool:
    """Whether two models are equal bit for bit."""
    return left.keys() == right.keys() and all(np.array_equal(left[name], right[name]) for name in left)


def reported(folder: Path, run: str) -> list[Any]:
    """The run's incidents."""
    return incidents(open_store((folder / "store").as_uri()), run)


KINDS = {
    "ddp": PLAIN,
    "accumulating": {**PLAIN, "optimizer": {"accumulate": 2, "ema": 0.9}},
    "fsdp": {**PLAIN, "parallel": {"strategy": "fsdp"}},
}


@pytest.mark.parametrize("kind", KINDS)
def test_all_leave_after_the_same_step_when_one_is_told(tmp_path: Path, kind: str) -> None:
    """One rank is told, twice in two groups: all leave after one step, committed, and the run ends with equal bits."""
    training = KINDS[kind]
    told = [(1, 4), (0, 1)]
    calm, *found, ended = outcomes(
        tmp_path, ("calm", training, nothing),
        *(("moved", training, functools.partial(tell, at=at, who=who)) for who, at in told),
        ("moved", training, nothing),
    )  # fmt: skip
    for (who, at), ranks in zip(told, found, strict=True):
        assert len({outcome["preempted"] for outcome in ranks}) == 1
        for outcome in ranks:
            assert (outcome["ranks"], outcome["committed"]) == ((who,), True)
            assert at < outcome["begun"] <= at + 1 + 3  # three steps from one agreement to the next
    steps = [ranks[0]["preempted"] for ranks in found]
    assert steps[1] > steps[0]
    assert ended[0]["start"] == steps[1]
    assert equal(ended[0]["weights"], calm[0]["weights"])
    assert ended[0]["samples"] == calm[0]["samples"]
    assert [(incident.kind, incident.step, incident.rank) for incident in reported(tmp_path, "moved")] == [
        ("preempted", steps[0], 1), ("preempted", steps[1], 0),
    ]  # fmt: skip
    assert reported(tmp_path, "calm") == []
    counted = [Failures.of(ledger_entries(tmp_path, run)).count for run in ("moved", "calm")]
    assert counted == [0, 0]


def ledger_entries(folder: Path, run: str) -> list[dict[str, Any]]:
    """Rank 0's entry of each worker group."""
    return [json.loads(path.read_bytes()) for path in (folder / f"store/runs/{run}/ledger").glob("g*-rank0.json")]


def test_a_grace_that_is_over_is_not_waited_for(tmp_path: Path) -> None:
    """Without time to commit the ranks leave all the same, and a hot copy of that step is what the run goes on from."""
    training = {**PLAIN, "checkpoint": {"every_steps": 1000, "hot": True}}
    late = functools.partial(tell, at=6, who=1, grace_s=0.0)
    ranks = run_ranks(slow_storage, 2, str(tmp_path), training, late)
    calm, gone, ended = ranks[0]
    assert [outcomes[1]["committed"] for outcomes in ranks] == [False, False]
    assert ended["start"] == gone["preempted"]
    assert equal(ended["weights"], calm["weights"])


def slow_storage(folder: str, training: dict[str, Any], tamper: Tampering) -> list[Any]:
    """Checkpoints are not written before the ranks have left, and not at all then."""
    import threading

    from lepton_ray.errors import UnavailableError
    from lepton_ray.training.checkpoints import CheckpointStore

    calm = tampered_run(folder, "calm", training, nothing)
    left, whole = threading.Event(), CheckpointStore.write

    def write(*_: Any) -> Any:
        left.wait(60)
        raise UnavailableError("storage was away")

    CheckpointStore.write = write  # type: ignore[method-assign]
    try:
        gone = tampered_run(folder, "moved", training, tamper)
    finally:
        left.set()
        CheckpointStore.write = whole  # type: ignore[method-assign]
    return [calm, gone, tampered_run(folder, "moved", training, nothing)]


def test_a_flipped_bit_is_found_and_undone(tmp_path: Path) -> None:
    """Within K steps the ranks find that they differ, go back, and end with the bits of the undisturbed run."""
    hits = [("weight", 1), ("weight", 0), ("moment", 0)]
    training = {**PLAIN, "checkpoint": {**PLAIN["checkpoint"], "hot": True}}
    calm, *found = outcomes(tmp_path, ("calm", training, nothing), *(
        (f"hit-{part}-{who}", training, functools.partial(flip, at=(7,), who=who, part=part)) for part, who in hits
    ))  # fmt: skip
    for (part, who), ranks in zip(hits, found, strict=True):
        assert equal(ranks[0]["weights"], calm[0]["weights"]), (part, who)
        assert ranks[0]["samples"] == calm[0]["samples"]
        (told,) = reported(tmp_path, f"hit-{part}-{who}")
        assert (told.kind, told.evidence["odd_ranks"]) == ("divergence", [0, 1])
        assert told.step is not None
        assert 7 < told.step <= 7 + 3


def test_of_three_ranks_the_odd_one_is_named(tmp_path: Path) -> None:
    """And the run goes back to its start where there is no checkpoint yet."""
    training = {**PLAIN, "checkpoint": {**PLAIN["checkpoint"], "every_steps": 1000}, "evaluate_every_epochs": 100}
    tamper = functools.partial(flip, at=(4,), who=2, part="weight")
    (calm, *_), (found, *_) = outcomes(
        tmp_path, ("calm", training, nothing), ("hit", training, tamper), world_size=3
    )  # fmt: skip
    assert equal(found["weights"], calm["weights"])
    assert found["samples"] == calm["samples"]
    assert found["metrics"] == calm["metrics"]
    assert [(incident.rank, incident.evidence["odd_ranks"]) for incident in reported(tmp_path, "hit")] == [(2, [2])]


def test_other_ends_of_ranks_that_differ(tmp_path: Path) -> None:
    """An infinite weight leaves no batch out; the same again after going back ends the run; 0 looks at nothing."""
    blind = {**PLAIN, "divergence_every_steps": 0}
    calm, infinite, always, unseen = outcomes(
        tmp_path, ("calm", PLAIN, nothing), ("infinite", PLAIN, functools.partial(spoil, at=6, who=1)),
        ("always", PLAIN, functools.partial(flip, at=tuple(range(100)), who=1, part="weight")),
        ("unseen", blind, functools.partial(flip, at=(7,), who=0, part="weight", bit=20)),
    )  # fmt: skip
    assert infinite[0]["left_out_steps"] == []
    assert equal(infinite[0]["weights"], calm[0]["weights"])
    for outcome in always:
        assert "training.divergence_every_steps" in outcome["diverged"]
        assert "\n" not in outcome["diverged"]
    assert len(reported(tmp_path, "always")) == 2
    assert not equal(unseen[0]["weights"], calm[0]["weights"])
    assert reported(tmp_path, "unseen") == []


def test_the_interval_is_measured(tmp_path: Path) -> None:
    """`auto` saves once the time of a step is known, then as often as its bounds allow; the weights stay the same."""
    often = {**PLAIN, "checkpoint": {"every_steps": "auto", "min_s": 0.0, "max_s": 0.001, "keep": 100, "hot": False}}
    seldom = {**PLAIN, "checkpoint": {"every_steps": "auto", "min_s": 600.0, "max_s": 600.0, "hot": False}}
    calm, *others = outcomes(tmp_path, ("calm", PLAIN, nothing), ("often", often, nothing), ("seldom", seldom, nothing))
    for ranks in others:
        assert equal(ranks[0]["weights"], calm[0]["weights"])
    saved = {name: [int(path.name[5:]) for path in sorted((tmp_path / f"store/runs/{name}/checkpoints").iterdir())]
             for name in ("often", "seldom")}  # fmt: skip
    evaluated = {entry["step"] for entry in calm[0]["evaluations"]}  # a best model is kept whatever the interval is
    assert len(set(saved["often"]) - evaluated) >= 2
    assert set(saved["seldom"]) <= evaluated


def own_loop() -> float:
    """A loop of one's own with an evaluation at the end of each epoch."""
    from lepton_ray.training import session

    here = session()
    torch.manual_seed(3)
    model = torch.nn.Sequential(torch.nn.Linear(6, 16), torch.nn.ReLU(), torch.nn.Linear(16, 1))
    model, optimizer = here.prepare(model, torch.optim.Adam(model.parameters(), lr=0.01))
    draw = torch.Generator().manual_seed(1)
    data = torch.utils.data.TensorDataset(torch.randn(40, 6, generator=draw), torch.randn(40, 1, generator=draw))
    loss = torch.zeros(())
    for _ in here.epochs(3):
        for inputs, targets in here.batches(data, 8):
            optimizer.zero_grad()
            loss = torch.nn.functional.mse_loss(model(inputs), targets)
            loss.backward()
            optimizer.step()
            here.log(loss=loss)
            here.event(model, here.step)  # type: ignore[attr-defined] # the test's
        here.evaluated(loss=1.0)
    return 0.0


def own_run(folder: str, name: str, event: Callable[[Any, int], None]) -> Any:
    """A run of that loop on the ranks of this process group; how it ended, and its final weights."""
    from lepton_ray.training import agreement, hot_copies, notices
    from lepton_ray.training.checkpoints import CheckpointStore
    from lepton_ray.training.collectives import broadcast_bytes
    from lepton_ray.training.divergence import Diverged
    from lepton_ray.training.lease import RunLease
    from lepton_ray.training.own_loop import Session, run_own_loop
    from lepton_ray.training.plan import OwnFunction, RankPlan
    from lepton_ray.training.preemption import Preempted

    hot_copies.OVERHEAD, agreement.MOST_STEPS = 1e6, 3
    notices.clear()
    Session.event = staticmethod(event)  # type: ignore[attr-defined]
    settings = small_settings(name, checkpoint={"every_steps": 4, "hot": False}, divergence_every_steps=3)
    store = open_store((Path(folder) / "store").as_uri())
    lease = RunLease.acquire(store, name) if dist.get_rank() == 0 else None
    attempt = int(broadcast_bytes(str(lease.attempt).encode() if lease else None, CPU))
    try:
        plan = RankPlan(settings, store.uri, attempt, {}, "", CREATED_AT)
        outcome = run_own_loop(plan, OwnFunction(own_loop), CPU)
        files = CheckpointStore(store, name, attempt).load(outcome["step"]).files
        return {**outcome, "model": files["model.safetensors"]}
    except Preempted as gone:
        return {"preempted": gone.step, "committed": gone.committed}
    except Diverged as error:
        return {"diverged": str(error)}
    finally:
        if lease is not None:
            lease.release()


def own_tell(_model: Any, step: int, *, at: int, who: int) -> None:
    """One rank of a loop of one's own is told during a step."""
    from lepton_ray.training import notices

    if step == at and dist.get_rank() == who:
        notices.preempt()


def own_flip(model: Any, step: int, *, at: int, who: int) -> None:
    """One bit of one rank's weights turns round during a step."""
    if step == at and dist.get_rank() == who:
        with torch.no_grad():
            next(iter(model.parameters())).view(torch.int32).view(-1)[3] ^= 1


def own_runs(folder: str, events: list[tuple[str, Callable[[Any, int], None]]]) -> list[Any]:
    """Several such runs one after the other."""
    return [own_run(folder, name, event) for name, event in events]


def test_loops_of_ones_own_leave_and_go_on(tmp_path: Path) -> None:
    """Told in the middle of an epoch and around its end, or with other weights: equal bits after a new start."""
    events = {
        "early": functools.partial(own_tell, at=2, who=1),
        "late": functools.partial(own_tell, at=8, who=0),
        "hit": functools.partial(own_flip, at=6, who=0),
    }
    runs = [("calm", nothing), *(run for name, event in events.items() for run in ((name, event), (name, nothing)))]
    ranks = run_ranks(own_runs, 2, str(tmp_path), runs)
    calm, early, after_early, late, after_late, hit, after_hit = zip(*ranks, strict=True)
    for gone in (early, late):
        assert len({outcome["preempted"] for outcome in gone}) == 1
        assert all(outcome["committed"] for outcome in gone)
    assert all("not equal bit for bit" in outcome["diverged"] for outcome in hit)
    for ended in (after_early, after_late, after_hit):
        assert ended[0]["model"] == calm[0]["model"]
        assert ended[0]["samples_exact"]
    kinds = {name: [incident.kind for incident in reported(tmp_path, name)] for name in events}
    assert kinds == {"early": ["preempted"], "late": ["preempted"], "hit": ["divergence"]}
