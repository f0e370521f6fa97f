"""The pure parts of a loop of one's own: positions of batches, and states as JSON."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from torch.utils.data import TensorDataset, default_collate

from lepton_ray.data.order import SampleLedger
from lepton_ray.errors import UsageError
from lepton_ray.training.own_batches import EpochPlan, length_of, load
from lepton_ray.training.part_state import AllOptimizers, as_json, from_json


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
@pytest.mark.parametrize("drop_last", [False, True])
def test_ranks_share_each_batch_and_an_epoch_uses_each_sample_once(world_size: int, drop_last: bool) -> None:
    """Whatever the number of ranks, a step has the same samples, and weights make the mean over ranks theirs."""
    plans = [EpochPlan(23, 5, 7, rank, world_size, drop_last=drop_last) for rank in range(world_size)]
    whole = EpochPlan(23, 5, 7, 0, 1, drop_last=drop_last)
    for epoch in range(2):
        seen: list[int] = []
        for index in range(whole.steps):
            slices = [plan.slice(epoch, index) for plan in plans]
            ids = [identity for pairs, weight in slices if weight for identity, _ in pairs]
            assert ids == [identity for identity, _ in whole.slice(epoch, index)[0]]
            assert sum(weight for _, weight in slices) == pytest.approx(world_size)
            seen += ids
        assert len(seen) == len(set(seen)) == (20 if drop_last else 23)
        ledger = SampleLedger()
        for plan in plans:
            plan.account(ledger, epoch, 0, plan.steps)
        assert ledger.used_exactly_once(epoch, 23) is not drop_last


def test_samples_are_changed_at_random_in_the_same_way_again() -> None:
    """A dataset that draws random numbers gives the same sample at the same position, with workers and without."""

    class Noisy:
        def __len__(self) -> int:
            return 8

        def __getitem__(self, index: int) -> torch.Tensor:
            return torch.tensor([index + torch.rand(1).item(), np.random.rand()])  # noqa: NPY002

    plan = EpochPlan(8, 4, 0, 0, 1)
    first = torch.cat(list(load(Noisy(), plan, 0, 0, collate=None, workers=0)))
    again = torch.cat(list(load(Noisy(), plan, 0, 1, collate=None, workers=0)))
    assert torch.equal(first[4:], again)
    other = torch.cat(list(load(Noisy(), plan, 1, 0, collate=None, workers=0)))
    assert sorted(first[:, 0].int().tolist()) == sorted(other[:, 0].int().tolist()) == list(range(8))
    assert not torch.equal(first, other)


def test_tensors_are_taken_at_once_and_equal_what_the_loader_gives() -> None:
    """The short cut for a TensorDataset gives the same batches as torch's loader."""
    data = TensorDataset(torch.arange(10.0), torch.arange(10))
    plan = EpochPlan(10, 4, 3, 1, 2)
    quick = list(load(data, plan, 1, 0, collate=None, workers=0))
    slow = list(load(data, plan, 1, 0, collate=default_collate, workers=0))
    assert len(quick) == len(slow) == 3
    for left, right in zip(quick, slow, strict=True):
        assert type(left) is type(right) is list
        assert all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def test_what_has_no_positions_is_refused() -> None:
    """An iterable data set, an empty one, and a batch smaller than the ranks are told in one line."""
    with pytest.raises(UsageError, match="has no length"):
        length_of(iter([1]))
    with pytest.raises(UsageError, match="empty"):
        length_of([])
    with pytest.raises(UsageError, match="batch_size is 1, less than the 2 ranks"):
        EpochPlan(10, 1, 0, 0, 2)
    with pytest.raises(UsageError, match="make no batch"):
        EpochPlan(3, 4, 0, 0, 1, drop_last=True)


def test_states_go_through_json_and_come_back() -> None:
    """Numbers, tuples, infinities, whole-number keys and small tensors of any type survive."""
    state = {
        "rate": [0.1, math.inf], 3: (1, None, "x"), "flag": True,
        "tensor": torch.arange(6, dtype=torch.bfloat16).reshape(2, 3), "none": torch.empty(0),
    }  # fmt: skip
    back = from_json(json.loads(json.dumps(as_json(state, "part"))))
    assert {key: back[key] for key in ("rate", 3, "flag")} == {key: state[key] for key in ("rate", 3, "flag")}
    assert torch.equal(back["tensor"], state["tensor"])
    assert back["tensor"].dtype == torch.bfloat16
    assert back["none"].shape == (0,)


@pytest.mark.parametrize(("state", "words"), [
    ({"f": print}, "part.f is"), ({1.5: 1}, "key 1.5"), ({"big": torch.zeros(300_000)}, "1200000 bytes"),
])  # fmt: skip
def test_what_json_cannot_hold_is_named(state: dict[object, object], words: str) -> None:
    """A function, a key of another type and a large tensor name the entry."""
    with pytest.raises(UsageError, match=words):
        as_json(state, "part")


def test_several_optimizers_keep_their_own_state() -> None:
    """Two optimisers over one model are saved as one and each gets its own back."""
    torch.manual_seed(0)
    left, right = torch.nn.Linear(2, 2), torch.nn.Linear(2, 1)
    optimizers = [
        torch.optim.Adam(left.parameters(), lr=0.1),
        torch.optim.SGD(right.parameters(), lr=0.2, momentum=0.9),
    ]
    right(left(torch.ones(1, 2))).sum().backward()
    for optimizer in optimizers:
        optimizer.step()
        optimizer.param_groups[0]["lr"] = 0.05
    both = AllOptimizers(list(optimizers))
    parameters = [p for group in both.param_groups for p in group["params"]]
    states = {index: both.state[p] for index, p in enumerate(parameters)}
    rates = json.loads(json.dumps(both.hyperparameters()))
    fresh = [torch.optim.Adam(left.parameters(), lr=0.1), torch.optim.SGD(right.parameters(), lr=0.2, momentum=0.9)]
    other = AllOptimizers(list(fresh))
    other.load_state_dict({"state": states, "param_groups": []})
    other.load_hyperparameters(rates)
    assert [group["lr"] for group in other.param_groups] == [0.05, 0.05]
    assert torch.equal(fresh[0].state[left.weight]["exp_avg"], optimizers[0].state[left.weight]["exp_avg"])
    assert torch.equal(
        fresh[1].state[right.weight]["momentum_buffer"], optimizers[1].state[right.weight]["momentum_buffer"]
    )
