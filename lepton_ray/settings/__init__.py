"""One typed settings tree: what a run, a model and an endpoint are made of.

Holds: the frozen pydantic tree (`tree`) with meaning and unit under each field, and the strict loading of YAML plus
`key.path=value` overrides (`loading`).
Never: torch, Ray, Kubernetes or storage; settings load in milliseconds so that a wrong key is told before anything
starts. A task's own options are checked by the task.
"""

from lepton_ray.settings.loading import load_settings, parse_settings
from lepton_ray.settings.reading import LimitSettings, ReadingSettings
from lepton_ray.settings.training import CheckpointSettings, OptimizerSettings, TrainingSettings
from lepton_ray.settings.tree import (
    CleaningSettings,
    DataSettings,
    PublishSettings,
    ServingSettings,
    Settings,
    SplitSettings,
    TaskSettings,
)

__all__ = [
    "CheckpointSettings",
    "CleaningSettings",
    "DataSettings",
    "LimitSettings",
    "OptimizerSettings",
    "PublishSettings",
    "ReadingSettings",
    "ServingSettings",
    "Settings",
    "SplitSettings",
    "TaskSettings",
    "TrainingSettings",
    "load_settings",
    "parse_settings",
]
