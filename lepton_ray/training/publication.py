"""From a finished run to a model version: the verified last checkpoint, its transforms, metrics and lineage."""

from __future__ import annotations

import json
import math
import time

import lepton_ray
from lepton_ray.errors import UsageError
from lepton_ray.registry import ModelVersion, Registry
from lepton_ray.settings import Settings
from lepton_ray.storage import Store
from lepton_ray.training.checkpoints import weights_digest
from lepton_ray.training.driver import settings_digest
from lepton_ray.training.record import RunRecord
from lepton_ray.training.trainer import TrainingResult, final_checkpoint


def publish(result: TrainingResult, settings: Settings, store: Store) -> ModelVersion | None:
    """Publish the model of a finished run as the settings say; None where they name no model.

    A run is published once: asking again (the same run name submitted again) gives the version that is there.
    """
    wanted = settings.publish
    if wanted.model is None:
        return None
    registry = Registry(store)
    record = RunRecord.open(store, result.run)
    if record.fields.get("model_version"):
        version = registry.resolve(record.fields["model_version"])
        if version.model != wanted.model:
            raise UsageError(f"publish.model is {wanted.model}: run {result.run} is published as {version.ref} already")
    else:
        # torch only now: the driver of a run needs it for nothing before
        from lepton_ray.training.state import STATE, whole_weights
        from lepton_ray.training.transfer import publishable

        checkpoint = final_checkpoint(store, result, best=wanted.weights == "best")
        metrics = json.loads(checkpoint.files[STATE])["metrics"]
        version = registry.publish(
            wanted.model,
            weights=publishable(whole_weights(checkpoint.files), settings.training.transfer),
            transforms=record.fields["transforms"],
            card={
                "task": {"name": settings.task.name, "options": settings.task.options},
                "metrics": {name: value for name, value in metrics.items() if math.isfinite(value)},
                "lineage": {
                    "run": result.run,
                    "attempt": checkpoint.manifest["attempt"],
                    "step": checkpoint.step,
                    "checkpoint_sha256": weights_digest(checkpoint.manifest),
                    "initial": (record.fields.get("initial") or {}).get("source"),
                    "table": record.fields["table"],
                    "table_version": record.fields["table_version"],
                    "table_fingerprint": record.fields["table_fingerprint"],
                    "rows": record.fields["rows"],
                    "settings_sha256": settings_digest(settings),
                    "seed": settings.training.seed,
                    "code_version": lepton_ray.__version__,
                },
                "framework": record.fields["environment"],
                "created_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            },
        )
        record.update(model_version=version.ref)
    if wanted.alias and registry.aliases(wanted.model).get(wanted.alias) != version.number:
        registry.set_alias(wanted.model, wanted.alias, version.number, reason=f"run {result.run}")
    return version
