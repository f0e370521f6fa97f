"""`lepton-ray exporter`: the metrics of all runs and endpoints for Prometheus."""

from __future__ import annotations

import signal
import threading
from pathlib import Path

import click

from lepton_ray.cli.output import emit, json_option, store_option


@click.command()
@store_option
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--port", default=9464, show_default=True, help="Port to listen on; 0 takes a free one.")
@click.option(
    "--token-file",
    type=click.Path(path_type=Path),
    help="Ask scrapes for this file's content as a bearer token.",
)
@click.option(
    "--retain",
    type=click.FloatRange(min=1.0),
    default=3600.0,
    show_default=True,
    metavar="SECONDS",
    help="How long a run or endpoint is shown after its last sign of life.",
)
@json_option
def exporter(
    store_uri: str | None, host: str, port: int, token_file: Path | None, retain: float, as_json: bool
) -> None:
    """Serve the metrics of all runs and endpoints of a store until SIGTERM or Ctrl-C.

    /metrics for Prometheus (text or OpenMetrics), /healthz, /readyz. The store is only read.
    """
    from lepton_ray.monitoring.http_server import ExporterServer
    from lepton_ray.storage import open_store

    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    store = open_store(store_uri)
    server = ExporterServer(store, host, port, retain_s=retain, token_file=token_file).start()
    try:
        emit(
            {"url": f"{server.url}/metrics", "store": store.uri},
            as_json,
            lambda console: console.print(f"{server.url}/metrics serves {store.uri}", markup=False),
        )
        stop.wait()
    finally:
        server.close()
