"""The page about training shows settings that exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from lepton_ray.settings import TrainingSettings, parse_settings
from lepton_ray.settings.loading import parse_yaml
from lepton_ray.settings.training import OptimizerSettings, ScheduleSettings

PAGE = (Path(__file__).parents[2] / "docs" / "training.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"^```yaml\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("text", EXAMPLES)
def test_every_example_is_a_valid_config(text: str) -> None:
    parse_settings(parse_yaml(text, "docs/training.md"))


def test_every_group_of_settings_has_an_example() -> None:
    shown = {key for text in EXAMPLES for key in parse_yaml(text, "docs/training.md").get("training", {})}
    groups = {
        name for name, field in TrainingSettings.model_fields.items() if hasattr(field.annotation, "model_fields")
    }
    assert groups <= shown
    assert groups >= {"optimizer", "precision", "stopping"}


@pytest.mark.parametrize(("model", "key"), [(OptimizerSettings, "name"), (ScheduleSettings, "name")])
def test_every_optimiser_and_schedule_is_named(model: type[OptimizerSettings], key: str) -> None:
    for choice in model.model_json_schema()["properties"][key]["enum"]:
        assert re.search(rf"\b{choice}\b", PAGE), choice
