"""Endpoints: the only room that knows Ray Serve.

Holds: the application that answers requests for one model version, its limits, and its deployment.
Never: training. A model reaches this room only as a verified version of the registry.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lepton_ray.serving.deployment import Endpoint, Status, check_deployable, delete, deploy, endpoints, status
    from lepton_ray.serving.replica import build_app

__all__ = ["Endpoint", "Status", "build_app", "check_deployable", "delete", "deploy", "endpoints", "status"]


def __getattr__(name: str) -> Any:
    """Imported on first use: the proxy's edge and the command line load this room without torch."""
    if name == "build_app":
        from lepton_ray.serving import replica

        return replica.build_app
    if name in __all__:
        from lepton_ray.serving import deployment

        return getattr(deployment, name)
    raise AttributeError(f"module 'lepton_ray.serving' has no attribute {name!r}")
