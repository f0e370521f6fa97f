"""Two strategies and one big batch in a single process compute the same; compressed gradients come close."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from ranks import run_ranks
from small_training import batch, network, prepared, train, whole

from lepton_ray.settings.training import ParallelSettings
from lepton_ray.training.fsdp import repeated_blocks
from lepton_ray.training.parallel import wrap

STEPS = 20
WAYS: dict[str, dict[str, Any]] = {
    "ddp": {},
    "ddp, static graph, small buckets": {"static_graph": True, "bucket_mb": 0.001},
    "fsdp": {"strategy": "fsdp"},
    "fsdp, gathered once": {"strategy": "fsdp", "reshard_after_forward": False},
    "bf16": {"compression": "bf16"},
    "powersgd": {"compression": "powersgd", "powersgd_rank": 2, "powersgd_start_step": 3},
}
EXACT = [name for name in WAYS if name not in ("bf16", "powersgd")]


def on_a_rank() -> tuple[Any, ...]:
    """All that the tests of this file look at: starting processes is what takes long."""
    return (
        train_each_way(),
        [change_what_learns(strategy) for strategy in ("ddp", "fsdp")],
        remember_in_one_form(),
        evaluate_unequally(),
    )


def train_each_way() -> dict[str, tuple[list[float], dict[str, Any]]]:
    """This rank's share of the losses and the whole weights, by way."""
    found = {}
    for name, settings in WAYS.items():
        parallel, optimizer = prepared(seed=parallel_seed(), **settings)
        losses = train(parallel, optimizer, 0, STEPS, accumulate=3)
        found[name] = (losses, whole(parallel))
    return found


def parallel_seed() -> int:
    """Weights of rank 0 become everyone's, so the others may begin with whatever they have."""
    return torch.distributed.get_rank()


@pytest.fixture(scope="module")
def ranks() -> list[tuple[Any, ...]]:
    """What two ranks found."""
    return run_ranks(on_a_rank, 2)


@pytest.fixture(scope="module")
def trained(ranks: Any) -> list[dict[str, tuple[list[float], dict[str, Any]]]]:
    """What each rank found by way."""
    return [rank[0] for rank in ranks]


@pytest.fixture(scope="module")
def alone() -> tuple[list[float], dict[str, Any]]:
    """The same steps in a single process, each one big batch, with nothing but torch."""
    model = network(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for step in range(STEPS):
        words, targets = batch(step)
        loss = torch.nn.functional.cross_entropy(model(words), targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses, {name: value.numpy() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("way", EXACT)
def test_parts_times_ranks_equal_one_big_batch(way: str, trained: Any, alone: Any) -> None:
    """Twenty steps of two ranks with three parts each: losses and weights of one process with the whole batch."""
    losses = np.mean([rank[way][0] for rank in trained], axis=0)
    np.testing.assert_allclose(losses, alone[0], rtol=1e-4)
    assert losses[-1] < losses[0]
    for name, value in alone[1].items():
        np.testing.assert_allclose(trained[0][way][1][name], value, rtol=1e-3, atol=1e-4, err_msg=name)


@pytest.mark.parametrize("way", WAYS)
def test_all_ranks_hold_the_same_model(way: str, trained: Any) -> None:
    first, second = (rank[way][1] for rank in trained)
    assert all(np.array_equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("way", ["bf16", "powersgd"])
def test_compressed_gradients_come_close_and_are_compressed(way: str, trained: Any) -> None:
    """The losses stay near those of whole gradients, and are not the same numbers."""
    exact, near = (np.mean([rank[name][0] for rank in trained], axis=0) for name in ("ddp", way))
    assert not np.array_equal(exact, near)
    assert near[-1] < near[0] - 0.2
    np.testing.assert_allclose(near, exact, atol=0.15)


def test_blocks_are_cut_apart_and_their_inner_sequences_are_not() -> None:
    model = network()
    assert repeated_blocks(model) == list(model.blocks)
    plain = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.ReLU(), torch.nn.Linear(3, 2))
    assert repeated_blocks(plain) == [plain[0], plain[2]]


def change_what_learns(strategy: str) -> tuple[dict[str, Any], ...]:
    """Two steps with frozen words, two with all; the weights before, between and after."""
    model = network()
    model.words.weight.requires_grad_(False)
    parallel = wrap(model, ParallelSettings(strategy=strategy), torch.device("cpu"))
    optimizer = torch.optim.AdamW(parallel.module.parameters(), lr=1e-2)
    seen = [whole(parallel)]
    train(parallel, optimizer, 0, 2)
    seen.append(whole(parallel))
    parallel.module.words.weight.requires_grad_(True)
    parallel.learning_changed()
    train(parallel, optimizer, 2, 4)
    seen.append(whole(parallel))
    return tuple(seen)


def test_parameters_that_begin_to_learn_do_so_in_both_strategies(ranks: Any) -> None:
    for _, found, *_ in ranks:
        for before, between, after in found:
            assert np.array_equal(before["words.weight"], between["words.weight"])
            assert not np.array_equal(between["words.weight"], after["words.weight"])
            assert not np.array_equal(before["head.weight"], between["head.weight"])
        for ddp, fsdp in zip(*found, strict=True):
            for name, value in ddp.items():
                np.testing.assert_allclose(fsdp[name], value, rtol=1e-4, atol=1e-5, err_msg=name)


def remember_in_one_form() -> tuple[dict[str, list[int]], dict[str, list[int]], bool]:
    """Shapes of PowerSGD's memory after one step and after compression began; whether a skipped step clears it."""
    parallel, optimizer = prepared(compression="powersgd", powersgd_start_step=2, bucket_mb=0.002)
    train(parallel, optimizer, 0, 1)
    early = {name: list(value.shape) for name, value in parallel.memory().items()}
    train(parallel, optimizer, 1, 5)
    late = parallel.memory()
    remembered = any(bool(value.any()) for name, value in late.items() if name.startswith("error."))
    parallel.step_skipped()
    cleared = not any(bool(value.any()) for name, value in parallel.memory().items() if "." in name)
    train(parallel, optimizer, 5, 7)
    return early, {name: list(value.shape) for name, value in late.items()}, remembered and cleared


def test_what_powersgd_remembers_has_one_form_and_is_forgotten_with_a_skipped_step(ranks: Any) -> None:
    """A copy's memory can be used again from the first step on; NaN of a skipped step does not stay."""
    for _, _, (early, late, cleared), _ in ranks:
        assert early == late
        assert sum(name.startswith("error.") for name in late) > 1
        assert cleared


def evaluate_unequally() -> tuple[int, int, bool]:
    """Rounds with one batch more on rank 1, with ddp and fsdp; whether fsdp learns on after evaluating that often."""
    rounds = []
    for strategy in ("ddp", "fsdp"):
        parallel, optimizer = prepared(strategy=strategy)
        mine = 1 + parallel.rank
        rounds.append(parallel.rounds(mine))
        with torch.no_grad(), parallel.evaluating() as model:
            assert not model.training
            for step in range(rounds[-1]):
                model(batch(step)[0])
        assert parallel.module.training
        before = whole(parallel)
        train(parallel, optimizer, 0, 1)
    return rounds[0], rounds[1], any(not np.array_equal(before[name], value) for name, value in whole(parallel).items())


def test_with_fsdp_all_ranks_call_forward_equally_often(ranks: Any) -> None:
    """A forward that gathers weights is a collective: the rank with fewer batches joins in."""
    for number, rank in enumerate(ranks):
        assert rank[3] == (1 + number, 2, True)
