"""The conversation with Ray Serve: start it, run and delete an application, read its state."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lepton_ray.errors import LeptonError, UnavailableError, UsageError, escaped
from lepton_ray.serving.ports import check_port, free_port

if TYPE_CHECKING:
    from ray import serve

DEFAULT_HOST = "127.0.0.1"
DEFAULT_PORT = 8000
PROXY_GRACE_S = 5.0
"""Serve's own time limit lies this much above the endpoint's, which answers better: a problem document."""
ANY = {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}  # noqa: S104 - compared with, not listened on


@dataclass(frozen=True)
class Address:
    """Where Serve listens."""

    host: str
    port: int

    def url(self, route_prefix: str = "/") -> str:
        """Base URL under a route prefix, without a slash at its end; as seen from the head node."""
        host = ANY.get(self.host, self.host)
        name = f"[{host}]" if ":" in host else host
        return f"http://{name}:{self.port}{route_prefix.rstrip('/')}"


def details() -> dict[str, Any] | None:
    """Everything Serve says of itself (the body of its `GET /api/serve/applications/`); None where it does not run.

    Raises UsageError where this process is not connected to Ray, UnavailableError where Serve does not answer.
    """
    import ray
    from ray.exceptions import RayError
    from ray.serve.context import _get_global_client

    if not ray.is_initialized():
        raise UsageError("not connected to Ray: call this inside `with lepton_ray.cluster.connect():`")
    # Serve's own messages of starting, connecting and deploying say nothing that ours do not
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    try:
        client = _get_global_client(raise_if_no_controller_running=False)
        found: dict[str, Any] | None = client.get_serve_details() if client is not None else None
    except RayError as error:
        raise UnavailableError(f"Ray Serve does not answer ({escaped(str(error))}); try again") from error
    return found


def address(found: dict[str, Any]) -> Address:
    """Where the Serve of these details listens."""
    options = found["http_options"]
    return Address(options["host"], options["port"])


def start(host: str | None, port: int | None, *, request_timeout_s: float) -> Address:
    """Start Serve where it does not run yet; returns where it listens.

    Raises UsageError before anything is started where the port is in use, or where Serve listens elsewhere already.
    """
    running = details()
    if running is not None:
        here = address(running)
        if (port or here.port) != here.port or (host or here.host) != here.host:
            raise UsageError(
                f"{host or here.host}:{port or here.port}: the Serve of this Ray listens on {here.host}:{here.port} "
                "for all its endpoints; leave host and port out, or use another Ray"
            )
        return here
    host = host or os.environ.get("RAY_SERVE_DEFAULT_HTTP_HOST") or DEFAULT_HOST
    port = DEFAULT_PORT if port is None else port
    if _on_head():
        check_port(host, port)
    here = Address(host, port or free_port(host))
    _start_serve(here, request_timeout_s)
    return here


def run(app: serve.Application, name: str, route_prefix: str) -> None:
    """Hand an application to Serve without waiting for it."""
    from ray.exceptions import RayError
    from ray.serve.api import RunTarget, run_many

    try:
        run_many([RunTarget(app, name=name, route_prefix=route_prefix)], wait_for_applications_running=False)
    except (RayError, RuntimeError, TimeoutError, ValueError) as error:
        raise LeptonError(f"endpoint {name}: Serve refused it: {escaped(_last_line(error))}") from error


def delete(name: str) -> None:
    """Delete an application and wait until it is gone. Raises UnavailableError where that takes over a minute."""
    from ray import serve
    from ray.exceptions import RayError

    try:
        serve.delete(name)
    except (RayError, TimeoutError) as error:
        raise UnavailableError(f"endpoint {name}: not gone yet ({escaped(_last_line(error))}); ask again") from error


def check_cpus(cpus: float) -> None:
    """Raise UsageError where a local Ray could never hold one replica; a cluster may grow, so it is not asked."""
    import ray

    nodes = [node for node in ray.nodes() if node["Alive"]]
    largest = max((node["Resources"].get("CPU", 0.0) for node in nodes), default=0.0)
    if cpus > largest and not os.environ.get("RAY_ADDRESS"):
        raise UsageError(f"serving.cpus_per_replica is {cpus:g}: this Ray has {largest:g} CPU; lower it")


def _on_head() -> bool:
    """Whether this process is on the head node, so that its ports are those of the proxy."""
    import ray

    here = ray.get_runtime_context().get_node_id()
    return any(node["NodeID"] == here and "node:__internal_head__" in node["Resources"] for node in ray.nodes())


def _start_serve(here: Address, request_timeout_s: float) -> None:
    from ray import serve
    from ray.exceptions import RayError
    from ray.serve.config import HTTPOptions

    try:
        serve.start(
            http_options=HTTPOptions(
                host=here.host, port=here.port, request_timeout_s=request_timeout_s + PROXY_GRACE_S
            )
        )
    except (RayError, RuntimeError, TimeoutError) as error:
        # the port was taken between our look and Serve's, or by another program on the head node
        serve.shutdown()
        raise UsageError(
            f"{here.host}:{here.port}: Serve could not listen there ({escaped(_last_line(error))}); give another port"
        ) from error


def _last_line(error: Exception) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
