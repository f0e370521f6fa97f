"""What every level of the settings tree has in common."""

from __future__ import annotations

from typing import Self

from pydantic import BaseModel, ConfigDict, model_validator


class Node(BaseModel):
    """What every level of the tree has in common."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True)


class OneOf(Node):
    """One step of a list: exactly one of the fields of a subclass is set, and names the step."""

    @model_validator(mode="after")
    def _one(self) -> Self:
        if len(self.model_fields_set) != 1 or self.settings is None:
            raise ValueError(
                f"a step is one key with its settings; expected one of {', '.join(type(self).model_fields)}"
            )
        return self

    @property
    def rule(self) -> str:
        """The name of the step."""
        return next(iter(self.model_fields_set))

    @property
    def settings(self) -> Node | None:
        """What it is told."""
        found: Node | None = getattr(self, self.rule)
        return found
