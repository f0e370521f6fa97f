"""Deploying, asking after and deleting endpoints on the Ray that this process is connected to."""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import httpx

from lepton_ray import errors
from lepton_ray.errors import ConflictError, LeptonError, NotFoundError, UnavailableError, UsageError, escaped, shown
from lepton_ray.registry import ModelVersion, Registry
from lepton_ray.serving import control
from lepton_ray.serving.app import MODEL_HEADER, Identity
from lepton_ray.serving.replica import DEPLOYMENT, bind_app
from lepton_ray.settings import ServingSettings
from lepton_ray.settings.tree import check_name
from lepton_ray.storage import Store, open_store

DEPLOY_TIMEOUT_S = 180.0
"""Seconds from the call to an answering endpoint; most of it is starting Python processes that import torch."""
POLL_S = 0.2

_ROUTE_PREFIX = re.compile(r"/|(?:/[a-z0-9](?:[-a-z0-9]{0,61}[a-z0-9])?){1,4}")
_OUR_ERROR = re.compile(r"lepton_ray\.errors\.(\w+): (.+)")


@dataclass(frozen=True)
class Endpoint:
    """An endpoint that answers."""

    name: str
    url: str
    """Base of its paths, e.g. `http://127.0.0.1:8000`: predictions at `<url>/predict`."""
    model: str
    version: int
    digest: str
    """SHA-256 of the version's manifest."""

    @property
    def ref(self) -> str:
        """`model:version`."""
        return f"{self.model}:{self.version}"

    def to_dict(self) -> dict[str, Any]:
        """All fields, for `--json`."""
        return asdict(self)


@dataclass(frozen=True)
class Status:
    """What is deployed under a name and how it does."""

    name: str
    state: str
    """Serve's application status: RUNNING, DEPLOYING, DEPLOY_FAILED, UNHEALTHY, DELETING, ..."""
    message: str
    url: str
    model: str
    version: int
    digest: str
    replicas: dict[str, int]
    """Replicas by Serve's state, e.g. `{"RUNNING": 2}`."""
    target_replicas: int
    """Replicas that autoscaling wants now."""

    def to_dict(self) -> dict[str, Any]:
        """All fields, for `--json`."""
        return asdict(self)


@dataclass(frozen=True)
class Deployed:
    """What `replica.bind_app` told Serve about an application of ours."""

    identity: Identity
    store_uri: str
    settings: ServingSettings
    route_prefix: str

    @classmethod
    def of(cls, app: dict[str, Any]) -> Deployed | None:
        """From Serve's details of an application; None for an application of somebody else."""
        told = (app["deployments"].get(DEPLOYMENT) or {}).get("deployment_config", {}).get("user_config") or {}
        if told.keys() != {"identity", "store", "serving"}:
            return None
        settings = ServingSettings.model_validate(told["serving"])
        return cls(Identity(**told["identity"]), told["store"], settings, app["route_prefix"] or "/")


def check_deployable(endpoint: str, model_ref: str, store: Store, route_prefix: str = "/") -> ModelVersion:
    """What can be told before there is a Ray: sound names, and the version that the reference means.

    Raises UsageError, NotFoundError.
    """
    try:
        check_name(endpoint)
    except ValueError as error:
        raise UsageError(f"endpoint {shown(endpoint)}: {error}") from error
    if not _ROUTE_PREFIX.fullmatch(route_prefix):
        raise UsageError(f"route prefix {shown(route_prefix)}: expected / or a path of names such as /digits")
    return Registry(store).resolve(model_ref)


def deploy(
    endpoint: str,
    model_ref: str,
    store: Store | str,
    settings: ServingSettings | None = None,
    *,
    host: str | None = None,
    port: int | None = None,
    route_prefix: str = "/",
    timeout_s: float = DEPLOY_TIMEOUT_S,
) -> Endpoint:
    """Deploy a model version and wait until it answers; an endpoint of that name is replaced without a gap.

    The reference is resolved and every file verified first; then all replicas serve that exact version. Ray must be
    connected (`lepton_ray.cluster.connect`).

    Args:
        endpoint: name of the endpoint, also of the Serve application.
        model_ref: e.g. `digits`, `digits@champion`, `digits:3`.
        store: where the model is; replicas open it by its URI, with credentials from their own environment.
        settings: scaling, limits, batching.
        host: address to listen on; 127.0.0.1 unless Serve listens already.
        port: 0 for a free one; 8000 unless Serve listens already, as one Ray has one Serve with one port.
        route_prefix: path under which it answers, where several endpoints share the port.
        timeout_s: how long all of it may take.

    Raises UsageError (wrong name, port in use, damaged model), NotFoundError (no such model), ConflictError (another
    endpoint has the path), UnavailableError (not up in time, e.g. for want of CPUs), LeptonError with the replica's
    own message where the model cannot be served. A new endpoint that fails is removed again; an old one goes on with
    what it served before.
    """
    deadline = time.monotonic() + timeout_s
    store = open_store(store) if isinstance(store, str) else store
    settings = settings or ServingSettings()
    version = check_deployable(endpoint, model_ref, store, route_prefix)
    Registry(store).verify(version)
    previous = _previous(control.details(), endpoint, route_prefix)
    control.check_cpus(settings.cpus_per_replica)
    address = control.start(host, port, request_timeout_s=settings.request_timeout_s)
    identity = Identity(endpoint, version.model, version.number, version.digest)
    with _undone_on_failure(endpoint, previous):
        control.run(bind_app(identity, store.uri, settings), endpoint, route_prefix)
        _wait_running(endpoint, settings, deadline)
        url = address.url(route_prefix)
        _wait_answers(url, version, deadline)
    return Endpoint(name=endpoint, url=url, model=version.model, version=version.number, digest=version.digest)


def status(endpoint: str) -> Status:
    """How an endpoint does. Raises NotFoundError where there is none of that name."""
    found = {each.name: each for each in endpoints()}
    if endpoint not in found:
        names = ", ".join(sorted(found)) or "none"
        raise NotFoundError(f"endpoint {shown(endpoint)}: not deployed on this Ray; deployed: {names}")
    return found[endpoint]


def endpoints() -> list[Status]:
    """All endpoints of this Ray, by name. Other applications of the same Serve are left out."""
    details = control.details()
    if details is None:
        return []
    found = (_status(app, details) for app in details["applications"].values())
    return sorted((each for each in found if each is not None), key=lambda each: each.name)


def delete(endpoint: str) -> None:
    """Take an endpoint down: requests in work are finished, then its replicas end.

    Raises NotFoundError where there is none of that name, UnavailableError where it is not gone within a minute.
    """
    status(endpoint)
    control.delete(endpoint)


def _previous(details: dict[str, Any] | None, endpoint: str, route_prefix: str) -> Deployed | None:
    """What the endpoint serves now, None where it is new. Raises ConflictError where its name or path is taken."""
    apps = (details or {}).get("applications", {})
    for name, app in apps.items():
        if app["route_prefix"] == route_prefix and name != endpoint:
            raise ConflictError(
                f"route prefix {route_prefix}: application {shown(name)} answers there; give another one, e.g. "
                f"/{endpoint}, or delete that one"
            )
    if endpoint not in apps:
        return None
    found = Deployed.of(apps[endpoint])
    if found is None:
        raise ConflictError(f"endpoint {endpoint}: an application of that name is not one of ours; give another name")
    return found


@contextlib.contextmanager
def _undone_on_failure(endpoint: str, previous: Deployed | None) -> Iterator[None]:
    """When the block fails, also by Ctrl-C: delete a new endpoint, give an old one back what it served.

    Serve itself goes on with the old replicas then, but would start none of them again.
    """
    try:
        yield
    except BaseException:
        with contextlib.suppress(LeptonError):
            if previous is None:
                control.delete(endpoint)
            else:
                app = bind_app(previous.identity, previous.store_uri, previous.settings)
                control.run(app, endpoint, previous.route_prefix)
        raise


def _wait_running(endpoint: str, settings: ServingSettings, deadline: float) -> None:
    while True:
        app = (control.details() or {"applications": {}})["applications"].get(endpoint)
        state = str(app["status"].value) if app else "gone"
        if state == "RUNNING":
            return
        if state in ("DEPLOY_FAILED", "gone"):
            raise _failure(endpoint, app)
        if time.monotonic() > deadline:
            raise UnavailableError(
                f"endpoint {endpoint}: still {state}; {_reason(app)}each replica needs {settings.cpus_per_replica:g} "
                "CPU: free some, lower serving.cpus_per_replica or try again"
            )
        time.sleep(POLL_S)


def _wait_answers(url: str, version: ModelVersion, deadline: float) -> None:
    """Until `/ready` answers 200 from the wanted version: the proxy may know the old route a moment longer."""
    seen = "nothing"
    with httpx.Client(timeout=5.0, trust_env=False) as client:
        while time.monotonic() < deadline:
            try:
                answer = client.get(f"{url}/ready")
                seen = f"{answer.status_code} of {answer.headers.get(MODEL_HEADER)}"
                if answer.status_code == 200 and answer.headers.get(MODEL_HEADER) == version.ref:
                    return
            except httpx.TransportError as error:
                seen = type(error).__name__
            time.sleep(POLL_S)
    raise UnavailableError(f"{url}/ready: {seen}, expected 200 of {version.ref}; look at the replica's log")


def _failure(endpoint: str, app: dict[str, Any] | None) -> LeptonError:
    """What the replica said: its own error where it was one of ours, else the last line of its traceback."""
    message = "".join(each["message"] + "\n" for each in app["deployments"].values()) if app else "deleted meanwhile"
    ours = _OUR_ERROR.findall(message)
    if ours:
        kind = getattr(errors, ours[-1][0], LeptonError)
        return kind(f"endpoint {endpoint} not deployed: {escaped(ours[-1][1], 400)}")
    lines = [line for line in message.splitlines() if line.strip()]
    return LeptonError(f"endpoint {endpoint} not deployed: {escaped(lines[-1] if lines else 'no reason given', 400)}")


def _reason(app: dict[str, Any] | None) -> str:
    messages = [each["message"] for each in app["deployments"].values() if each["message"]] if app else []
    return f"Serve says {escaped(messages[0], 200)}; " if messages else ""


def _status(app: dict[str, Any], details: dict[str, Any]) -> Status | None:
    deployed = Deployed.of(app)
    if deployed is None:
        return None
    deployment = app["deployments"][DEPLOYMENT]
    replicas: dict[str, int] = {}
    for replica in deployment["replicas"]:
        state = str(replica["state"].value)
        replicas[state] = replicas.get(state, 0) + 1
    return Status(
        name=app["name"],
        state=str(app["status"].value),
        message=escaped(app["message"] or deployment["message"], 400),
        url=control.address(details).url(deployed.route_prefix),
        model=deployed.identity.model,
        version=deployed.identity.version,
        digest=deployed.identity.digest,
        replicas=replicas,
        target_replicas=deployment["target_num_replicas"],
    )
