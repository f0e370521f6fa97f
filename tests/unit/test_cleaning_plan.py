"""A cleaning plan is strict: whatever is wrong with it is told at once, before a row is read."""

from __future__ import annotations

import pyarrow as pa
import pytest

from lepton_ray.data.cleaning.reading_plans import digest_of, schema_after, steps_of
from lepton_ray.errors import UsageError
from lepton_ray.settings.cleaning import load_plan, parse_plan

SCHEMA = pa.schema(
    [("key", pa.string()), ("age", pa.string()), ("size", pa.float64()), ("name", pa.string()), ("photo", pa.binary())]
)


def plan(*steps, **more):
    return parse_plan({"steps": list(steps), **more})


def test_a_plan_in_yaml(tmp_path):
    """Steps in their order, defaults filled in; a file and the same in Python are the same plan."""
    path = tmp_path / "plan.yaml"
    path.write_text("max_quarantine: 0.5\nsteps:\n- normalise: {columns: [name]}\n- duplicates: {}\n")
    loaded = load_plan(path)
    assert [step.rule for step in loaded.steps] == ["normalise", "duplicates"]
    assert loaded.max_quarantine == 0.5
    assert digest_of(loaded) == digest_of(
        plan({"normalise": {"columns": ["name"]}}, {"duplicates": {}}, max_quarantine=0.5)
    )
    assert digest_of(loaded) != digest_of(plan({"normalise": {"columns": ["name"]}}, {"duplicates": {}}))
    assert plan({"duplicates": {}}).max_quarantine == 0.01


def test_all_faults_of_a_plan_at_once():
    """Unknown keys with a hint, wrong values, two rules in a step, settings that do not go together."""
    with pytest.raises(UsageError) as caught:
        parse_plan(
            {
                "steps": [
                    {"range": {"colums": ["size"], "min": "x"}},
                    {"normalize": {"columns": ["name"]}},
                    {"missing": {"columns": ["age"], "fill": "constant"}},
                    {"duplicates": {}, "check": {"rule": "a < b"}},
                    {"outliers": {"columns": [], "limit": -1}},
                    {"missing": {"columns": ["age"], "fill": "interpolate"}},
                ],
                "max_quarantine": 2,
            }
        )
    said = str(caught.value)
    for part in (
        "steps.0.range.columns: missing", "steps.0.range.colums: unknown key; did you mean 'columns'",
        "steps.1.normalize: unknown key; did you mean 'normalise'", "steps.2.missing", "value goes with fill: constant",
        "steps.3", "a step is one key", "steps.4.outliers.columns", "steps.4.outliers.limit", "along goes with",
        "max_quarantine is 2",
    ):  # fmt: skip
        assert part in said, part
    assert "\n" not in said


@pytest.mark.parametrize("text", ["", "steps: []", "- a", "steps: [{duplicates: }]", "steps: 3", "x: 1", "steps: [{}]"])
def test_what_is_no_plan(tmp_path, text):
    """One line, exit code 2."""
    path = tmp_path / "plan.yaml"
    path.write_text(text)
    with pytest.raises(UsageError) as caught:
        load_plan(path)
    assert "\n" not in str(caught.value)


def test_all_that_does_not_fit_the_table_at_once():
    """Each step with its place; a step sees the types that those before it made."""
    wrong = plan(
        {"normalise": {"columns": ["size"]}},
        {"range": {"columns": ["age"], "min": 0}},
        {"range": {"columns": ["nowhere"]}},
        {"pattern": {"columns": ["name"], "regex": "(?=a)"}},
        {"check": {"rule": "size < name"}},
        {"missing": {"columns": ["size"], "fill": "constant", "value": "x"}},
        {"markers": {"columns": ["key"], "values": ["x"]}},
        {"near_duplicates": {"column": "photo"}},
        {"allowed": {"columns": ["size"], "values": ["a"]}},
        {"labels": {"column": "name", "classes": 3}},
        {"type": {"columns": ["photo"], "to": "int64"}},
        {"readable": {"columns": ["name"], "kind": "image"}},
    )
    with pytest.raises(UsageError) as caught:
        steps_of(wrong, SCHEMA, "t@0")
    said = str(caught.value)
    assert [f"steps.{index}." in said for index in range(12)] == [True] * 12
    assert "no column 'nowhere'" in said
    assert "\n" not in said
    fine = plan({"type": {"columns": ["age"], "to": "int64"}}, {"range": {"columns": ["age"], "min": 0}})
    steps = steps_of(fine, SCHEMA, "t@0")
    assert schema_after(steps, SCHEMA).field("age").type == pa.int64()
