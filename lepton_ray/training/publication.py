"""From a finished run to a model version: the verified last checkpoint, its transforms, metrics and lineage."""

from __future__ import annotations

import time

import lepton_ray
from lepton_ray.errors import UsageError
from lepton_ray.registry import ModelVersion, Registry
from lepton_ray.settings import Settings
from lepton_ray.storage import Store
from lepton_ray.training.record import RunRecord
from lepton_ray.training.trainer import TrainingResult, final_checkpoint, settings_digest


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
        checkpoint = final_checkpoint(store, result)
        version = registry.publish(
            wanted.model,
            weights=checkpoint.files["model.safetensors"],
            transforms=record.fields["transforms"],
            card={
                "task": {"name": settings.task.name, "options": settings.task.options},
                "metrics": result.metrics,
                "lineage": {
                    "run": result.run,
                    "attempt": checkpoint.manifest["attempt"],
                    "step": result.step,
                    "checkpoint_sha256": checkpoint.manifest["files"]["model.safetensors"]["sha256"],
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
