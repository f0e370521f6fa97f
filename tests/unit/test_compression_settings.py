"""The settings of compression: short steps, their order, and every wrong value told by its name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lepton_ray.errors import UsageError
from lepton_ray.settings.compression import CastStep, DistilStep, PruneStep, QuantiseStep, load_compression, told


def steps(*texts: str) -> list[Any]:
    """The steps of a command line."""
    return list(load_compression(None, list(texts)).steps)


def test_short_steps_mean_what_they_say() -> None:
    """Main values by position, any field by its key path, in the order given."""
    found = steps("prune:structured:0.5", "distil:epochs=3,learning_rate=0.01", "quantise:int8-dynamic", "cast:to=fp16")
    assert found == [
        PruneStep(method="structured", amount=0.5),
        DistilStep(epochs=3, learning_rate=0.01),
        QuantiseStep(scheme="int8-dynamic"),
        CastStep(to="fp16"),
    ]
    assert [told(step) for step in found] == [
        "prune structured 0.5",
        "distil {epochs: 3, learning_rate: 0.01}",
        "quantise int8-dynamic",
        "cast fp16",
    ]


def test_options_of_a_smaller_model_are_nested() -> None:
    """`options.width=12` is an option of the task, not of the step."""
    (step,) = steps("distil:options.width=12,options.dropout=0.1,epochs=2")
    assert step == DistilStep(options={"width": 12, "dropout": 0.1}, epochs=2)


@pytest.mark.parametrize(
    ("texts", "words"),
    [
        ((), "no step; give --step"),
        (("shrink:0.5",), "no step 'shrink'; expected prune, quantise, cast, distil"),
        (("prune:magnitude:0.5:3",), "'3' has no place"),
        (("prune:magnitude:1.5",), "amount is 1.5"),
        (("prune:magnitude",), "amount: missing"),
        (("quantise:int4",), "'int8-weight' or 'int8-dynamic'"),
        (("distil:epoch=3",), "epoch: unknown key"),
        (("quantise:int8-weight", "prune:magnitude:0.5"), "prune and distil come first"),
        (("cast:bf16", "cast:fp16"), "once is all it takes"),
        (("prune:magnitude:0.5", "distil:options.width=4"), "put it first"),
    ],
)
def test_wrong_steps_are_told(texts: tuple[str, ...], words: str) -> None:
    """Each with its name, its value and what was expected."""
    with pytest.raises(UsageError, match=words.replace("(", r"\(")):
        steps(*texts)


def test_a_file_says_the_same_and_the_command_line_wins(tmp_path: Path) -> None:
    """Steps in full or short form; a step on the command line takes the place of the file's."""
    config = tmp_path / "compress.yaml"
    config.write_text("steps:\n  - cast:bf16\nmax_drop: 2.5\ntable: digits@3\n")
    found = load_compression(str(config), [], max_drop=None)
    assert (found.steps, found.max_drop, found.table) == ([CastStep(to="bf16")], 2.5, "digits@3")
    changed = load_compression(str(config), ["prune:magnitude:0.2"], max_drop=0.5)
    assert (changed.steps, changed.max_drop) == ([PruneStep(amount=0.2)], 0.5)
    config.write_text("steps:\n  - {step: prune, amount: 0.3}\nmax_dorp: 2\n")
    with pytest.raises(UsageError, match="max_dorp: unknown key; did you mean 'max_drop'"):
        load_compression(str(config), [])
