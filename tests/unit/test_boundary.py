"""What a rank can hand on after a step that failed: the state between two steps, or nothing."""

from __future__ import annotations

import torch

from lepton_ray.training.boundary import Boundary


def normalised() -> torch.nn.Module:
    """A model whose forward pass changes its buffers."""
    return torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2))


def state(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The buffers as they are."""
    return {name: buffer.clone() for name, buffer in model.named_buffers()}


def test_rank_zero_undoes_what_a_failed_step_did_to_buffers() -> None:
    """After a step is done its buffers count; those of the forward pass that followed do not."""
    model = normalised()
    boundary = Boundary(model, leads=True)
    boundary.begin()
    model(torch.randn(8, 2))
    boundary.reach()
    wanted = state(model)
    model(torch.randn(8, 2))
    assert any(not torch.equal(value, wanted[name]) for name, value in state(model).items())
    assert boundary.put_back()
    assert all(torch.equal(value, wanted[name]) for name, value in state(model).items())


def test_another_rank_hands_nothing_on_once_its_own_buffers_changed() -> None:
    """A checkpoint holds rank 0's; where they never change, any rank has them."""
    model, constant = normalised(), torch.nn.Linear(2, 2)
    constant.register_buffer("scale", torch.ones(1))
    for module, valid in ((model, False), (constant, True), (torch.nn.Linear(2, 2), True)):
        boundary = Boundary(module)
        boundary.begin()
        module(torch.randn(8, 2))
        boundary.reach()
        assert boundary.put_back() is valid


def test_half_a_step_is_not_handed_on() -> None:
    """From the move of the weights to the end of the step the state is nobody's."""
    boundary = Boundary(torch.nn.Linear(2, 2), leads=True)
    assert boundary.between
    boundary.leave()
    assert not boundary.between
    boundary.reach()
    assert boundary.between
