"""Initial weights: found, matched, told before anything starts, and the same on every rank."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from ranks import run_ranks
from safetensors.torch import load_file, save, save_file
from text_data import sentences, tiny_folder

from lepton_ray.errors import IntegrityError, RefusedError, UsageError
from lepton_ray.registry import Registry
from lepton_ray.settings import Settings, parse_settings
from lepton_ray.settings.training import InitialSettings
from lepton_ray.storage import Store, open_store
from lepton_ray.tasks import AnyTask, find_task
from lepton_ray.training.checkpoints import CheckpointStore
from lepton_ray.training.initialisation import Matched, check_initial, initialise
from lepton_ray.training.lease import RunLease
from lepton_ray.training.transfer import Transfer
from lepton_ray.training.weight_sources import source_checkpoint

CPU = torch.device("cpu")
OPTIONS = {"width": 8, "layers": 2, "heads": 2, "max_length": 8}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Threads that wait for each other make these tiny models slow on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def text_task(**options: Any) -> tuple[AnyTask, dict[str, Any]]:
    task = find_task("text_classification", {**OPTIONS, **options})
    return task, task.fit(sentences())


def built(task: AnyTask, transforms: dict[str, Any], seed: int = 0) -> torch.nn.Module:
    torch.manual_seed(seed)
    return task.build(transforms)


def settings(weights: str | None, **fields: Any) -> InitialSettings:
    return InitialSettings(weights=weights, **fields)


def equal(one: torch.nn.Module, other: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(value, other[name]) for name, value in one.state_dict().items())


def checkpointed(store: Store, run: str, tensors: dict[int, dict[str, torch.Tensor]], **training: Any) -> None:
    """A run with a checkpoint at each of these steps."""
    made = parse_settings({"run": run, "training": training})
    store.put(f"runs/{run}/spec.yaml", yaml.safe_dump(made.model_dump(mode="json")).encode())
    lease = RunLease.acquire(store, run)
    for step, weights in tensors.items():
        files = {"model.safetensors": save(weights), "optimizer.safetensors": save({}), "state.json": b"{}"}
        CheckpointStore(store, run, lease.attempt).save(step, files, {})
    lease.release()


def test_without_a_source_nothing_is_done(file_store: Store) -> None:
    task, transforms = text_task()
    assert check_initial(settings(None), task, transforms, file_store) is None
    model = built(task, transforms)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert initialise(model, settings(None), file_store, CPU) is None
    assert equal(model, before)


def test_a_file_fills_every_tensor_of_its_model(file_store: Store, tmp_path: Path) -> None:
    """By path and by file:// alike; half precision becomes single."""
    task, transforms = text_task()
    donor = built(task, transforms, seed=1).state_dict()
    path = tmp_path / "donor.safetensors"
    save_file({name: value.half() for name, value in donor.items()}, path)
    for weights in (str(path), path.as_uri()):
        model = built(task, transforms)
        matched = initialise(model, settings(weights), file_store, CPU)
        assert matched is not None
        assert (matched.share, matched.missing, matched.unexpected, matched.exchanged) == (1.0, [], [], {})
        assert equal(model, {name: value.half().float() for name, value in donor.items()})
        assert check_initial(settings(weights), task, transforms, file_store) == matched


@pytest.mark.s3
def test_a_file_on_s3_is_a_source(s3_store: Store) -> None:
    task, transforms = text_task()
    donor = built(task, transforms, seed=1).state_dict()
    s3_store.put("somewhere/donor.safetensors", save(donor))
    model = built(task, transforms)
    initialise(model, settings(f"{s3_store.uri}/somewhere/donor.safetensors"), s3_store, CPU)
    assert equal(model, donor)
    with pytest.raises(UsageError, match=r"training.initial.weights is 's3://.*gone.safetensors'"):
        check_initial(settings(f"{s3_store.uri}/gone.safetensors"), task, transforms, s3_store)


def test_a_model_version_is_a_source_and_stays_the_one_that_was_checked(file_store: Store) -> None:
    """The alias moves between the driver's check and a restart of the ranks: the run goes on with the first."""
    task, transforms = text_task()
    donors = [built(task, transforms, seed=seed).state_dict() for seed in (1, 2)]
    registry = Registry(file_store)
    for number, donor in enumerate(donors, 1):
        registry.publish("texts", weights=save(donor), card={"task": {}}, transforms={})
        registry.set_alias("texts", "champion", number)
        if number == 1:
            expected = check_initial(settings("model:texts@champion"), task, transforms, file_store)
    assert expected is not None
    assert expected.source == "model:texts:1"
    model = built(task, transforms)
    initialise(model, settings("model:texts@champion"), file_store, CPU, expected)
    assert equal(model, donors[0])
    initialise(model, settings("model:texts@champion"), file_store, CPU)
    assert equal(model, donors[1])


def test_a_run_is_a_source_at_its_newest_or_a_named_step(file_store: Store) -> None:
    task, transforms = text_task()
    donors = {step: built(task, transforms, seed=step).state_dict() for step in (10, 20)}
    checkpointed(file_store, "donor", donors)
    for weights, step in (("run:donor", 20), ("run:donor@10", 10), ("run:donor@20", 20)):
        model = built(task, transforms)
        matched = initialise(model, settings(weights), file_store, CPU)
        assert matched is not None
        assert matched.source == f"run:donor@{step}"
        assert equal(model, donors[step])
    assert source_checkpoint("run:donor@10", file_store).step == 10
    for weights in ("run:donor@11", "run:nobody"):
        with pytest.raises(UsageError, match="has no such checkpoint in store"):
            check_initial(settings(weights), task, transforms, file_store)


def test_a_run_with_adapters_gives_its_merged_weights(file_store: Store) -> None:
    """Its checkpoint holds the adapters apart; a run that starts from it may have none."""
    task, transforms = text_task()
    training = {"transfer": {"lora": {"targets": ["query"], "rank": 2, "alpha": 8.0}}}
    made: Settings = parse_settings({"training": training})
    donor = built(task, transforms, seed=1)
    Transfer(donor, made.training.transfer)
    torch.nn.init.normal_(donor.get_parameter("blocks.0.query.lora_B.default.weight"))
    checkpointed(file_store, "donor", {5: donor.state_dict()}, **training)
    model = built(task, transforms)
    matched = initialise(model, settings("run:donor"), file_store, CPU)
    assert matched is not None
    assert matched.share == 1.0
    inputs = task.inputs(sentences(), transforms)
    assert torch.allclose(model.eval()(inputs), donor.eval()(inputs), atol=1e-6)


@pytest.mark.parametrize("shards", [False, True])
def test_a_model_folder_fills_the_encoder(file_store: Store, tmp_path: Path, *, shards: bool) -> None:
    """Its names lack the prefix that they have in the task's model: that exchange is found by itself."""
    folder = tiny_folder(tmp_path / "tiny", seed=5, shards=shards)
    assert len(list(folder.glob("*.safetensors"))) > 1 if shards else (folder / "model.safetensors").is_file()
    task, transforms = text_task(network="huggingface", folder=str(folder))
    model = built(task, transforms)
    matched = initialise(model, settings(str(folder)), file_store, CPU)
    assert matched is not None
    assert matched.exchanged == {"": "encoder."}
    assert matched.missing == ["head.weight", "head.bias"]
    assert all(name.startswith("pooler.") for name in matched.unexpected)
    for path in folder.glob("*.safetensors"):
        for name, value in load_file(path).items():
            if not name.startswith("pooler."):
                assert torch.equal(model.state_dict()[f"encoder.{name}"], value)
    assert Matched(**json.loads(json.dumps(matched.to_json()))) == matched


def test_a_folder_of_older_days_has_other_names(file_store: Store, tmp_path: Path) -> None:
    """`bert.embeddings.LayerNorm.gamma`, as in the first BERT releases, beside a head for another task."""
    folder = tiny_folder(tmp_path / "tiny")
    tensors = load_file(folder / "model.safetensors")
    old = {f"bert.{name.replace('Norm.weight', 'Norm.gamma').replace('Norm.bias', 'Norm.beta')}": value
           for name, value in tensors.items()}  # fmt: skip
    save_file({**old, "cls.predictions.bias": torch.zeros(3)}, folder / "model.safetensors")
    task, transforms = text_task(network="huggingface", folder=str(folder))
    model = built(task, transforms)
    matched = initialise(model, settings(str(folder)), file_store, CPU)
    assert matched is not None
    assert matched.exchanged == {"bert.": "encoder."}
    assert matched.missing == ["head.weight", "head.bias"]
    assert torch.equal(
        model.state_dict()["encoder.embeddings.LayerNorm.weight"], tensors["embeddings.LayerNorm.weight"]
    )


def test_rename_and_ignore_decide_what_goes_where(file_store: Store, tmp_path: Path) -> None:
    task, transforms = text_task()
    donor = built(task, transforms, seed=1).state_dict()
    path = tmp_path / "donor.safetensors"
    save_file({name.replace("blocks.", "old.layer."): value for name, value in donor.items()}, path)
    made = settings(str(path), rename={"old.layer.": "blocks."}, ignore=["head.*"])
    model = built(task, transforms)
    matched = initialise(model, made, file_store, CPU)
    assert matched is not None
    assert matched.missing == ["head.weight", "head.bias"]
    assert matched.ignored == ["head.bias", "head.weight"]
    assert not torch.equal(model.state_dict()["head.weight"], donor["head.weight"])
    assert torch.equal(model.state_dict()["blocks.1.query.weight"], donor["blocks.1.query.weight"])
    for wrong, words in (
        ({"rename": {"old.layr.": "blocks."}}, "rename: no tensor begins with 'old.layr.'; the source has old.layer."),
        ({"ignore": ["haed.*"]}, "ignore has 'haed.*': fits no tensor; the source has head."),
        ({"rename": {"old.layer.0.": "blocks.0.", "old.layer.1.": "blocks.0."}}, "both become"),
    ):
        with pytest.raises(UsageError) as caught:
            check_initial(settings(str(path), **wrong), task, transforms, file_store)
        assert words in str(caught.value)


def test_too_little_in_common_is_refused_with_the_lists(file_store: Store, tmp_path: Path) -> None:
    task, transforms = text_task()
    donor = built(*text_task(width=16)).state_dict()
    path = tmp_path / "donor.safetensors"
    save_file({**donor, "extra": torch.zeros(2)}, path)
    with pytest.raises(UsageError) as caught:
        check_initial(settings(str(path)), task, transforms, file_store)
    said = str(caught.value)
    assert "% of the model's values, expected 50% or more (training.initial.at_least)" in said
    assert "not in the model: extra" in said
    assert "of another shape: " in said
    matched = check_initial(settings(str(path), at_least=0.0), task, transforms, file_store)
    assert matched is not None
    assert list(matched.names) == ["head.bias"]


@pytest.mark.parametrize(
    ("weights", "words"),
    [
        ("model:nobody", "model 'nobody': no version in store"),
        ("run:Bad_Name", "name of the run must match"),
        ("s3://bucket/model.bin", "expected s3://bucket/folder/NAME.safetensors"),
        ("/no/such/file.safetensors", "there is no such file"),
        ("/no/such/folder", "is no folder; expected a folder with config.json"),
        ("http://somewhere/model.safetensors", "there is no such file"),
    ],
)
def test_a_source_that_is_not_there_is_named(file_store: Store, weights: str, words: str) -> None:
    with pytest.raises(UsageError) as caught:
        check_initial(settings(weights), *text_task(), file_store)
    assert words in str(caught.value)
    assert "training.initial.weights" in str(caught.value)


def test_files_of_a_wrong_kind_are_refused(file_store: Store, tmp_path: Path) -> None:
    """No pickle is opened, whatever its name, and a torn or poisoned file is told."""
    task, transforms = text_task()
    donor = built(task, transforms).state_dict()
    pickled = tmp_path / "donor.safetensors"
    torch.save(donor, pickled)
    with pytest.raises(RefusedError, match="look like pickle"):
        check_initial(settings(str(pickled)), task, transforms, file_store)
    pickled.rename(tmp_path / "donor.pt")
    with pytest.raises(UsageError, match="is no safetensors file"):
        check_initial(settings(str(tmp_path / "donor.pt")), task, transforms, file_store)
    torn = tmp_path / "torn.safetensors"
    torn.write_bytes(save(donor)[:-10])
    with pytest.raises(UsageError, match=r"torn.safetensors.*the tensors end at byte"):
        check_initial(settings(str(torn)), task, transforms, file_store)
    poisoned = tmp_path / "poisoned.safetensors"
    save_file({**donor, "head.bias": torch.tensor([1.0, float("nan")])}, poisoned)
    with pytest.raises(UsageError, match=r"'head.bias' holds a value that is not finite"):
        initialise(task.build(transforms), settings(str(poisoned)), file_store, CPU)
    folder = tiny_folder(tmp_path / "tiny")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(UsageError, match=r"pytorch_model.bin can run code when loaded"):
        check_initial(settings(str(folder)), task, transforms, file_store)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../../x.safetensors"}}))
    with pytest.raises(UsageError, match=r"names '../../x.safetensors', which folder"):
        check_initial(settings(str(folder)), task, transforms, file_store)


def test_a_source_that_changed_since_the_check_is_refused(file_store: Store, tmp_path: Path) -> None:
    task, transforms = text_task()
    path = tmp_path / "donor.safetensors"
    save_file(built(task, transforms, seed=1).state_dict(), path)
    expected = check_initial(settings(str(path)), task, transforms, file_store)
    save_file(built(task, transforms, seed=2).state_dict(), path)
    with pytest.raises(IntegrityError, match="changed since the run was checked"):
        initialise(task.build(transforms), settings(str(path)), file_store, CPU, expected)


def test_the_optimizer_is_taken_from_runs_only(file_store: Store, tmp_path: Path) -> None:
    task, transforms = text_task()
    path = tmp_path / "donor.safetensors"
    save_file(built(task, transforms).state_dict(), path)
    for weights, words in ((None, "which is null"), (str(path), "needs run:NAME or run:NAME@STEP")):
        with pytest.raises(UsageError, match=words):
            check_initial(settings(weights, optimizer=True), task, transforms, file_store)


def on_a_rank(store_uri: str, sources: list[str]) -> list[tuple[str, float]]:
    """What a rank has after each source, which only rank 0 can read: source or error, and the sum of its weights."""
    number = torch.distributed.get_rank()
    task, transforms = text_task()
    store = open_store(store_uri if number == 0 else "file:///nowhere/at/all")
    found = []
    for weights in sources:
        model = built(task, transforms, seed=number)
        try:
            matched = initialise(model, settings(weights), store, CPU)
        except (UsageError, RefusedError) as error:
            found.append((f"{type(error).__name__}: {error}", 0.0))
        else:
            assert matched is not None
            found.append((matched.source, float(sum(value.double().sum() for value in model.state_dict().values()))))
    return found


def test_rank_0_reads_for_all_and_all_hear_of_its_failure(file_store: Store, tmp_path: Path) -> None:
    """The others have other random weights and no way to the store: they end with the same, or the same error."""
    task, transforms = text_task()
    donor = built(task, transforms, seed=9).state_dict()
    Registry(file_store).publish("texts", weights=save(donor), card={"task": {}}, transforms={})
    poisoned = tmp_path / "poisoned.safetensors"
    save_file({**donor, "head.bias": torch.tensor([1.0, float("nan")])}, poisoned)
    one, other = run_ranks(on_a_rank, 2, file_store.uri, ["model:nobody", str(poisoned), "model:texts"])
    assert one == other
    assert one[0][0].startswith("UsageError: training.initial.weights is 'model:nobody'")
    assert "'head.bias' holds a value that is not finite" in one[1][0]
    assert one[2] == ("model:texts:1", float(sum(value.double().sum() for value in donor.values())))
