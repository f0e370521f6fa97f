"""Transforms: fitted preprocessing, the same in training and in a served request.

A `Pipeline` is fitted to the training rows, kept as JSON with the model, and applied by training, evaluation and every
replica; bit for bit the same for one row as for a million. What the steps are is said in
`lepton_ray.settings.transforms`. Augmentation is no part of it: it belongs to training alone (see `Task.augment`).
"""

from lepton_ray.data.transforms.pieces import InMemory, Stored, training_pieces
from lepton_ray.data.transforms.pipeline import Pipeline, matrix

__all__ = ["InMemory", "Pipeline", "Stored", "matrix", "training_pieces"]
