"""How people name a model version: `digits`, `digits@champion` or `digits:3`."""

from __future__ import annotations

import re
from dataclasses import dataclass

from lepton_ray.errors import UsageError, shown
from lepton_ray.settings.tree import check_name

MAX_NUMBER = 999_999_999
"""Version numbers count from 1 to this."""


@dataclass(frozen=True)
class Ref:
    """A parsed reference; at most one of `alias` and `number` is given."""

    model: str
    alias: str | None = None
    number: int | None = None


def checked_name(what: str, name: str) -> str:
    """The name of a model or alias itself where it is valid. Raises UsageError saying `what` it should name."""
    try:
        return check_name(name)
    except ValueError as error:
        raise UsageError(f"{what} {shown(name)}: {error}") from error


def checked_number(model: str, number: int) -> int:
    """The version number itself where it is valid. Raises UsageError."""
    if isinstance(number, bool) or not 1 <= number <= MAX_NUMBER:
        raise UsageError(f"version {shown(number)} of model {shown(model)}: expected a number from 1 to {MAX_NUMBER}")
    return number


def parse_ref(text: str) -> Ref:
    """The reference in a text. Raises UsageError saying which part is wrong and what is expected."""
    model, mark, rest = text, "", ""
    separator = re.search(r"[:@]", text)
    if separator:
        model, mark, rest = text[: separator.start()], separator.group(), text[separator.end() :]
    try:
        checked_name("model", model)
        if mark == "@":
            return Ref(model, alias=checked_name("alias", rest))
    except UsageError as error:
        raise UsageError(f"model reference {shown(text)}: {error}; expected MODEL, MODEL@ALIAS or MODEL:3") from error
    if not mark:
        return Ref(model)
    if not re.fullmatch(r"[1-9][0-9]{0,8}", rest, re.ASCII):
        hint = f"; {model} alone means its champion, else its newest version" if rest in ("latest", "newest") else ""
        raise UsageError(
            f"model reference {shown(text)}: {shown(rest)} is no version number; expected 1 to {MAX_NUMBER}{hint}"
        )
    return Ref(model, number=int(rest))
