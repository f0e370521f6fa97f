"""The settings of `lepton-ray compress`: the steps, in order, and what the result must keep."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import Field, ValidationError, model_validator

from lepton_ray.errors import UsageError, shown
from lepton_ray.settings.loading import apply_override, describe_errors, parse_yaml, read_config
from lepton_ray.settings.node import Node
from lepton_ray.settings.tree import Name

Amount = Annotated[float, Field(gt=0.0, lt=1.0)]


class PruneStep(Node):
    """Weights that contribute least become zero for good."""

    step: Literal["prune"] = "prune"
    method: Literal["magnitude", "structured"] = "magnitude"
    """`magnitude`: the smallest weights of all matrices and convolutions together. `structured`: whole output channels
    with the smallest sum of absolute weights; the model becomes narrower where the task has an option `width`."""
    amount: Amount
    """Share of the weights, or of each layer's channels, that goes."""


class QuantiseStep(Node):
    """Weights of linear layers become int8 with one scale for each output (torchao); convolutions stay."""

    step: Literal["quantise"] = "quantise"
    scheme: Literal["int8-weight", "int8-dynamic"] = "int8-weight"
    """`int8-weight`: only the weights. `int8-dynamic`: the inputs too, each row with a scale of its own."""


class CastStep(Node):
    """Other weights are stored in 16 bits; they are widened when the model is loaded and computed with as before."""

    step: Literal["cast"] = "cast"
    to: Literal["bf16", "fp16"] = "bf16"
    """`bf16` has the range of fp32; `fp16` has more digits and ends at 65,504."""


class DistilStep(Node):
    """The original model teaches (Hinton et al. 2015): a smaller one, or what the steps before have left of itself."""

    step: Literal["distil"] = "distil"
    options: dict[str, Any] = Field(default_factory=dict)
    """Task options of the smaller model, over those of the original; none trains the model as the steps before left
    it (pruned weights stay zero)."""
    epochs: Annotated[int, Field(ge=1, le=10_000)] = 5
    """Passes over the training rows."""
    batch: Annotated[int, Field(ge=1, le=1_000_000)] = 64
    """Rows per step."""
    learning_rate: Annotated[float, Field(gt=0.0, le=1.0)] = 2e-3
    """Peak of AdamW's learning rate: a rise over the first tenth, then half a cosine."""
    temperature: Annotated[float, Field(gt=0.0, le=100.0)] = 2.0
    """Both models' logits are divided by it before the softmax."""
    soft: Annotated[float, Field(ge=0.0, le=1.0)] = 0.7
    """Weight of the teacher's answers in the loss; the rest is the task's own loss on the labels."""


Step = Annotated[PruneStep | QuantiseStep | CastStep | DistilStep, Field(discriminator="step")]
_SHORT: dict[str, tuple[str, ...]] = {
    "prune": ("method", "amount"),
    "quantise": ("scheme",),
    "cast": ("to",),
    "distil": (),
}
"""Step -> the fields that its short form gives by position."""
_ORDER = {"prune": 0, "distil": 0, "quantise": 1, "cast": 2}


class CompressionSettings(Node):
    """How a model version is compressed, compared with the original, and published."""

    steps: Annotated[list[Step], Field(min_length=1, max_length=16)]
    """In the order in which they are done."""
    max_drop: Annotated[float, Field(ge=0.0, le=100.0)] = 1.0
    """Points (hundredths) by which the deciding metric may get worse; more is refused and nothing is published."""
    table: str | None = None
    """Rows to learn from and to compare on, `TABLE` or `TABLE@VERSION`; null takes those the model was trained on."""
    name: Name | None = None
    """Model under which the result is published; null takes the original's."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Decides initial weights and sample order of distillation."""
    threads: Annotated[int, Field(ge=1, le=4096)] = 1
    """CPU threads of the comparison, as in `serving.cpus_per_replica`."""
    seconds: Annotated[float, Field(gt=0.0, le=3600.0)] = 4.0
    """About how long the speed of the two models is measured."""
    batch: Annotated[int, Field(ge=1, le=65_536)] = 32
    """Rows per call when rows per second are measured."""

    @model_validator(mode="after")
    def _order_fits(self) -> Self:
        kinds = [step.step for step in self.steps]
        if [_ORDER[kind] for kind in kinds] != sorted(_ORDER[kind] for kind in kinds):
            raise ValueError(f"steps are {', '.join(kinds)}: prune and distil come first, then quantise, then cast")
        for kind in ("quantise", "cast"):
            if kinds.count(kind) > 1:
                raise ValueError(f"steps hold {kind} {kinds.count(kind)} times: once is all it takes")
        fresh = [index for index, step in enumerate(self.steps) if isinstance(step, DistilStep) and step.options]
        if any(index > 0 for index in fresh):
            raise ValueError("a distil step with options makes a new model: put it first")
        return self


def parse_step(text: str) -> dict[str, Any]:
    """A step as it stands on the command line, e.g. `prune:magnitude:0.5` or `distil:epochs=3,options.width=12`.

    After the name come the step's main values by position and any field as `key.path=value`, joined by `,` or `:`.
    Raises UsageError for an unknown step or a value without a place.
    """
    name, *values = text.replace(",", ":").split(":")
    if name not in _SHORT:
        raise UsageError(f"step {shown(text)}: no step {shown(name)}; expected {', '.join(_SHORT)}")
    tree: dict[str, Any] = {"step": name}
    places = list(_SHORT[name])
    for value in values:
        if "=" in value:
            apply_override(tree, value)
        elif places:
            tree[places.pop(0)] = parse_yaml(value, f"step {shown(text)}")
        else:
            raise UsageError(f"step {shown(text)}: {shown(value)} has no place; expected key=value, e.g. epochs=3")
    return tree


def load_compression(path: str | None, steps: list[str], **given: Any) -> CompressionSettings:
    """The settings of a YAML file (none where `path` is None), with what the command line gives over it.

    Steps given take the place of the file's. Raises UsageError with all faults in one line.
    """
    tree: dict[str, Any] = {}
    where = "compress"
    if path is not None:
        from pathlib import Path

        where = f"config {shown(path)}"
        loaded = parse_yaml(read_config(Path(path)), where)
        if not isinstance(loaded, dict):
            raise UsageError(f"{where}: holds {shown(loaded)}; expected keys such as steps and max_drop")
        tree = loaded
        if isinstance(tree.get("steps"), list):
            tree["steps"] = [parse_step(step) if isinstance(step, str) else step for step in tree["steps"]]
    if steps:
        tree["steps"] = [parse_step(step) for step in steps]
    if not tree.get("steps"):
        raise UsageError(f"{where}: no step; give --step, e.g. --step quantise:int8-weight")
    tree |= {key: value for key, value in given.items() if value is not None}
    try:
        return CompressionSettings.model_validate(tree)
    except ValidationError as error:
        raise UsageError(f"{where}: {describe_errors(error, CompressionSettings)}") from error


def told(step: PruneStep | QuantiseStep | CastStep | DistilStep) -> str:
    """A step in a few words, for cards and tables: `prune structured 0.5`."""
    fields = step.model_dump(exclude={"step"}, exclude_defaults=True)
    positional = [str(getattr(step, field)) for field in _SHORT[step.step]]
    rest = {key: value for key, value in fields.items() if key not in _SHORT[step.step]}
    extra = yaml.safe_dump(rest, default_flow_style=True, sort_keys=True).strip() if rest else ""
    return " ".join([step.step, *positional, *([extra] if extra else [])])
