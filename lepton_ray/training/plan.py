"""What the driver tells the ranks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lepton_ray.settings import Settings


@dataclass(frozen=True)
class RankPlan:
    """Plain values only, so that it travels to any node and loads without torch."""

    settings: Settings
    store_uri: str
    attempt: int
    transforms: Mapping[str, Any]
    table_fingerprint: str
