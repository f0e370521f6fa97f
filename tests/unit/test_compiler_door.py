"""Ranks that do not compile do not load torch's compiler; those that do get all of it."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

PROGRAM = """
import json, sys, torch, torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

if sys.argv[1] != "plain":
    from lepton_ray.training.compiler_door import keep_compiler_out
    assert keep_compiler_out() and keep_compiler_out()
if sys.argv[1] == "compile":
    import torch._dynamo
torch.set_num_threads(1)
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
losses = []
for kind, options in (
    (torch.optim.SGD, {"momentum": 0.9}), (torch.optim.Adam, {}), (torch.optim.AdamW, {"fused": True}),
    (torch.optim.Adagrad, {}), (torch.optim.RMSprop, {}),
):
    torch.manual_seed(0)
    model = DistributedDataParallel(torch.nn.Linear(4, 3))
    optimizer = kind([{"params": [model.module.weight]}, {"params": [model.module.bias]}], lr=0.1, **options)
    for _ in range(3):
        optimizer.zero_grad()
        loss = model(torch.ones(2, 4)).square().sum()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    optimizer.load_state_dict(optimizer.state_dict())
loaded = "torch._dynamo" in sys.modules
if sys.argv[1] == "late":
    compiled = torch.compile(model, backend="eager")
    compiled(torch.ones(2, 4)).sum().backward()
    optimizer.step()
    loaded = torch._dynamo.utils.get_optimize_ddp_mode() == "ddp_optimizer" and "torch._dynamo" in sys.modules
print(json.dumps({"losses": losses, "loaded": loaded}))
dist.destroy_process_group()
"""


def run(mode: str) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, mode], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.fixture(scope="module")
def plain() -> dict[str, Any]:
    return run("plain")


def test_rank_that_does_not_compile_loads_no_compiler(plain):
    """Neither DDP nor any of the optimisers imports it, and the weights move bit for bit as they do with it."""
    kept_out = run("kept out")
    assert plain["loaded"], "torch no longer loads its compiler for an optimiser: this module can go"
    assert not kept_out["loaded"]
    assert kept_out["losses"] == plain["losses"]


@pytest.mark.parametrize("mode", ["compile", "late"])
def test_compiler_works_where_it_is_used(plain, mode):
    """Loaded before training or after it, a compiled DDP model runs and trains, and nothing else changes."""
    found = run(mode)
    assert found["loaded"]
    assert found["losses"] == plain["losses"]
