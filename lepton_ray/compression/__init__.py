"""Smaller models: prune, quantise, narrow and distil a model version, compare it with the original, publish it.

Holds: the steps, the comparison on this machine, and the refusal to publish what lost too much; the one door to
torchao.
Never: Ray, training runs, serving. What it publishes is a model version like any other, applied by
`lepton_ray.tasks.Predictor`.
"""

from __future__ import annotations

from lepton_ray.compression.pipeline import Compressed, compress

__all__ = ["Compressed", "compress"]
