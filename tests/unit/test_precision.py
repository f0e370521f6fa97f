"""Number formats, compiling with a way back, and bits that repeat."""

from __future__ import annotations

import functools
import json
import logging
import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch._dynamo
import torch._inductor.config

from lepton_ray.settings.training import PrecisionSettings
from lepton_ray.training.precision import Precision, make_deterministic

CPU = torch.device("cpu")


def network() -> torch.nn.Sequential:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.ReLU(), torch.nn.Linear(6, 1))


@pytest.fixture(autouse=True)
def _as_before(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What is global to the process is set back."""
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    before = cudnn.deterministic, cudnn.benchmark, cudnn.allow_tf32, matmul.allow_tf32
    yield
    cudnn.deterministic, cudnn.benchmark, cudnn.allow_tf32, matmul.allow_tf32 = before
    torch.use_deterministic_algorithms(False)
    torch._dynamo.reset()


def test_fp32_changes_nothing() -> None:
    precision = Precision(PrecisionSettings(), CPU)
    with precision.autocast():
        assert network()(torch.ones(2, 4)).dtype == torch.float32
    assert precision.scaler is None
    assert precision.to_json() == {}
    assert not precision.searching()


def test_bf16_computes_in_bf16_and_keeps_weights_and_gradients_in_fp32() -> None:
    model, precision = network(), Precision(PrecisionSettings(compute="bf16"), CPU)
    with precision.autocast():
        outputs = model(torch.ones(2, 4))
    assert outputs.dtype == torch.bfloat16
    outputs.float().sum().backward()
    for parameter in model.parameters():
        assert parameter.dtype == torch.float32
        assert parameter.grad is not None
        assert parameter.grad.dtype == torch.float32
    torch.testing.assert_close(outputs.float(), network()(torch.ones(2, 4)), rtol=0.05, atol=0.05)
    assert precision.scaler is None


def scaled_step(precision: Precision, model: torch.nn.Module, optimizer: torch.optim.Optimizer, size: float) -> None:
    assert precision.scaler is not None
    with precision.autocast():
        loss = model(torch.full((2, 4), size)).float().mean() / 4
    precision.scaler.scale(loss).backward()
    precision.scaler.unscale_(optimizer)
    precision.scaler.step(optimizer)
    precision.scaler.update()
    optimizer.zero_grad()


def test_fp16_scales_the_loss_and_gives_the_step_of_fp32() -> None:
    model, plain = network(), network()
    precision = Precision(PrecisionSettings(compute="fp16"), CPU)
    scaled_step(precision, model, torch.optim.SGD(model.parameters(), 0.1), 0.5)
    (plain(torch.full((2, 4), 0.5)).mean() / 4).backward()
    torch.optim.SGD(plain.parameters(), 0.1).step()
    for one, other in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-2, atol=1e-3)
    assert not torch.equal(model[0].weight, network()[0].weight)


def test_fp16_looks_for_its_scale_after_an_overflow_and_remembers_it() -> None:
    """A step whose scaled gradients overflow is left out and halves the scale; a restored run has the same scale."""
    model, precision = network(), Precision(PrecisionSettings(compute="fp16"), CPU)
    scaler = precision.scaler
    assert scaler is not None
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    scaled_step(precision, model, optimizer, 60000.0)
    assert torch.equal(model[0].weight, network()[0].weight)
    assert scaler.get_scale() == 32768.0
    assert precision.searching()
    restored = Precision(PrecisionSettings(compute="fp16"), CPU)
    restored.restore({})  # a run that had no scaler before
    assert restored.scaler is not None
    assert restored.scaler.get_scale() == 65536.0
    restored.restore(json.loads(json.dumps(precision.to_json())))
    assert restored.scaler.get_scale() == 32768.0
    scaler.update(1.0)
    assert not precision.searching()


def compiled(monkeypatch: pytest.MonkeyPatch, backend: Any, model: torch.nn.Module) -> torch.nn.Module:
    """The module with torch's compiler in front of another backend: no C++ compiler takes part."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    return Precision(PrecisionSettings(compile=True), CPU).compiled(model)


def test_a_compiled_model_is_the_same_module(monkeypatch: pytest.MonkeyPatch) -> None:
    """The compiler sees the whole forward, names and parameters stay, results and gradients too."""
    graphs = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    model, plain = network(), network()
    names = list(model.state_dict())
    assert compiled(monkeypatch, backend, model) is model
    outputs = model(torch.ones(2, 4))
    outputs.sum().backward()
    expected = plain(torch.ones(2, 4))
    expected.sum().backward()
    assert len(graphs) == 1
    assert list(model.state_dict()) == names
    assert torch.equal(outputs, expected)
    assert torch.equal(model[0].weight.grad, plain[0].weight.grad)  # type: ignore[arg-type]


def test_inside_ddp_the_bare_model_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """In training and evaluation; a forward that the module is lent for a moment is not."""
    graphs = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        model, inputs = torch.nn.parallel.DistributedDataParallel(network()), torch.ones(2, 4)
        assert compiled(monkeypatch, backend, model) is model
        bare = model.module
        bare.__dict__["forward"] = lambda: "lent"
        assert model() == "lent"
        del bare.__dict__["forward"]
        assert not graphs
        model(inputs).sum().backward()
        assert len(graphs) == 1
        assert torch.equal(bare(inputs), network()(inputs))
        assert len(graphs) == 1
        assert bare[0].weight.grad is not None
    finally:
        torch.distributed.destroy_process_group()


def test_without_a_compiler_the_model_runs_as_it_is_with_one_warning(caplog: pytest.LogCaptureFixture) -> None:
    model = Precision(PrecisionSettings(compile=True), CPU).compiled(network())
    missing = {"cpp.cxx": ("/nowhere/c++",), "force_disable_caches": True}
    with torch._inductor.config.patch(missing), caplog.at_level(logging.WARNING, "lepton_ray"):
        for _ in range(3):
            assert torch.equal(model(torch.ones(2, 4)), network()(torch.ones(2, 4)))
    told = [record.message for record in caplog.records if record.name.startswith("lepton_ray")]
    assert len(told) == 1
    assert "training.precision.compile: compiling failed, the model runs as it is" in told[0]


def test_a_shape_that_does_not_compile_later_falls_back_too(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    calls = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        calls.append(graph)
        if len(calls) > 1:
            raise NotImplementedError("only one shape")
        return graph.forward

    model = compiled(monkeypatch, backend, network())
    for rows in (2, 2, 3, 5):
        inputs = torch.full((rows, 4), 0.5)
        assert torch.equal(model(inputs), network()(inputs))
    assert len(calls) == 2
    assert len([record for record in caplog.records if record.name.startswith("lepton_ray")]) == 1


class Breaks(torch.nn.Module):
    """A model with an error of its own from the second call on, out of the compiler's sight."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    @torch._dynamo.disable
    def count(self) -> None:
        self.calls += 1
        if self.calls > 1:
            raise ConnectionError("gone")

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        outputs = inputs * 2
        self.count()
        return outputs


def test_a_models_own_later_error_is_raised_and_not_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    model = compiled(monkeypatch, "eager", Breaks())
    model(torch.ones(2))
    with pytest.raises(ConnectionError):
        model(torch.ones(2))
    assert model.calls == 2


def test_a_model_is_left_alone_unless_compiling_is_asked_for() -> None:
    model = network()
    assert Precision(PrecisionSettings(), CPU).compiled(model) is model
    assert model._compiled_call_impl is None


def test_tf32_is_switched_on_for_matrices_and_convolutions_and_else_left() -> None:
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    Precision(PrecisionSettings(), CPU).apply_switches()
    assert (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32) == before
    Precision(PrecisionSettings(tf32=True), CPU).apply_switches()
    assert torch.backends.cuda.matmul.allow_tf32
    assert torch.backends.cudnn.allow_tf32


def test_deterministic_refuses_what_has_no_deterministic_algorithm() -> None:
    make_deterministic()
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    assert torch.backends.cudnn.deterministic
    assert not torch.backends.cudnn.benchmark
    with pytest.raises(RuntimeError, match="deterministic"):
        torch.zeros(4).put_(torch.tensor([0, 0]), torch.ones(2))
