"""Transfer learning in the real loop on two ranks, without Ray: what learns, what is kept, and how it goes on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from ranks import run_ranks
from safetensors.torch import load, save
from text_data import sentences

from lepton_ray.registry import Registry
from lepton_ray.settings import Settings, parse_settings
from lepton_ray.storage import Store
from lepton_ray.tasks import Predictor, find_task
from lepton_ray.training.checkpoints import MANIFEST, CheckpointStore
from lepton_ray.training.initialisation import check_initial
from lepton_ray.training.lease import RunLease
from lepton_ray.training.plan import RankPlan
from lepton_ray.training.state import whole_weights
from lepton_ray.training.transfer import check_transfer, publishable

OPTIONS = {"width": 8, "layers": 2, "heads": 2, "max_length": 8, "dropout": 0.1}
STEPS = 16
"""Of 32 rows, 4 epochs, batches of 8."""


def settings(run: str) -> Settings:
    return parse_settings(
        {
            "run": run,
            "task": {"name": "text_classification", "options": OPTIONS},
            "training": {
                "epochs": 4, "global_batch": 8, "optimizer": {"learning_rate": 2e-2},
                "initial": {"weights": "model:donor", "ignore": ["head.*"]},
                "transfer": {
                    "lora": {"rank": 2, "alpha": 4.0, "targets": ["query", "value"], "train": ["head.*"]},
                    "unfreeze": [{"epoch": 2, "patterns": ["norm.*", "blocks.1.query.weight"]}],
                },
                "checkpoint": {"every_steps": 6, "keep": 10, "hot": False},
            },
        }
    )  # fmt: skip


def train_here(plan: RankPlan, scratch: str) -> dict[str, Any]:
    """The loop on one rank of a group that exists already."""
    from lepton_ray.training.context import RankContext
    from lepton_ray.training.loop import train
    from lepton_ray.training.rank import Rank

    context = RankContext(plan, torch.device("cpu"))
    try:
        rank = Rank(context, sentences(), sentences(1), Path(scratch))
        outcome = train(rank)
        rank.close(finished=True)
    finally:
        context.close()
    return outcome


def prepared(store: Store, run: str) -> RankPlan:
    """What the driver would tell the ranks, after its checks."""
    made = settings(run)
    task = find_task("text_classification", OPTIONS)
    transforms = task.fit(sentences())
    if not Registry(store).numbers("donor"):
        torch.manual_seed(7)
        donor = task.build(transforms).state_dict()
        Registry(store).publish("donor", weights=save(donor), card={"task": {}}, transforms={})
    check_transfer(made.training.transfer, task, transforms)
    initial = check_initial(made.training.initial, task, transforms, store)
    return RankPlan(made, store.uri, RunLease.acquire(store, run).attempt, transforms, "", initial=initial)


def test_adapters_train_on_two_ranks_and_a_resumed_run_ends_with_the_same_bits(
    file_store: Store, tmp_path: Path
) -> None:
    """Also where it resumes in an epoch in which other parameters learn than in the first one."""
    plan = prepared(file_store, "adapters")
    (tmp_path / "scratch").mkdir()
    outcome = run_ranks(train_here, 2, plan, str(tmp_path / "scratch"))[0]
    assert outcome["step"] == STEPS
    checkpoints = CheckpointStore(file_store, "adapters", plan.attempt)
    weights = whole_weights(checkpoints.load(STEPS).files)

    donor = load(Registry(file_store).load(Registry(file_store).resolve("donor")).weights)
    tensors = {step: load(whole_weights(checkpoints.load(step).files)) for step in (6, 12, STEPS)}
    query, norm = "blocks.1.query.base_layer.weight", "norm.weight"
    for name, plain in ((query, "blocks.1.query.weight"), (norm, norm)):
        assert torch.equal(tensors[6][name], donor[plain])
        assert not torch.equal(tensors[12][name], donor[plain])
    assert torch.equal(tensors[STEPS]["embedding.weight"], donor["embedding.weight"])
    assert not torch.equal(tensors[6]["head.weight"], donor["head.weight"])

    task = find_task("text_classification", OPTIONS)
    model = task.build(plan.transforms)
    model.load_state_dict(load(publishable(weights, plan.settings.training.transfer)))
    published = Predictor(task, plan.transforms, model).evaluate(sentences(1))
    assert abs(published["loss"] - outcome["metrics"]["loss"]) < 1e-5
    assert published["accuracy"] == outcome["metrics"]["accuracy"]

    file_store.delete(f"{checkpoints.folder(STEPS)}/{MANIFEST}")  # as if the last checkpoint had not come about
    run_ranks(train_here, 2, plan, str(tmp_path / "scratch"))
    assert whole_weights(checkpoints.load(STEPS).files) == weights
