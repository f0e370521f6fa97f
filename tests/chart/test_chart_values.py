"""The chart's own files: every value explained, versions that agree with the rest of the project."""

from __future__ import annotations

import json
import re
import tomllib
from typing import Any

import yaml
from rendering import CHART, ROOT


def test_every_value_has_its_comment() -> None:
    """Each leaf of values.yaml stands under a `# --` comment, its own or that of the block it belongs to."""
    lines = (CHART / "values.yaml").read_text().splitlines()
    unexplained, depth = [], 99
    for number, line in enumerate(lines):
        found = re.match(r"( *)(- )?([A-Za-z][\w./-]*):(.*)$", line)
        if not found or len(found[1]) > depth or found[2]:
            continue
        depth = 99
        start = number
        while start > 0 and re.match(r" *#", lines[start - 1]):
            start -= 1
        if any(re.match(r" *# -- ", comment) for comment in lines[start:number]):
            depth = len(found[1])  # what is indented deeper is part of this value
        elif found[4].strip():
            unexplained.append(line)
    assert not unexplained


def leaves(schema: dict[str, Any], path: str = "") -> list[str]:
    """Paths of objects in the schema that would let an unknown key pass."""
    found = []
    if schema.get("type") == "object" and "properties" in schema and schema.get("additionalProperties") is not False:
        found.append(path)
    for key, value in schema.items():
        if isinstance(value, dict):
            found += leaves(value, f"{path}/{key}")
    return found


def test_schema_is_closed_everywhere() -> None:
    """Every object with named properties refuses others; only Kubernetes' own maps stay open."""
    schema = json.loads((CHART / "values.schema.json").read_text())
    assert not leaves(schema)


def test_schema_and_defaults_name_the_same_keys() -> None:
    """A key of the schema without a default would be undocumented; a default without schema cannot exist."""
    schema = json.loads((CHART / "values.schema.json").read_text())
    values = yaml.safe_load((CHART / "values.yaml").read_text())

    def compare(part: dict[str, Any], defaults: dict[str, Any], path: str) -> None:
        for key, below in part["properties"].items():
            if path + key == "global":
                continue
            assert key in defaults, f"{path}{key} has no default"
            if "properties" in below:
                compare(below, defaults[key], f"{path}{key}.")

    compare(schema, values, "")


def test_versions_agree() -> None:
    """The chart, its image tag and its Ray version are those of the package."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    assert chart["version"] == chart["appVersion"] == values["image"]["tag"] == project["version"]
    (ray,) = [item.split("==")[1] for item in project["dependencies"] if item.startswith("ray[")]
    assert chart["annotations"]["lepton-ray/ray-version"] == ray


def test_one_object_per_template() -> None:
    """Each template makes one object, so a file's name says what is in it."""
    for path in (CHART / "templates").rglob("*.yaml"):
        assert len(re.findall(r"^kind: ", path.read_text(), re.MULTILINE)) == 1, path.name
        assert "\n---" not in path.read_text(), path.name
