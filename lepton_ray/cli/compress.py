"""`lepton-ray compress`: a smaller version of a model, compared with the original, published or refused."""

from __future__ import annotations

import json
import sys
import time
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console

from lepton_ray.cli.output import console as console_for
from lepton_ray.cli.output import emit, json_option, store_option, table

if TYPE_CHECKING:
    from lepton_ray.compression import Compressed
    from lepton_ray.compression.distillation import Learnt

STEPS = """\b
STEP, in the order given:
  prune:magnitude:SHARE      the smallest weights of all layers become zero
  prune:structured:SHARE     whole channels go; the model becomes narrower where its task can
  quantise:int8-weight       linear layers keep int8 weights (extra compress)
  quantise:int8-dynamic      linear layers compute in int8
  cast:bf16 or cast:fp16     other weights are stored in 16 bits
  distil:KEY=VALUE,...       learn from the original: epochs, learning_rate, temperature, soft, batch;
                             options.KEY=VALUE makes a smaller model of the task
"""


@click.command(epilog=STEPS)
@click.argument("ref")
@click.option("--step", "steps", multiple=True, metavar="STEP", help="What to do; may be given several times.")
@click.option("--config", metavar="FILE", help="YAML file with the same settings: steps, max_drop, table and others.")
@click.option("--table", metavar="TABLE[@V]", help="Rows to compare on. [default: those the model was trained on]")
@click.option("--max-drop", type=float, metavar="POINTS", help="Allowed loss of the deciding metric. [default: 1.0]")
@click.option("--name", metavar="MODEL", help="Publish under this name. [default: a new version of the same model]")
@click.option("--seed", type=int, help="Of distillation. [default: 0]")
@click.option("--threads", type=int, help="CPU threads while speed is measured. [default: 1]")
@store_option
@json_option
def compress(
    ref: str, steps: tuple[str, ...], config: str | None, store_uri: str | None, as_json: bool, **given: Any
) -> None:
    """Make a smaller version of the model REF (MODEL, MODEL@ALIAS or MODEL:3) and publish it beside it.

    Nothing is published, and the exit code is 4, where the deciding metric gets worse by more than allowed.
    """
    from lepton_ray.settings.compression import load_compression

    settings = load_compression(config, list(steps), **given)
    started = time.monotonic()

    from lepton_ray import compression
    from lepton_ray.storage import open_store

    store = open_store(store_uri)
    store.check_writable()
    made = compression.compress(store, ref, settings, watch=_show_epoch)
    if made.refused:
        _words(console_for(as_json=True), made)  # the figures that refused it, beside the one-line error
    version = made.publish(store)
    result = {
        "ref": made.parent.ref,
        "model_version": version.ref,
        "model_digest": version.digest,
        "steps": list(made.steps),
        "notes": list(made.notes),
        "table": made.rows.table,
        "split": made.rows.split,
        "comparison": made.comparison.to_dict(),
        "metrics": version.card["metrics"],
        "store": store.uri,
        "seconds": round(time.monotonic() - started, 3),
    }

    def words(console: Console) -> None:
        _words(console, made)
        console.print(f"model version {version.ref} (sha256 {version.digest[:12]}), parent {made.parent.ref}")

    emit(result, as_json, words)


def _words(console: Console, made: Compressed) -> None:
    """The comparison, and what is to be known of it."""
    title = f"{made.parent.ref}: {'; '.join(made.steps)}"
    console.print(table(title, ["figure", "original", "compressed", "change"], made.comparison.table()))
    figures = made.comparison
    console.print(
        f"held-out rows of {made.rows.table}, split as {made.rows.split}; {figures.calls} timed pairs, "
        f"{figures.threads} thread{'s' if figures.threads > 1 else ''}"
    )
    for note in made.notes:
        console.print(f"note: {note}")


def _show_epoch(learnt: Learnt) -> None:
    """One line of progress on stderr: words on a terminal, JSON elsewhere."""
    if sys.stderr.isatty():
        click.echo(f"distil: epoch {learnt.epoch} of {learnt.epochs}, loss {learnt.loss:.4f}", err=True)
    else:
        click.echo(json.dumps({"event": "distil", **learnt.__dict__}), err=True)
