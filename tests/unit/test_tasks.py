"""Tasks: rows to tensors, transforms learnt once, requests answered as offline."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from safetensors.torch import save

from lepton_ray.errors import IntegrityError, UsageError
from lepton_ray.tasks import Predictor, find_task, load_weights
from lepton_ray.tasks.image_classification import ImageClassification, ImageClassificationOptions, ImageRequest


def images(count: int = 20, height: int = 8, width: int = 10, channels: int = 1, seed: int = 0) -> pa.Table:
    pixels = np.random.default_rng(seed).integers(0, 256, (count, height * width * channels), np.uint8)
    return pa.table(
        {
            "image": pa.array([row.tobytes() for row in pixels], pa.binary()),
            "height": pa.array([height] * count, pa.int32()),
            "width": pa.array([width] * count, pa.int32()),
            "channels": pa.array([channels] * count, pa.int32()),
            "label": pa.array([i % 3 for i in range(count)], pa.int64()),
        }
    )


def task(**options: object) -> ImageClassification:
    return ImageClassification(ImageClassificationOptions.model_validate(options))


def test_transforms_are_the_figures_of_the_training_rows() -> None:
    rows = images()
    pixels = np.array([list(image) for image in rows["image"].to_pylist()], np.float64)
    found = task().fit(rows)
    assert (found["height"], found["width"], found["channels"], found["classes"]) == (8, 10, 1, 3)
    assert found["mean"] == pytest.approx(pixels.mean())
    assert found["deviation"] == pytest.approx(pixels.std())


@pytest.mark.parametrize("cut", [slice(None), slice(3, 11)])
def test_inputs_are_the_pixels_channels_first(cut: slice) -> None:
    """Also for a slice and a concatenation of tables, whose Arrow buffers do not begin at the first row."""
    rows = pa.concat_tables([images(7, channels=3), images(9, channels=3, seed=1)])[cut]
    transforms = task().fit(rows)
    inputs = task().inputs(rows, transforms)
    assert inputs.dtype == torch.uint8
    expected = np.array([list(image) for image in rows["image"].to_pylist()], np.uint8).reshape(-1, 8, 10, 3)
    assert np.array_equal(inputs.numpy(), expected.transpose(0, 3, 1, 2))


def test_an_answer_is_the_same_alone_and_in_a_batch() -> None:
    """Serving answers one request at a time what evaluation computes by the hundred."""
    rows = images(40)
    made = task()
    transforms = made.fit(rows)
    predictor = Predictor(made, transforms, made.build(transforms))
    together = predictor.answer_rows(rows)
    for index in (0, 17, 39):
        alone = predictor.predict([ImageRequest(image=list(rows["image"][index].as_py()))])[0]
        assert alone.label == together[index].label  # type: ignore[attr-defined]
        assert alone.probabilities == pytest.approx(together[index].probabilities, abs=1e-6)  # type: ignore[attr-defined]
        assert sum(alone.probabilities) == pytest.approx(1, abs=1e-5)  # type: ignore[attr-defined]


def test_augmentation_depends_on_the_sample_alone() -> None:
    """Whatever other rows are in the batch, a sample with the same seed is changed in the same way."""
    rows = images(6)
    made = task()
    inputs = made.inputs(rows, made.fit(rows))
    seeds = np.arange(100, 106, dtype=np.uint64)
    together = made.augment(inputs, seeds)
    for index in range(6):
        alone = made.augment(inputs[index : index + 1], seeds[index : index + 1])
        assert torch.equal(alone[0], together[index])
    assert not torch.equal(together, inputs.float())
    assert together.min() >= 0
    assert together.max() <= 255


def test_without_augmentation_inputs_stay_as_they_are() -> None:
    rows = images(4)
    made = task(rotate=0.0, scale=0.0, shift=0.0)
    inputs = made.inputs(rows, made.fit(rows))
    assert made.augment(inputs, np.zeros(4, np.uint64)) is inputs


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"clases": 3}, ["task.options.clases", "did you mean 'classes'"]),
        ({"width": 0}, ["task.options.width is 0"]),
        ({"dropout": "half"}, ["task.options.dropout is 'half'"]),
    ],
)
def test_wrong_options_are_named(options: dict[str, object], words: list[str]) -> None:
    with pytest.raises(UsageError) as caught:
        find_task("image_classification", options)
    assert all(word in str(caught.value) for word in words)


def test_an_unknown_task_lists_what_is_installed() -> None:
    with pytest.raises(UsageError, match="'classify': no such task; installed: image_classification"):
        find_task("classify")


def test_a_task_of_another_package_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A package with an entry point in `lepton_ray.tasks` needs nothing else."""
    (tmp_path / "theirs.py").write_text(
        "from lepton_ray.tasks.image_classification import ImageClassification\n"
        "class Theirs(ImageClassification):\n    name = 'theirs'\n"
    )
    info = tmp_path / "theirs-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: theirs\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[lepton_ray.tasks]\ntheirs = theirs:Theirs\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert any(entry.name == "theirs" for entry in importlib.metadata.entry_points(group="lepton_ray.tasks"))
    assert find_task("theirs").name == "theirs"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"label": pa.array([0, 1, -1], pa.int64())}, "label is -1"),
        ({"label": pa.array([0, 1, 7], pa.int64())}, "task.options.classes is 3: the table has label 7"),
        ({"height": pa.array([8, 8, 9], pa.int32())}, "column height holds"),
        ({"image": pa.array([b"x" * 80, b"x" * 80, b"x" * 79], pa.binary())}, "image of row 2 has 79 bytes"),
        ({"image": pa.array([b"x" * 80, None, b"x" * 80], pa.binary())}, "image of row 1 has None bytes"),
    ],
)
def test_rows_that_cannot_be_learnt_from_are_named(change: dict[str, pa.Array], words: str) -> None:
    rows = images(3)
    for name, values in change.items():
        rows = rows.set_column(rows.schema.get_field_index(name), name, values)
    with pytest.raises(UsageError, match=words):
        task(classes=3).fit(rows)


def test_a_table_without_the_columns_is_refused() -> None:
    with pytest.raises(UsageError, match="lacks column image, height, width, channels"):
        task().check_columns(pa.schema({"label": pa.int64()}))


def test_an_image_of_another_size_is_refused() -> None:
    rows = images(4)
    with pytest.raises(UsageError, match=r"image of item 1 has 3 values: expected 80 \(8x10x1\)"):
        task().rows_of([ImageRequest(image=[0] * 80), ImageRequest(image=[1, 2, 3])], task().fit(rows))


def test_weights_must_be_exactly_those_of_the_model() -> None:
    transforms = task().fit(images())
    model = task().build(transforms)
    good = model.state_dict()
    load_weights(model, save(good))
    name = next(iter(good))
    for wrong in (
        {key: value for key, value in good.items() if key != name},
        {**good, "extra": torch.zeros(1)},
        {**good, name: torch.zeros(3, 3)},
        {**good, name: good[name].half()},
    ):
        with pytest.raises(IntegrityError, match="tensor"):
            load_weights(model, save(wrong))
    with pytest.raises(IntegrityError, match="not safetensors"):
        load_weights(model, b"\x00" * 40)
