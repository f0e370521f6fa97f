"""Imports torchmetrics without everything it can also use: import this module before it.

Where transformers or torchvision are installed, torchmetrics imports both for metrics that few use: four seconds of
CPU time in each rank, where 0.2 are enough. It asks `RequirementCache` whether a package is there, so during the
import, and only then, the answer is no; what needs such a package (mean average precision) asks again when it is made.
"""

from __future__ import annotations

import sys
from typing import Any

from lightning_utilities.core.imports import RequirementCache

if "torchmetrics" not in sys.modules:
    _asked: Any = RequirementCache.__bool__
    RequirementCache.__bool__ = lambda _: False  # type: ignore[method-assign, assignment]
    try:
        import torchmetrics  # noqa: F401 - imported for what it leaves in sys.modules
    finally:
        RequirementCache.__bool__ = _asked  # type: ignore[method-assign]
