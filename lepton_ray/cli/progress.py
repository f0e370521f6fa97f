"""What commands about tables show on a terminal while they work; nothing elsewhere."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.markup import escape

from lepton_ray.cli.output import printable


@contextlib.contextmanager
def reading(source: str) -> Iterator[Callable[[int, float | None], None]]:
    """A bar, or rows alone where nobody knows how many there are; told the rows read and the share that they are."""
    errors = _errors()
    if not errors.is_terminal:
        yield lambda *_: None
        return
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("{task.fields[rows]:,} rows"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=errors, transient=True) as bar:
        task = bar.add_task(f"reading {printable(source)}", total=None, rows=0)

        def update(rows: int, share: float | None) -> None:
            bar.update(task, rows=rows, total=None if share is None else 1.0, completed=share or 0.0)

        yield update


@contextlib.contextmanager
def data_files(what: str) -> Iterator[Callable[[int, int], None]]:
    """A bar of data files; told how many are done and how many there are."""
    errors = _errors()
    if not errors.is_terminal:
        yield lambda *_: None
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("data files"),
    )
    with Progress(*columns, console=errors, transient=True) as bar:
        task = bar.add_task(printable(what), total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


@contextlib.contextmanager
def doing(name: str) -> Iterator[Callable[[str], None]]:
    """A line that says what is being done with a table."""
    errors = _errors()
    if not errors.is_terminal:
        yield lambda _: None
        return
    with errors.status(escape(printable(name))) as status:
        yield lambda what: status.update(f"{escape(printable(name))}: {escape(what)}")


def _errors() -> Console:
    return Console(file=sys.stderr, highlight=False)
