"""The Ray Serve application: one deployment whose replicas load a verified model version and answer HTTP."""

from __future__ import annotations

import json
import logging
import os
import warnings
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch
from pydantic import BaseModel, ConfigDict, ValidationError

import lepton_ray
from lepton_ray.errors import LeptonError, UsageError
from lepton_ray.monitoring.recorder import Recorder
from lepton_ray.registry import ModelVersion, Registry
from lepton_ray.serving.app import EndpointApp, Identity
from lepton_ray.settings import ServingSettings
from lepton_ray.settings.loading import describe_errors
from lepton_ray.settings.tree import Name
from lepton_ray.storage import open_store, sha256_hex
from lepton_ray.tasks import Predictor

if TYPE_CHECKING:
    from ray import serve

DEPLOYMENT = "endpoint"
"""Name of the one deployment of every endpoint's application."""
CONSTRUCTOR_ATTEMPTS = 2
"""Starts of a replica before a deployment is given up: one more than none, as a store may be away for a moment."""

_log = logging.getLogger(__name__)


class AppArgs(BaseModel):
    """`args` of the application, as in a Serve config file."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    endpoint: Name
    """Name of the endpoint: label of its metrics."""
    model: str
    """Model version, e.g. `digits`, `digits@champion` or `digits:3`; resolved once, when the application is built."""
    store: str
    """URI of the store. Credentials come from the environment of the nodes, never from here."""
    serving: ServingSettings = ServingSettings()
    """How it answers."""


def build_app(args: dict[str, Any]) -> serve.Application:
    """The Serve application of one endpoint; import path `lepton_ray.serving:build_app`.

    Raises UsageError for wrong args, NotFoundError for a model that does not exist and IntegrityError for one that is
    damaged: nothing is deployed then.
    """
    try:
        checked = AppArgs.model_validate(args)
    except ValidationError as error:
        raise UsageError(f"args of build_app: {describe_errors(error, AppArgs)}") from error
    store = open_store(checked.store)
    registry = Registry(store)
    version = registry.resolve(checked.model)
    registry.verify(version)
    identity = Identity(checked.endpoint, version.model, version.number, version.digest)
    return bind_app(identity, store.uri, checked.serving)


def bind_app(identity: Identity, store_uri: str, settings: ServingSettings) -> serve.Application:
    """The application for an exact, verified version: all replicas, whenever they start, serve the same one."""
    from ray import serve
    from ray.serve.config import AutoscalingConfig, BackpressureConfig

    # told by Serve to whoever asks; see `deployment.Deployed`
    told = {"identity": asdict(identity), "store": store_uri, "serving": settings.model_dump()}
    with warnings.catch_warnings():
        # the interval is deprecated for a variable of the whole cluster; Ray is pinned, and this one is per endpoint
        warnings.simplefilter("ignore", DeprecationWarning)
        scaling = AutoscalingConfig(
            min_replicas=settings.min_replicas,
            initial_replicas=max(1, settings.min_replicas),
            max_replicas=settings.max_replicas,
            target_ongoing_requests=settings.target_ongoing_requests,
            # up within seconds, as requests wait; down late, as a replica takes seconds to start
            metrics_interval_s=1.0,
            look_back_period_s=4.0,
            upscale_delay_s=2.0,
            downscale_delay_s=120.0,
        )
    deployment = serve.deployment(
        serve.ingress()(Replica),
        name=DEPLOYMENT,
        ray_actor_options={"num_cpus": settings.cpus_per_replica},
        max_ongoing_requests=settings.max_ongoing_requests,
        max_queued_requests=settings.max_queued_requests,
        backpressure_config=BackpressureConfig(status_code=503, retry_after_s=1),
        max_constructor_retry_count=CONSTRUCTOR_ATTEMPTS,
        # a new version starts beside the old one, which serves until it is there
        max_surge_percent=100,
        # what a client may wait for is what a leaving replica is given to finish
        graceful_shutdown_timeout_s=settings.request_timeout_s,
        graceful_shutdown_wait_loop_s=0.5,
        health_check_period_s=5.0,
        health_check_timeout_s=30.0,
        autoscaling_config=scaling,
        user_config=told,
    )
    # Serve's versions are random by default, so that deploying the same again, or going back to it after a failure,
    # would replace every replica; this one says what a replica is made of
    content = json.dumps({"lepton_ray": lepton_ray.__version__, **told}, sort_keys=True).encode()
    deployment = deployment.options(_internal=True, version=sha256_hex(content))
    return deployment.bind(asdict(identity), store_uri, settings.model_dump())


class Replica:
    """One replica: the verified model in memory, a recorder, and the ASGI application around them.

    Args:
        identity: fields of `Identity`.
        store_uri: where the model version lies and where metrics go.
        serving: `ServingSettings` as a dict.

    Raises LeptonError from the constructor where the version cannot be loaded or its model gives no finite numbers;
    Serve then gives the deployment up, with this message.
    """

    def __init__(self, identity: dict[str, Any], store_uri: str, serving: dict[str, Any]) -> None:
        self._identity = Identity(**identity)
        self._settings = ServingSettings.model_validate(serving)
        torch.set_num_threads(max(1, int(self._settings.cpus_per_replica)))
        predictor, card = load(self._identity, store_uri)
        warm_up(predictor, self._settings.max_batch)
        self._recorder = Recorder(store_uri, self._metrics_key(), self._labels())
        self._app = EndpointApp(
            self._identity,
            predictor,
            self._settings,
            self._recorder,
            metrics=card.get("metrics"),
            echo_request_id=False,
        )
        self._recorder.start()
        self._recorder.set("lepton_serving_replica_info", 1)
        _log.info("endpoint %s: replica serves %s", self._identity.endpoint, self._identity.ref)

    def __serve_build_asgi_app__(self) -> EndpointApp:
        """Where Serve fetches the ASGI application after the constructor."""
        return self._app

    def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Serve hands the `user_config` here. It only tells `status` what is served; a replica never changes."""

    def check_health(self) -> None:
        """Asked by Serve; raises where this replica should be replaced."""
        self._app.check_health()

    def __del__(self) -> None:
        """Called by Serve when the replica leaves: the last snapshot goes out without the gauges of the living."""
        recorder = getattr(self, "_recorder", None)
        if recorder is not None:
            recorder.set("lepton_serving_replica_info", 0)
            recorder.set("lepton_serving_inflight", 0)
            recorder.close()

    def _metrics_key(self) -> str:
        return f"endpoints/{self._identity.endpoint}/metrics/{replica_id()}.json"

    def _labels(self) -> dict[str, str]:
        return {
            "endpoint": self._identity.endpoint,
            "model": self._identity.model,
            "version": str(self._identity.version),
            "digest": self._identity.digest[:12],
            "replica": replica_id(),
        }


def replica_id() -> str:
    """Serve's id of this replica, unique over restarts; outside Serve one made of the process id."""
    from ray import serve
    from ray.serve.exceptions import RayServeException

    try:
        return str(serve.get_replica_context().replica_id.unique_id)
    except RayServeException:
        return f"local-{os.getpid()}"


def load(identity: Identity, store_uri: str) -> tuple[Predictor, dict[str, Any]]:
    """The predictor and card of the version, every byte checked against its manifest, and that against the digest.

    Raises IntegrityError naming the file where the version is damaged or not the one that was deployed.
    """
    deployed = ModelVersion(identity.model, identity.version, identity.digest, card={})
    loaded = Registry(open_store(store_uri)).load(deployed)
    return Predictor.load(loaded.card, loaded.transforms, loaded.weights), loaded.card


def warm_up(predictor: Predictor, rows: int) -> None:
    """Run one full batch of made-up rows, so that the first request is not the slow one.

    Raises LeptonError where the outputs are not finite: such a model answers nothing.
    """
    for count in {1, rows}:
        requests = [predictor.task.example(predictor.transforms)] * count
        outputs = predictor.outputs(predictor.task.rows_of(requests, predictor.transforms), rows)
        if not torch.isfinite(outputs).all():
            raise LeptonError("the model's outputs are not finite: its weights are spoilt; deploy another version")
