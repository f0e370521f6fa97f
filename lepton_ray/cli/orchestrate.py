"""`lepton-ray orchestrate`: the service that starts runs again that lost their driver."""

from __future__ import annotations

import signal
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from lepton_ray.cli.output import emit, emit_line, json_option, store_option


@click.command()
@store_option
@click.option(
    "--address",
    metavar="URL",
    help="Dashboard of the Ray cluster that runs are submitted to as jobs. [default: processes of this machine]",
)
@click.option(
    "--working-dir",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    help="With --address: a folder to send with each job, where the cluster's image lacks lepton-ray.",
)
@click.option(
    "--every",
    type=click.FloatRange(min=0.1, max=3600.0),
    default=3.0,
    show_default=True,
    metavar="SECONDS",
    help="Time between two looks at the store.",
)
@click.option("--once", is_flag=True, help="End when each run was looked at for long enough to tell, within a minute.")
@json_option
def orchestrate(
    store_uri: str | None, address: str | None, working_dir: Path | None, every: float, once: bool, as_json: bool
) -> None:
    """Start runs again that lost their driver, until SIGTERM or Ctrl-C.

    A run goes on when its driver, its Ray head or its whole cluster was taken away. One that finished, failed, or was
    ended by Ctrl-C or `ray job stop` is left alone. Of any number of these services one acts. What they start goes on
    when they end.
    """
    from lepton_ray.errors import UnavailableError
    from lepton_ray.orchestrator.submission import LocalProcesses, RayJobs
    from lepton_ray.orchestrator.watch import Watch
    from lepton_ray.storage import open_store

    if working_dir is not None and address is None:
        raise click.UsageError("--working-dir is sent with jobs: give --address too")
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    store = open_store(store_uri)
    submission = RayJobs(address, store.uri, working_dir) if address else LocalProcesses(store.uri)
    told: list[Mapping[str, Any]] = []
    words = sys.stdout.isatty() and not as_json

    def say(event: Mapping[str, Any]) -> None:
        if once:
            told.append(event)
        if words:
            click.echo(_sentence(event))
        elif not (once and as_json):  # then there is one document at the end
            emit_line({**event, "at": time.time()})

    watch = Watch(store, submission, say)
    if once:
        settled = watch.run_once(stop, every)
        emit({"store": store.uri, "events": told}, as_json, lambda _: None)
        failed = [str(event["error"]) for event in told if "error" in event]
        if failed and not settled:
            raise UnavailableError(failed[-1])
        return
    say({"event": "watching", "store": store.uri, "address": address, "every_s": every})
    watch.run(stop, every)
    say({"event": "ended", "store": store.uri})


def _sentence(event: Mapping[str, Any]) -> str:
    """An event for people."""
    about = f"run {event['run']}" if "run" in event else str(event.get("store"))
    facts = [f"{name} {event[name]}" for name in ("attempt", "step", "why", "error") if event.get(name) is not None]
    return f"{about}: {str(event['event']).replace('_', ' ')}" + (f" ({', '.join(facts)})" if facts else "")
