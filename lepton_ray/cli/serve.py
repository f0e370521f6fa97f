"""`lepton-ray serve`: deploy a model version as an autoscaled endpoint, ask after it, take it down."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console

from lepton_ray.cli.output import console, emit, json_option, store_option, table

if TYPE_CHECKING:
    from lepton_ray.serving import Endpoint, Status
    from lepton_ray.settings import ServingSettings

POLL_S = 5.0
"""Seconds between two looks at whether the endpoint in the foreground is still there."""

address_option = click.option(
    "--address", envvar="RAY_ADDRESS", metavar="ADDRESS", help="Ray cluster to connect to, e.g. auto or 10.0.0.1:6379."
)


@click.group(no_args_is_help=True)
def serve() -> None:
    """Deploy model versions as autoscaled endpoints, show them, take them down."""


@serve.command("deploy", short_help="Serve a model version; an endpoint of that name is replaced without a gap.")
@click.argument("endpoint")
@click.option("--model", "model_ref", required=True, metavar="REF", help="MODEL, MODEL@ALIAS or MODEL:3.")
@click.option("--host", metavar="ADDRESS", help="Address to listen on. [default: 127.0.0.1]")
@click.option("--port", type=click.IntRange(0, 65535), help="Port to listen on; 0 takes a free one. [default: 8000]")
@click.option("--route-prefix", default="/", show_default=True, help="Path of the endpoint, where several share a Ray.")
@click.option(
    "-s", "--set", "overrides", multiple=True, metavar="KEY=VALUE", help="A serving setting, e.g. -s max_replicas=4."
)
@address_option
@store_option
@json_option
def deploy_command(
    endpoint: str,
    model_ref: str,
    host: str | None,
    port: int | None,
    route_prefix: str,
    overrides: tuple[str, ...],
    address: str | None,
    store_uri: str | None,
    as_json: bool,
) -> None:
    """Serve a model version as ENDPOINT and wait until it answers.

    On a cluster (--address or RAY_ADDRESS) the endpoint stays when this command ends. Without one a local Ray is
    started, and the command stays in the foreground: Ctrl-C takes both down.
    """
    settings = _serving_settings(overrides)
    from lepton_ray.serving import check_deployable, deploy
    from lepton_ray.serving.ports import check_port
    from lepton_ray.storage import open_store

    store = open_store(store_uri)
    check_deployable(endpoint, model_ref, store, route_prefix)  # before Ray takes seconds to start
    if not address and port:
        check_port(host or "127.0.0.1", port)
    with _connected(address) as local:
        made = deploy(endpoint, model_ref, store, settings, host=host, port=port, route_prefix=route_prefix)
        emit({**made.to_dict(), "local": local}, as_json, lambda shown: _say_deployed(shown, made))
        if local:
            console(as_json).print("this Ray ends with this command: Ctrl-C takes the endpoint down", markup=False)
            _stay(endpoint)


@serve.command("status", short_help="How endpoints do.")
@click.argument("endpoint", required=False)
@address_option
@json_option
def status_command(endpoint: str | None, address: str | None, as_json: bool) -> None:
    """Show all endpoints of a cluster, or ENDPOINT alone."""
    from lepton_ray.serving import endpoints, status

    with _connected(address or "auto"):
        found = [status(endpoint)] if endpoint else endpoints()

    def words(shown: Console) -> None:
        if found:
            shown.print(table(None, ("endpoint", "state", "model", "replicas", "url"), [_row(each) for each in found]))
        else:
            shown.print("no endpoint on this Ray; deploy one with lepton-ray serve deploy", markup=False)
        for each in found:
            if each.message:
                shown.print(f"{each.name}: {each.message}", markup=False)

    result: dict[str, Any] = {"endpoints": [each.to_dict() for each in found]}
    emit(result["endpoints"][0] if endpoint else result, as_json, words)


@serve.command("delete", short_help="Take an endpoint down.")
@click.argument("endpoint")
@address_option
@json_option
def delete_command(endpoint: str, address: str | None, as_json: bool) -> None:
    """Take ENDPOINT down: requests in work are finished, then its replicas end."""
    from lepton_ray.serving import delete

    with _connected(address or "auto"):
        delete(endpoint)
    emit({"deleted": endpoint}, as_json, lambda shown: shown.print(f"{endpoint} deleted", markup=False))


def _serving_settings(overrides: tuple[str, ...]) -> ServingSettings:
    from lepton_ray.errors import UsageError
    from lepton_ray.settings import load_settings

    for override in overrides:
        if "." in override.partition("=")[0]:
            raise UsageError(f"-s {override[:80]!a}: expected a serving setting as key=value, e.g. max_replicas=4")
    return load_settings(None, [f"serving.{override}" for override in overrides]).serving


@contextlib.contextmanager
def _connected(address: str | None) -> Iterator[bool]:
    """Ray for the length of the block; whether it is a local one that ends with it."""
    if address:
        os.environ["RAY_ADDRESS"] = address  # what `connect` and Ray itself go by
    from lepton_ray.cluster import connect

    with connect() as cluster:
        yield cluster.local


def _stay(endpoint: str) -> None:
    """Until Ctrl-C or SIGTERM, as long as the endpoint is there."""
    from lepton_ray.serving import status

    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    while not stop.wait(POLL_S):
        status(endpoint)


def _say_deployed(shown: Console, made: Endpoint) -> None:
    shown.print(f"{made.name} serves {made.ref} (digest {made.digest[:12]}) at {made.url}", markup=False)
    shown.print(f"try: curl {made.url}/metadata", markup=False)


def _row(found: Status) -> tuple[str, str, str, str, str]:
    replicas = ", ".join(f"{count} {state.lower()}" for state, count in sorted(found.replicas.items())) or "none"
    return (found.name, found.state, f"{found.model}:{found.version}", replicas, found.url)
