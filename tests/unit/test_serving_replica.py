"""A replica without Ray around it: what it loads, what it refuses, what it records; and the application's arguments."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from served_model import publish

from lepton_ray.errors import IntegrityError, LeptonError, NotFoundError, UsageError
from lepton_ray.registry import ModelVersion
from lepton_ray.serving import build_app
from lepton_ray.serving.replica import CONSTRUCTOR_ATTEMPTS, DEPLOYMENT, Replica
from lepton_ray.settings import ServingSettings
from lepton_ray.storage import Store

WEIGHTS = "models/digits/versions/1/model.safetensors"


@pytest.fixture
def version(file_store: Store) -> ModelVersion:
    """`digits:1` in a file store."""
    return publish(file_store)


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    """A replica sets torch's threads for its whole process."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def replica(store: Store, version: ModelVersion, **settings: Any) -> Replica:
    identity = {"endpoint": "e", "model": version.model, "version": version.number, "digest": version.digest}
    return Replica(identity, store.uri, ServingSettings(**settings).model_dump())


def flip_a_bit(store: Store, key: str) -> None:
    data = bytearray(store.get(key))
    data[len(data) // 2] ^= 1
    store.put(key, bytes(data))


def test_a_replica_is_warm_and_recorded(file_store: Store, version: ModelVersion) -> None:
    """Its snapshot names endpoint, model, version and digest, and says that it left when it leaves."""
    made = replica(file_store, version, cpus_per_replica=2.0)
    assert torch.get_num_threads() == 2
    made.check_health()
    made.reconfigure({})
    assert made.__serve_build_asgi_app__() is made.__serve_build_asgi_app__()
    assert info(made._recorder.snapshot()) == 1
    made.__del__()
    (entry,) = file_store.list("endpoints/e/metrics")
    snapshot = json.loads(file_store.get(entry.key))
    assert snapshot["labels"].items() >= {"endpoint": "e", "model": "digits", "version": "1"}.items()
    assert snapshot["labels"]["digest"] == version.digest[:12]
    assert info(snapshot) == 0


def info(snapshot: dict[str, Any]) -> float:
    """Whether the replica says that it lives."""
    families = {family["name"]: family["samples"] for family in snapshot["families"]}
    return float(families["lepton_serving_replica_info"][0]["value"])


@pytest.mark.parametrize("name", ["model.safetensors", "transforms.json", "model.json", "manifest.json"])
def test_a_flipped_bit_is_never_served(file_store: Store, version: ModelVersion, name: str) -> None:
    """The error names the file."""
    flip_a_bit(file_store, f"models/digits/versions/1/{name}")
    with pytest.raises(IntegrityError, match=name):
        replica(file_store, version)


def test_another_version_under_the_number_is_refused(file_store: Store, version: ModelVersion) -> None:
    """All replicas serve what was deployed, whatever happens to the store later."""
    other = ModelVersion(version.model, version.number, "00" * 32, version.card)
    with pytest.raises(IntegrityError, match=r"manifest\.json of model version digits:1"):
        replica(file_store, other)


def test_a_model_without_finite_outputs_is_refused(file_store: Store, version: ModelVersion) -> None:
    """Finite weights can still overflow."""

    def overflow(self: Any, rows: Any, batch: int = 256) -> torch.Tensor:
        return torch.full((rows.num_rows, 10), float("nan"))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lepton_ray.tasks.Predictor.outputs", overflow)
        with pytest.raises(LeptonError, match="not finite"):
            replica(file_store, version)


def test_a_replica_lives_without_its_recorder(file_store: Store, version: ModelVersion) -> None:
    """A store that refuses metrics takes nothing down."""
    file_store.put("endpoints", b"a file where a folder should be")
    made = replica(file_store, version)
    made.check_health()
    made.__del__()


def args(file_store: Store, **changed: Any) -> dict[str, Any]:
    return {"endpoint": "digits", "model": "digits", "store": file_store.uri} | changed


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"endpoint": "../x"}, "endpoint is '../x'"),
        ({"endpoints": "x"}, "endpoints: unknown key"),
        ({"model": 3}, "model is 3"),
        ({"serving": {"max_batchh": 1}}, "serving.max_batchh: unknown key; did you mean 'max_batch'"),
        ({"serving": {"min_replicas": 3, "max_replicas": 2}}, "min_replicas 3 is above"),
        ({"store": "ftp://x"}, "unknown scheme"),
    ],
)
def test_wrong_arguments_are_told(file_store: Store, changed: dict[str, Any], told: str) -> None:
    with pytest.raises(UsageError, match=told):
        build_app(args(file_store, **changed))


def test_a_damaged_or_missing_model_builds_no_app(file_store: Store, version: ModelVersion) -> None:
    with pytest.raises(NotFoundError, match="nope"):
        build_app(args(file_store, model="nope"))
    flip_a_bit(file_store, WEIGHTS)
    with pytest.raises(IntegrityError, match=r"model\.safetensors"):
        build_app(args(file_store))


def test_the_app_is_pinned_to_one_version(file_store: Store, version: ModelVersion) -> None:
    """The reference is resolved when the app is built; its options are those of the settings."""
    serving = {"min_replicas": 0, "max_replicas": 7, "max_queued_requests": 9, "cpus_per_replica": 0.5}
    deployment = build_app(args(file_store, model="digits", serving=serving))._bound_deployment
    assert deployment.name == DEPLOYMENT
    identity, store_uri, _ = deployment.init_args
    assert identity == {"endpoint": "digits", "model": "digits", "version": 1, "digest": version.digest}
    assert store_uri == file_store.uri
    config = deployment._deployment_config
    assert config.user_config["identity"] == identity
    assert config.user_config["store"] == file_store.uri
    assert config.max_queued_requests == 9
    assert config.backpressure_config.status_code == 503
    assert config.backpressure_config.retry_after_s == 1
    assert config.max_constructor_retry_count == CONSTRUCTOR_ATTEMPTS
    assert (config.autoscaling_config.min_replicas, config.autoscaling_config.max_replicas) == (0, 7)
    assert deployment.ray_actor_options["num_cpus"] == 0.5


def test_the_same_again_is_the_same_to_serve(file_store: Store, version: ModelVersion) -> None:
    """Replicas are kept where nothing changed, replaced where model or settings did."""

    def serve_version(**changed: Any) -> str:
        return str(build_app(args(file_store, **changed))._bound_deployment.version)

    first = serve_version()
    assert serve_version(model="digits:1") == first
    assert serve_version(serving={"max_batch": 9}) != first
    publish(file_store, seed=1)
    assert serve_version() != first
