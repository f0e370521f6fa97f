"""What is told before a run starts, all of it in one go."""

from __future__ import annotations

import pyarrow as pa
import pytest

from lepton_ray.errors import UsageError
from lepton_ray.settings import parse_settings
from lepton_ray.tasks import find_task
from lepton_ray.training.checks import check_run

SCHEMA = pa.schema([("image", pa.binary()), ("height", pa.int32()), ("width", pa.int32()), ("channels", pa.int32()),
                    ("label", pa.int64())])  # fmt: skip


def check(training: dict[str, object], schema: pa.Schema = SCHEMA) -> None:
    """Check such a run."""
    check_run(parse_settings({"training": training}), find_task("image_classification"), schema)


def test_a_sound_run_passes() -> None:
    """The defaults, and each thing that is checked where it fits."""
    check({})
    check({"stopping": {"metric": "loss"}, "sampling": {"class_weights": "balanced"}})


@pytest.mark.parametrize(("training", "words"), [
    ({"stopping": {"metric": "bleu"}}, "metric 'bleu': task image_classification has accuracy"),
    ({"global_batch": 3, "workers": 4}, "training.global_batch is 3: 4 workers x 1 parts"),
    ({"global_batch": 6, "workers": 2, "optimizer": {"accumulate": 4}}, "need 8 rows or more"),
])  # fmt: skip
def test_each_fault_is_named(training: dict[str, object], words: str) -> None:
    """A metric that the task lacks and a batch that does not go round."""
    with pytest.raises(UsageError, match=words):
        check(training)


def test_all_faults_are_told_at_once() -> None:
    """A missing column, a metric and a batch in one line."""
    schema = SCHEMA.remove(SCHEMA.get_field_index("label"))
    with pytest.raises(UsageError) as told:
        check({"stopping": {"metric": "bleu"}, "global_batch": 1, "workers": 2}, schema)
    assert all(word in str(told.value) for word in ("label", "bleu", "global_batch"))
    assert "\n" not in str(told.value)


def test_threads_are_those_that_a_rank_really_has(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was reserved, unless the container's quota gives its ranks less; never none."""
    from lepton_ray.training import context

    monkeypatch.setattr(context, "available_cpus", lambda: 8)
    assert context.threads(4, 2) == 4
    assert context.threads(16, 2) == 4
    assert context.threads(1, 16) == 1


def test_numbers_are_no_classes() -> None:
    """Weighing by class needs labels, not measured values."""
    schema = SCHEMA.set(4, pa.field("label", pa.float64()))
    with pytest.raises(UsageError, match="holds double"):
        check({"sampling": {"weighted": "balanced"}}, schema)
