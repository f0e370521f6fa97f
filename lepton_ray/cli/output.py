"""How results and progress leave a command: one JSON document on stdout with `--json`, words for people otherwise."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import click
from rich.console import Console
from rich.table import Table

json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON document on stdout.")
store_option = click.option(
    "--store", "store_uri", envvar="LEPTON_STORE", metavar="URI", help="file:// or s3:// URI. [default: ./lepton-store]"
)
CELL = 80
"""Characters of a value printed for people at most."""


_document: int | None = None
"""Where the JSON document goes, once `reserve_stdout` has put it aside."""


def reserve_stdout() -> None:
    """Keep stdout for the one JSON document: what Ray and other libraries print from now on goes to stderr."""
    global _document  # noqa: PLW0603 - stdout belongs to the process, and so does this
    sys.stdout.flush()
    _document = os.dup(1)
    os.dup2(2, 1)


def console(as_json: bool = False) -> Console:
    """The console for people: stdout, or stderr when stdout carries the JSON document."""
    return Console(file=sys.stderr if as_json else sys.stdout, highlight=False, soft_wrap=True)


def emit(result: Mapping[str, Any], as_json: bool, words: Callable[[Console], None]) -> None:
    """Print `result` as the one JSON document, or call `words` with a console."""
    if as_json:
        text = json.dumps(result, indent=2, sort_keys=False, default=str)
        if _document is None:
            click.echo(text)
        else:
            with os.fdopen(os.dup(_document), "w", encoding="utf-8") as stdout:
                stdout.write(text + "\n")
    else:
        words(console())


def emit_line(event: Mapping[str, Any]) -> None:
    """Print an event of a long-running command as one JSON line, where the JSON document would go."""
    text = json.dumps(event, default=str) + "\n"
    if _document is None:
        sys.stdout.write(text)
        sys.stdout.flush()
    else:
        os.write(_document, text.encode())


def table(title: str | None, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> Table:
    """A plain table for people; numbers right-aligned."""
    made = Table(title=title, title_justify="left", box=None, pad_edge=False, header_style="bold")
    for index, column in enumerate(columns):
        numeric = bool(rows) and all(isinstance(row[index], int | float) for row in rows)
        made.add_column(column, justify="right" if numeric else "left")
    for row in rows:
        made.add_row(*(f"{cell:.4g}" if isinstance(cell, float) else str(cell) for cell in row))
    return made


def printable(text: str, limit: int = CELL) -> str:
    """Text of others for a terminal: without control characters, cut."""
    safe = "".join(letter if letter.isprintable() else "?" for letter in text[: limit + 1])
    return safe if len(safe) <= limit else safe[: limit - 3] + "..."
