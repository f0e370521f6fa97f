"""`lepton-ray data split`: what a split of a table would be, and what its sides share."""

from __future__ import annotations

from typing import Any

import click
from rich.console import Console
from rich.markup import escape

from lepton_ray.cli.output import emit, json_option, printable, store_option, table

MOST_LABELS = 20
"""Labels that are shown by side."""
KINDS = {"same_key": "the same key", "same_content": "the same content", "near": "nearly the same text"}


@click.command()
@click.argument("table_name", metavar="TABLE[@VERSION]")
@click.option("--by", type=click.Choice(["hash", "stratified", "group", "time", "column"]), default="hash",
              show_default=True, help="As data.split.by.")  # fmt: skip
@click.option("--held-out", type=float, default=0.2, show_default=True, help="Share to evaluate on while training.")
@click.option("--test", type=float, default=0.0, show_default=True, help="Share that training does not look at.")
@click.option("--column", default="split", show_default=True, help="For group, time and column: which one.")
@click.option("--seed", type=int, default=0, show_default=True, help="Another seed gives another split.")
@click.option("--label", default="label", show_default=True, help="The column whose values are counted by side.")
@click.option("--near", "near_column", metavar="COLUMN", help="Also look for nearly equal texts of this column.")
@click.option("--threshold", type=click.FloatRange(0.5, 1.0), default=0.8, show_default=True,
              help="Share of common pieces from which two texts are near.")  # fmt: skip
@store_option
@json_option
def split(
    table_name: str, by: str, held_out: float, test: float, column: str, seed: int, label: str, near_column: str | None,
    threshold: float, store_uri: str | None, as_json: bool,
) -> None:  # fmt: skip
    """Print how the settings data.split would divide TABLE, and what the sides share. Nothing is written.

    A held-out row that also stands on the training side, word for word or nearly, makes figures look better than they
    are.

    \b
    lepton-ray data split reviews --by group --column film --near text
    lepton-ray data split sales --by time --column day --held-out 0.1 --test 0.1
    """  # noqa: D301 - click wants the character, not a backslash and a b
    from lepton_ray.data.leaks import find_leaks
    from lepton_ray.data.split import split_rows
    from lepton_ray.data.tables import open_table
    from lepton_ray.settings import parse_settings
    from lepton_ray.storage import open_store

    told = {"by": by, "held_out": held_out, "test": test, "column": column, "seed": seed}
    settings = parse_settings({"data": {"split": told}}).data.split
    opened = open_table(open_store(store_uri), table_name)
    rows = opened.read()
    made = split_rows(rows, settings, label=label)
    ignore = (column,) if by in ("group", "time", "column") else ()
    leaks = find_leaks(rows, made, ignore=ignore, near_column=near_column, threshold=threshold)
    sides: dict[str, dict[str, Any]] = {}
    for name, positions in made.sides().items():
        side: dict[str, Any] = {"rows": len(positions), "share": round(len(positions) / rows.num_rows, 4)}
        if label in rows.column_names:
            counts = rows[label].take(positions).value_counts()
            pairs = zip(counts.field("values").to_pylist(), counts.field("counts").to_pylist(), strict=True)
            side["labels"] = {
                str(value): count for value, count in sorted(pairs, key=lambda pair: (-pair[1], str(pair[0])))
            }
        sides[name] = side
    result = {"table": opened.ref, "split": settings.model_dump(mode="json"), "sides": sides, "leaks": leaks.to_dict()}
    emit(result, as_json, lambda console: _words(console, result, label))


def _words(console: Console, result: dict[str, Any], label: str) -> None:
    sides = result["sides"]
    names = list(dict.fromkeys(value for side in sides.values() for value in side.get("labels", {})))
    shown = names if len(names) <= MOST_LABELS else []
    rows = [
        [name, f"{side['rows']:,}", f"{side['share']:.2%}", *(f"{side['labels'].get(value, 0):,}" for value in shown)]
        for name, side in sides.items()
    ]
    heads = ["side", "rows", "share", *(f"{label} {printable(value, 20)}" for value in shown)]
    console.print(table(f"{result['table']} by {result['split']['by']}", [escape(head) for head in heads], rows))
    leaks = result["leaks"]
    for kind, words in KINDS.items():
        if leaks[kind] is None:
            continue
        line = f"{leaks[kind]:,} rows that are not learnt from have {words} as one that is"
        pairs = leaks["examples"].get(kind, [])
        console.print(escape(line + "".join(f"\n  {printable(one)} and {printable(other)}" for one, other in pairs)))
