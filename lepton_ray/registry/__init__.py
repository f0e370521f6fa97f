"""Model versions: publish, find, verify, and the aliases that say which version serves.

Holds: the layout of `models/` in the store, manifests, lineage, aliases changed by compare-and-swap.
Never: training or serving; the two meet only in what this room stores.
"""

from lepton_ray.registry.manifest import Manifest
from lepton_ray.registry.refs import Ref, parse_ref
from lepton_ray.registry.registry import LoadedVersion, ModelVersion, Registry

__all__ = ["LoadedVersion", "Manifest", "ModelVersion", "Ref", "Registry", "parse_ref"]
