"""lepton-ray: train PyTorch models with Ray, serve them, and see where every worker-second went.

The rooms, bottom to top: `errors`, `settings`, `storage`; then `data`, `registry` and `monitoring`, which do not know
each other; then `tasks`; then `training`, `tuning`, `compression` and `serving`, which meet only in the registry or
where the command line joins them; then `orchestrator`; then `cli`. Imports go down only.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from lepton_ray import training as training
    from lepton_ray.training.distributed import run_distributed
    from lepton_ray.training.trainer import Trainer, TrainingResult

__all__ = ["Trainer", "TrainingResult", "__version__", "run_distributed"]


def __getattr__(name: str) -> Any:
    """The trainer and `run_distributed`, imported on first use: importing the package stays light."""
    if name == "run_distributed":
        from lepton_ray.training.distributed import run_distributed

        return run_distributed
    if name in ("Trainer", "TrainingResult"):
        from lepton_ray.training import trainer

        return getattr(trainer, name)
    raise AttributeError(f"module 'lepton_ray' has no attribute {name!r}")
