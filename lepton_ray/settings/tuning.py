"""The tuning branch of the settings tree: what is searched, how, and which trials go on."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from lepton_ray.settings.node import Node

Bounds = Annotated[list[float], Field(min_length=2, max_length=2)]
Choices = Annotated[list[Any], Field(min_length=1, max_length=1000)]
SettingPath = Annotated[str, Field(pattern=r"^[a-z_][a-z0-9_]*(\.[a-z_][a-z0-9_]*)+$", max_length=200)]
MAX_TRIALS = 10_000


class DimensionSettings(Node):
    """Values of one setting: exactly one of the five kinds."""

    grid: Choices | None = None
    """Every value is tried, with every value of the other settings (`search: grid`)."""
    choice: Choices | None = None
    """One of these values, each as likely as the others."""
    uniform: Bounds | None = None
    """A number from the first to the second."""
    loguniform: Bounds | None = None
    """A number from the first (above 0) to the second, each order of magnitude as likely as the others."""
    randint: Annotated[list[int], Field(min_length=2, max_length=2)] | None = None
    """A whole number from the first up to, but without, the second."""

    @property
    def kind(self) -> str:
        """The name of the kind that is given."""
        return next(name for name in type(self).model_fields if getattr(self, name) is not None)

    @property
    def values(self) -> list[Any]:
        """The listed values, or the two bounds."""
        found: list[Any] = getattr(self, self.kind)
        return found

    @model_validator(mode="after")
    def _fits(self) -> Self:
        given = [name for name in type(self).model_fields if getattr(self, name) is not None]
        if len(given) != 1:
            kinds = ", ".join(type(self).model_fields)
            raise ValueError(f"has {' and '.join(given) or 'nothing'}; give exactly one of {kinds}")
        bounds = self.uniform or self.loguniform or self.randint
        if bounds and not bounds[0] < bounds[1]:
            raise ValueError(f"{given[0]} goes from {bounds[0]:g} to {bounds[1]:g}: the first must be the smaller one")
        if self.loguniform and self.loguniform[0] <= 0.0:
            raise ValueError(f"loguniform begins at {self.loguniform[0]:g}: it must be above 0")
        return self


class AshaSettings(Node):
    """Asynchronous successive halving (Li et al. 2018): at each rung only the best go on."""

    grace_epochs: Annotated[int, Field(ge=1)] = 1
    """The first rung: no trial ends before this epoch."""
    reduction: Annotated[int, Field(ge=2, le=100)] = 3
    """Each rung is this many times later than the one before, and one trial in so many passes it."""


class PbtSettings(Node):
    """Population based training (Jaderberg et al. 2017): the worst go on from the best, with changed settings."""

    interval_epochs: Annotated[int, Field(ge=1)] = 1
    """Epochs of a trial between two looks at the population."""
    quantile: Annotated[float, Field(gt=0.0, le=0.5)] = 0.25
    """Share of the population that counts as the best, and as the worst."""
    resample: Annotated[float, Field(ge=0.0, le=1.0)] = 0.25
    """Probability of a fresh draw; otherwise a number changes by a factor of 1.2 or 0.8, a choice to its neighbour."""


class TuningSettings(Node):
    """A search for good settings: trials of one training config that differ in the settings of `space`."""

    search: Literal["grid", "random", "optuna"] = "random"
    """`grid`: every combination. `random`: `trials` independent draws. `optuna`: draws that learn from the trials that
    ended (TPE, Bergstra et al. 2011)."""
    scheduler: Literal["none", "asha", "pbt"] = "none"
    """Every trial to its end; bad ones stopped early; or one population that learns from its best."""
    space: Annotated[dict[SettingPath, DimensionSettings], Field(min_length=1, max_length=100)]
    """Key path of a setting under `training` or `task.options` to the values it may have."""
    trials: Annotated[int, Field(ge=1, le=MAX_TRIALS)] | None = None
    """Number of trials of `random` and `optuna`; a grid has as many as it has combinations."""
    concurrent: Annotated[int, Field(ge=1, le=MAX_TRIALS)] | None = None
    """Trials at the same time; null takes as many as the cluster has room for."""
    metric: str | None = None
    """Metric that is tuned for; null takes the one by which the task decides."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Decides the draws."""
    asha: AshaSettings = AshaSettings()
    """Of scheduler `asha`."""
    pbt: PbtSettings = PbtSettings()
    """Of scheduler `pbt`."""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        kinds = {dimension.kind for dimension in self.space.values()}
        if self.search == "grid":
            others = [f"{key} has {entry.kind}" for key, entry in self.space.items() if entry.kind != "grid"]
            if others:
                raise ValueError(
                    f"search grid takes grid only, {', '.join(others)}; list values, or set search: random"
                )
            if self.trials is not None:
                raise ValueError(f"trials is {self.trials}: a grid has as many as combinations; leave it out")
        else:
            if "grid" in kinds:
                raise ValueError(f"space has grid, which search {self.search} does not take; use choice")
            if self.trials is None:
                raise ValueError(f"trials: missing; search {self.search} needs their number")
        if self.scheduler == "pbt" and self.search == "optuna":
            raise ValueError("scheduler pbt draws its settings itself; set search to random or grid")
        return self
