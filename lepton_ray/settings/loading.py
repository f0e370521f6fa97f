"""Strict loading: YAML without surprises, overrides by key path, every error of a config told in one go."""

from __future__ import annotations

import difflib
import re
import stat
from collections.abc import Hashable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ValidationError

from lepton_ray.errors import UsageError, escaped, shown
from lepton_ray.settings.tree import Settings

PartT = TypeVar("PartT", bound=BaseModel)
MAX_CONFIG_BYTES = 1_048_576
"""A config larger than this is not a config."""


class StrictLoader(yaml.SafeLoader):
    """YAML 1.2 core scalars only, no duplicate keys, no aliases, no tags that make objects."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        """As usual, but aliases are refused: a few lines of them expand to gigabytes."""
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()  # type: ignore[no-untyped-call] # types-pyyaml leaves it out
            raise yaml.constructor.ConstructorError(None, None, "aliases are not accepted", event.start_mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        """As usual, but a key that stands twice is an error (PyYAML keeps the last one silently)."""
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                raise yaml.constructor.ConstructorError(
                    None, None, f"key {shown(key)} is not text; quote it", key_node.start_mark
                )
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"key {shown(key)} stands twice", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


# YAML 1.1 guesses (no -> false, 012 -> 10, 1:30 -> 90, dates) are dropped: only what YAML 1.2's core schema knows.
StrictLoader.yaml_implicit_resolvers = {}
_SCALARS = [
    ("bool", r"true|false", "tf"),
    ("null", r"null|~|", ["n", "~", ""]),
    ("int", r"[-+]?(?:0|[1-9][0-9]*)", "-+0123456789"),
    ("float", r"[-+]?(?:\.[0-9]+|(?:0|[1-9][0-9]*)(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?", "-+.0123456789"),
]
for _tag, _pattern, _first in _SCALARS:
    StrictLoader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"^(?:{_pattern})$"), list(_first))
_KEY_PATH = re.compile(r"[a-z_][a-z0-9_]*(\.[a-z_][a-z0-9_]*)*")


def parse_yaml(text: str, where: str) -> Any:
    """The value of one strict YAML document.

    Raises UsageError naming `where`, the line and the fault.
    """
    try:
        return yaml.load(text, StrictLoader)  # noqa: S506 - StrictLoader is a SafeLoader with less in it
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
        line = f" line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or str(error)
        raise UsageError(f"{where}{line}: {escaped(problem)}") from error
    except (ValueError, RecursionError) as error:  # e.g. an integer of a million digits, nesting without end
        raise UsageError(f"{where}: {escaped(str(error) or type(error).__name__)}") from error


def read_config(path: Path) -> str:
    """The text of a config file: a regular file, at most 1 MiB, UTF-8 (a byte order mark and CRLF are accepted)."""
    try:
        kind = path.stat()
        if not stat.S_ISREG(kind.st_mode):
            what = "a folder" if stat.S_ISDIR(kind.st_mode) else "not a regular file"
            raise UsageError(f"config {shown(path)}: is {what}; expected a YAML file")
        if kind.st_size > MAX_CONFIG_BYTES:
            raise UsageError(f"config {shown(path)}: {kind.st_size} bytes; a config has at most {MAX_CONFIG_BYTES}")
        with path.open("rb") as file:
            return file.read(MAX_CONFIG_BYTES + 1).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UsageError(f"config {shown(path)}: not UTF-8 at byte {error.start}; save it as UTF-8") from error
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UsageError(f"config {shown(path)}: {reason}; give the path of a YAML file") from error


def apply_override(tree: dict[str, Any], override: str) -> None:
    """Set one `key.path=value` in a parsed config; the value is read as a YAML scalar or flow."""
    path, equals, text = override.partition("=")
    if not equals or not _KEY_PATH.fullmatch(path):
        raise UsageError(f"override {shown(override)}: expected key.path=value, e.g. training.epochs=2")
    *parents, last = path.split(".")
    node = tree
    for parent in parents:
        child = node.setdefault(parent, {})
        if not isinstance(child, dict):
            raise UsageError(f"override {shown(override)}: {parent} holds {shown(child)}, not further keys")
        node = child
    node[last] = parse_yaml(text, f"override {shown(override)}")


def _fields_at(model: type[BaseModel], path: Sequence[str | int]) -> Iterator[str]:
    """The field names that are allowed beside the last element of `path`."""
    for part in path[:-1]:
        field = model.model_fields.get(str(part))
        if field is None:  # a place in a list, or a key of a mapping: the model is that of its entries already
            continue
        options = _within(field.annotation)
        found = next((o for o in options if isinstance(o, type) and issubclass(o, BaseModel)), None)
        if found is None:
            return
        model = found
    yield from model.model_fields


def _within(annotation: Any) -> Iterator[Any]:
    """An annotation, and what stands within it: of a union, a list, an `Annotated`."""
    yield annotation
    for inner in get_args(annotation):
        yield from _within(inner)


def describe_errors(error: ValidationError, model: type[BaseModel], prefix: str = "") -> str:
    """All faults that pydantic found, each as `key value: what was expected`, joined by `; `."""
    lines = []
    for fault in error.errors(include_url=False):
        # a part in angle brackets says which of several forms of a value was meant; it is not in the config
        key = prefix + ".".join(str(part) for part in fault["loc"] if not str(part).startswith("<"))
        if fault["type"] == "extra_forbidden":
            allowed = list(_fields_at(model, fault["loc"]))
            near = difflib.get_close_matches(str(fault["loc"][-1]), allowed, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(allowed)}"
            lines.append(f"{key}: unknown key; {hint}")
        elif fault["type"] == "missing":
            lines.append(f"{key}: missing; give it a value")
        else:
            message = fault["msg"].removeprefix("Value error, ").removeprefix("Input ")
            lines.append(f"{key or 'config'} is {shown(fault['input'])}: {message}")
    return "; ".join(lines)


def parse_part(model: type[PartT], tree: Mapping[str, Any], where: str) -> PartT:
    """One branch of the tree, e.g. from the options of a command. Raises UsageError with all faults in one line."""
    try:
        return model.model_validate(dict(tree))
    except ValidationError as error:
        raise UsageError(f"{where}: {describe_errors(error, model)}") from error


def parse_settings(tree: Mapping[str, Any], where: str = "config") -> Settings:
    """The settings of an already parsed mapping.

    Raises UsageError with all faults in one line.
    """
    try:
        return Settings.model_validate(dict(tree))
    except ValidationError as error:
        raise UsageError(f"{where}: {describe_errors(error, Settings)}") from error


def load_settings(path: Path | str | None, overrides: Sequence[str] = ()) -> Settings:
    """The settings of a YAML file (or the defaults where `path` is None) with overrides applied in order.

    Raises UsageError (exit code 2) for an unreadable file, wrong YAML, unknown keys or wrong values; nothing is
    started or written before.
    """
    where, tree = "settings", {}
    if path is not None:
        where = f"config {shown(path)}"
        loaded = parse_yaml(read_config(Path(path)), where)
        if not isinstance(loaded, dict):
            raise UsageError(f"{where}: holds {shown(loaded)}; expected keys such as run, data, training")
        tree = loaded
    for override in overrides:
        apply_override(tree, override)
    return parse_settings(tree, where)
