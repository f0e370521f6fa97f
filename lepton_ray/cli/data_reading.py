"""The options that say how a source of rows is read, for the commands that take one."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from lepton_ray.settings.reading import ReadingSettings

Command = TypeVar("Command", bound=Callable[..., Any])

_OPTIONS = (
    click.option("--format", "format_", metavar="FORMAT", help="What SOURCE is, where its name and shape do not tell."),
    click.option("--delimiter", metavar="CHARACTER", help="Between the values of a CSV row.  [default: ',']"),
    click.option(
        "--type", "types", multiple=True, metavar="COLUMN=TYPE",
        help="Type of a CSV or JSON column: int, float, text, bool, date or timestamp. May be repeated.",
    ),
    click.option("--limit", "limits", multiple=True, metavar="NAME=VALUE", help="Another limit. May be repeated."),
)  # fmt: skip


def reading_options(command: Command) -> Command:
    """`--format`, `--delimiter`, `--type` and `--limit`, for `reading_of`."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


def reading_of(
    format_: str | None, delimiter: str | None, types: tuple[str, ...], limits: tuple[str, ...]
) -> ReadingSettings:
    """The settings that the options say. Raises UsageError for what they cannot be."""
    from lepton_ray.settings.loading import parse_part
    from lepton_ray.settings.reading import ReadingSettings

    wanted: dict[str, Any] = {"format": format_, "delimiter": delimiter, "types": _pairs("--type", types)}
    wanted["limits"] = {name: _number(value) for name, value in _pairs("--limit", limits).items()}
    return parse_part(ReadingSettings, wanted, "ingest")


def _pairs(option: str, texts: tuple[str, ...]) -> dict[str, str]:
    """`NAME=VALUE` as given, the name up to the last `=`."""
    pairs = {}
    for text in texts:
        name, equals, value = text.rpartition("=")
        if not (equals and name and value):
            raise click.UsageError(f"{option} {text!a}: expected NAME=VALUE")
        pairs[name] = value
    return pairs


def _number(text: str) -> int | float | str:
    """A limit as a number; what is none is left for the settings to refuse."""
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            return kind(text)
    return text
