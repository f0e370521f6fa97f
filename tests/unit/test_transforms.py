"""Transforms: what each step makes of values, the same for one row as for many, learnt alike wherever they are."""

from __future__ import annotations

import io
import json
import wave
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from PIL import Image

from lepton_ray.data import transforms
from lepton_ray.data.split import split_rows
from lepton_ray.data.tables import ingest, open_table
from lepton_ray.data.transforms import InMemory, Pipeline, matrix, training_pieces
from lepton_ray.data.transforms.media_steps import mel_bands
from lepton_ray.data.transforms.text_steps import vocabulary_size
from lepton_ray.data.wav import decode_wav, resampled
from lepton_ray.errors import IntegrityError, LeptonError, UsageError
from lepton_ray.settings import SplitSettings
from lepton_ray.settings.transforms import parse_transforms
from lepton_ray.storage import Store

TEXTS = ("a small cat", "a large dog", "the dog and the cat", "Größe zählt", "!!", "the")


def fitted(rows: pa.Table, *steps: dict[str, Any]) -> Pipeline:
    return Pipeline.fit(parse_transforms(list(steps)), rows)


def wav(samples: np.ndarray[Any, Any], rate: int = 8000, width: int = 2) -> bytes:
    """A recording of one channel; samples from -1 to 1."""
    out = io.BytesIO()
    with wave.open(out, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(width)
        file.setframerate(rate)
        whole = np.rint(samples * (2 ** (8 * width - 1) - 1)).astype("<i4")
        file.writeframes(whole.view(np.uint8).reshape(-1, 4)[:, :width].tobytes())
    return out.getvalue()


def png(pixels: np.ndarray[Any, Any]) -> bytes:
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()


def mixed(count: int, seed: int = 0) -> pa.Table:
    """Rows with a column for every step."""
    random = np.random.default_rng(seed)
    pixels = random.integers(0, 256, (count, 6, 4, 3), np.uint8)
    tones = [np.sin(np.arange(900 + 50 * (row % 7)) * 0.05 * (1 + row % 5)) for row in range(count)]
    return pa.table({
        "a": pa.array(random.normal(5, 3, count)),
        "b": pa.array([None if value == 3 else int(value) for value in random.integers(0, 50, count)], pa.int32()),
        "c": pa.array(random.exponential(2.0, count).astype(np.float32)),
        "colour": pa.array([None if row % 11 == 10 else ("red", "green", "blue")[row % 3] for row in range(count)]),
        "town": pa.array([f"town {row % 13}" for row in range(count)]),
        "size": pa.array(random.integers(0, 4, count)),
        "text": pa.array([TEXTS[row % len(TEXTS)] for row in range(count)]),
        "image": pa.array([png(each) for each in pixels], pa.binary()),
        "encoding": pa.array(["png"] * count),
        "height": pa.array([6] * count, pa.int32()), "width": pa.array([4] * count, pa.int32()),
        "channels": pa.array([3] * count, pa.int32()),
        "audio": pa.array([wav(tone * 0.5) for tone in tones], pa.binary()),
    })  # fmt: skip


EVERY_STEP: tuple[dict[str, Any], ...] = (
    {"impute": {"columns": ["b"], "fill": "median", "indicator": True}},
    {"standardise": {"columns": ["a", "b"]}},
    {"robust": {"columns": ["c"]}},
    {"min_max": {"columns": ["c"], "low": -1.0, "high": 1.0}},
    {"one_hot": {"columns": ["colour"]}},
    {"ordinal": {"columns": ["size"]}},
    {"hashing": {"columns": ["town"], "buckets": 8}},
    {"tokenise": {"column": "text", "vocabulary": 64, "length": 12}},
    {"image": {"height": 5, "width": 5}},
    {"log_mel": {"column": "audio", "rate": 16000, "mels": 20, "max_s": 0.5}},
)
ROWS = mixed(120)
EVERY = fitted(ROWS, *EVERY_STEP)


@hypothesis_settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 119), min_size=1, max_size=9))
def test_a_row_becomes_bit_for_bit_the_same_alone_and_among_others(chosen: list[int]) -> None:
    together = EVERY.apply(ROWS.take(chosen))
    for place, row in enumerate(chosen):
        alone = EVERY.apply(ROWS.slice(row, 1))
        assert alone.schema == together.schema
        for name in alone.column_names:
            assert bits(alone[name].combine_chunks()) == bits(together[name].combine_chunks().slice(place, 1)), name


def bits(values: pa.Array) -> Any:
    """What is in a column, to the last bit."""
    if pa.types.is_fixed_size_list(values.type):
        values = values.flatten()
    if pa.types.is_floating(values.type):
        return values.to_numpy(zero_copy_only=False).tobytes()
    return values.to_pylist()


def test_what_is_read_back_from_json_does_the_same() -> None:
    again = Pipeline.parse(json.loads(json.dumps(EVERY.to_json())))
    assert again.to_json() == EVERY.to_json()
    assert again.apply(ROWS).equals(EVERY.apply(ROWS))


def test_numbers_are_scaled_as_the_formulas_say() -> None:
    values = np.array([1.0, 2.0, 4.0, 10.0])
    rows = pa.table(dict.fromkeys(("s", "m", "r"), values))
    made = fitted(rows, {"standardise": {"columns": ["s"]}}, {"min_max": {"columns": ["m"], "low": 2.0, "high": 4.0}},
                  {"robust": {"columns": ["r"]}}).apply(rows)  # fmt: skip
    low, middle, high = np.percentile(values, (25, 50, 75))
    np.testing.assert_allclose(made["s"], (values - values.mean()) / values.std(), rtol=1e-15)
    np.testing.assert_allclose(made["m"], 2 + 2 * (values - 1) / 9, rtol=1e-15)
    np.testing.assert_allclose(made["r"], (values - middle) / (high - low), rtol=1e-15)


def test_a_column_of_one_value_becomes_zero_and_a_range_can_clip() -> None:
    rows = pa.table({"same": [7, 7, 7], "x": [0.0, 5.0, 10.0]})
    pipeline = fitted(rows, {"standardise": {"columns": ["same"]}}, {"min_max": {"columns": ["x"], "clip": True}})
    made = pipeline.apply(pa.table({"same": [7, 8], "x": [-3.0, 30.0]}))
    assert made["same"].to_pylist() == [0.0, 1.0]
    assert made["x"].to_pylist() == [0.0, 1.0]


@pytest.mark.parametrize(
    ("fill", "expected"),
    [("mean", 4.0), ("median", 2.0), ("most_frequent", 1.0), ("constant", -1.0)],
)
def test_a_missing_number_is_filled_and_told(fill: str, expected: float) -> None:
    rows = pa.table({"x": pa.array([1, None, 1, 2, None, 4, 12], pa.int64())})
    told: dict[str, Any] = {"columns": ["x"], "fill": fill, "indicator": True}
    if fill == "constant":
        told["value"] = -1
    made = fitted(rows, {"impute": told}).apply(rows)
    assert made["x"].to_pylist()[1] == expected
    assert made["x"].type == pa.float64()
    assert made["x_missing"].to_pylist() == [0, 1, 0, 0, 1, 0, 0]


def test_scaling_learns_from_what_the_steps_before_made() -> None:
    """The mean of a column whose missing values are the median by then, which is learnt first."""
    rows = pa.table({"x": pa.array([2.0, None, 4.0, None, 99.0])})
    made = fitted(rows, {"impute": {"columns": ["x"]}}, {"standardise": {"columns": ["x"]}}).apply(rows)
    filled = np.array([2.0, 4.0, 4.0, 4.0, 99.0])
    np.testing.assert_allclose(made["x"], (filled - filled.mean()) / filled.std())


def test_categories_that_were_not_learnt_have_a_place_of_their_own() -> None:
    rows = pa.table({"c": ["b", "a", "b", "rare"], "o": [10, 20, 20, 30], "f": [True, False, None, True]})
    pipeline = fitted(rows, {"one_hot": {"columns": ["c"], "min_rows": 1, "max_values": 2}},
                      {"ordinal": {"columns": ["o", "f"]}})  # fmt: skip
    made = pipeline.apply(
        pa.table({"c": ["a", "b", "new", None], "o": [30, 10, 99, None], "f": [None, True, False, True]})
    )
    assert made["c"].to_pylist() == [[1.0, 0.0], [0.0, 1.0], [0.0, 0.0], [0.0, 0.0]]
    assert made["o"].to_pylist() == [3, 1, 0, 0]
    assert made["f"].to_pylist() == [0, 2, 1, 2]


def test_hashing_learns_nothing_and_knows_new_values() -> None:
    pipeline = fitted(pa.table({"t": ["x"], "u": ["x"]}), {"hashing": {"columns": ["t", "u"], "buckets": 1000}})
    towns = [f"town {n}" for n in range(500)]
    made = pipeline.apply(pa.table({"t": [*towns, None], "u": [*towns, None]}))
    found = np.array(made["t"].to_pylist())
    assert found[-1] == 0
    assert found[:-1].min() >= 1
    assert found.max() <= 1000
    assert len(set(found.tolist())) > 350, "500 values in 1,000 buckets"
    assert found[:-1].tolist() != made["u"].to_pylist()[:-1], "columns share no hash"


@pytest.mark.parametrize("kind", ["bpe", "wordpiece"])
def test_a_tokenizer_is_learnt_from_the_training_rows(kind: str) -> None:
    rows = pa.table({"text": ["low lower lowest slow"] * 40 + ["new newer newest"] * 40})
    told = {"tokenise": {"column": "text", "kind": kind, "vocabulary": 64, "length": 6}}
    pipeline = fitted(rows, told)
    made = pipeline.apply(pa.table({"text": ["LOW lower", "", "new " * 50, "Ω"]}))["text"].to_pylist()
    size = vocabulary_size(pipeline.learnt[0])  # type: ignore[arg-type] # what tokenise learns
    assert made[0][0] == pipeline.apply(pa.table({"text": ["low"]}))["text"].to_pylist()[0][0], "case does not count"
    assert made[1] == [0] * 6, "an empty text is padding"
    assert 0 not in made[2], "cut at the length"
    assert made[3][0] == 1, "what was never seen is the unknown token"
    assert max(max(each) for each in made) < size <= 66
    assert pipeline.to_json() == fitted(rows, told).to_json(), "the same rows give the same tokenizer"


def test_a_tokenizer_file_is_kept_and_not_needed_again(tmp_path: Path) -> None:
    rows = pa.table({"text": ["one two three"] * 5})
    learnt = fitted(rows, {"tokenise": {"column": "text", "vocabulary": 64, "length": 4}})
    path = tmp_path / "tokenizer.json"
    path.write_text(learnt.learnt[0].tokenizer)  # type: ignore[attr-defined] # what tokenise learns
    told = {"tokenise": {"column": "text", "kind": "file", "tokenizer": str(path), "length": 4}}
    pipeline = fitted(rows, told)
    path.unlink()
    again = Pipeline.parse(json.loads(json.dumps(pipeline.to_json())))
    assert again.apply(rows)["text"].to_pylist() == learnt.apply(rows)["text"].to_pylist()
    path.write_text("{}")
    with pytest.raises(UsageError, match=r"tokenise\.tokenizer .* no usable tokenizer\.json"):
        fitted(rows, told)


def test_images_are_sized_and_normalised_by_what_the_training_images_are() -> None:
    random = np.random.default_rng(1)
    pixels = random.integers(0, 256, (9, 8, 8, 3), np.uint8)
    shape = {"height": [8] * 9, "width": [8] * 9, "channels": [3] * 9}
    rows = pa.table({"image": pa.array([each.tobytes() for each in pixels], pa.binary()), **shape})
    made = matrix(fitted(rows, {"image": {"height": 8, "width": 8}}).apply(rows), ["image"])
    channels = made.reshape(9, 3, 8, 8)
    np.testing.assert_allclose(channels.mean((0, 2, 3)), 0, atol=1e-6)
    np.testing.assert_allclose(channels.std((0, 2, 3)), 1, atol=1e-6)
    plain = {"image": {"height": 4, "width": 2, "channels": 1, "normalise": False}}
    grey = matrix(fitted(rows, plain).apply(rows), ["image"])
    assert grey.shape == (9, 8)
    assert 0.3 < grey.mean() < 0.7


def test_a_tone_is_in_its_mel_band_and_stays_there_at_another_rate() -> None:
    hertz, bands = 1000.0, mel_bands(16000, 512, 40)
    expected = int(np.argmax(bands[round(hertz / 16000 * 512)]))
    step = {"log_mel": {"column": "audio", "rate": 16000, "mels": 40, "max_s": 1.0, "normalise": False}}
    for rate in (8000, 16000, 44100):
        tone = 0.5 * np.sin(2 * np.pi * hertz * np.arange(rate // 2) / rate)
        rows = pa.table({"audio": pa.array([wav(tone, rate)], pa.binary())})
        made = fitted(rows, step).apply(rows)
        frames = made["audio_frames"][0].as_py()
        features = matrix(made, ["audio"]).reshape(-1, 40)
        assert frames == pytest.approx(48, abs=1)
        assert set(features[2 : frames - 2].argmax(1).tolist()) == {expected}
        assert not features[frames:].any()


@pytest.mark.parametrize("width", [1, 2, 3, 4])
def test_samples_of_any_width_are_read(width: int) -> None:
    tone = 0.5 * np.sin(np.arange(400) * 0.1)
    data = wav(tone, width=width)
    if width == 1:  # eight bits are unsigned in WAV
        data = data[:44] + bytes((value + 128) % 256 for value in data[44:])
    samples, rate = decode_wav(data)
    assert rate == 8000
    np.testing.assert_allclose(samples[:, 0], tone, atol=2.0 ** (2 - 8 * width))


def test_resampling_keeps_a_tone() -> None:
    there = np.sin(2 * np.pi * 440 * np.arange(16000) / 16000)
    made = resampled(there, 16000, 11025)
    assert len(made) == 11025
    expected = np.sin(2 * np.pi * 440 * np.arange(11025) / 11025)
    np.testing.assert_allclose(made[500:-500], expected[500:-500], atol=0.03)


class Counted(InMemory):
    """Pieces of ten rows that count how often they are read."""

    reads: list[tuple[int, tuple[str, ...]]] = []  # noqa: RUF012 - one for the test

    def count(self) -> int:
        return -(-self.rows.num_rows // 10)

    def read(self, index: int, columns: Sequence[str]) -> pa.Table:
        self.reads.append((index, tuple(columns)))
        return self.rows.select(list(columns)).slice(index * 10, 10).combine_chunks()


def test_steps_that_do_not_need_each_other_share_one_look_at_the_rows() -> None:
    steps = parse_transforms([
        {"standardise": {"columns": ["a"]}}, {"ordinal": {"columns": ["size"]}}, {"one_hot": {"columns": ["colour"]}},
        {"tokenise": {"column": "text", "vocabulary": 64}},
    ])  # fmt: skip
    Counted.reads.clear()
    Pipeline.fit(steps, Counted(ROWS))
    assert sorted(Counted.reads) == [(index, ("a", "colour", "size", "text")) for index in range(12)], "each piece once"


def test_what_is_learnt_does_not_depend_on_where_the_rows_lie(file_store: Store) -> None:
    """From the data files of a stored table and from memory: to the last bit, but for means, folded piece by piece."""
    rows = ROWS.append_column("key", pa.array([f"k{n}" for n in range(120)])).append_column("label", ROWS["size"])
    for start in range(0, 120, 40):
        ingest(file_store, "mixed", rows.slice(start, 40), mode="append" if start else "create")
    table = open_table(file_store, "mixed")
    train = split_rows(table.read(), SplitSettings()).train
    pieces = training_pieces(file_store, table, train)
    assert pieces.count() == 3
    told = parse_transforms(list(EVERY_STEP))
    here, stored = (Pipeline.fit(told, source) for source in (table.read().take(pa.array(train)), pieces))
    for one, other in zip(here.to_json()["steps"], stored.to_json()["steps"], strict=True):
        if "standardise" not in one["step"]:
            assert one == other
    np.testing.assert_allclose(
        matrix(here.apply(table.read()), ["a", "b"]), matrix(stored.apply(table.read()), ["a", "b"]), rtol=1e-6
    )


@pytest.mark.parametrize(
    ("steps", "says"),
    [
        ([{"standardise": {"columns": ["nothing"]}}], "steps.0.standardise: no column 'nothing'"),
        ([{"standardise": {"columns": ["text"]}}], "column 'text' holds string; expected number"),
        ([{"one_hot": {"columns": ["a"]}}], "column 'a' holds double; expected text, whole numbers or bool"),
        ([{"standardise": {"columns": ["b"]}}, {"min_max": {"columns": ["b"]}}], "'b' of row"),
        ([{"impute": {"columns": ["b"], "fill": "constant", "value": "x"}}], "value 'x' is none"),
        ([{"one_hot": {"columns": ["town"], "min_rows": 500}}], "no value of column 'town' has 500 rows"),
        ([{"image": {"height": 5, "width": 5, "max_pixels": 20}}], "image of row 0"),
        ([{"log_mel": {"max_s": 0.01}}], "expected at most 0.01 (max_s)"),
    ],
)
def test_what_cannot_be_learnt_is_told_in_one_line(steps: list[dict[str, Any]], says: str) -> None:
    with pytest.raises(UsageError) as told:
        fitted(ROWS, *steps).apply(ROWS)
    assert says in str(told.value)
    assert "\n" not in str(told.value)


@pytest.mark.parametrize(
    ("steps", "says"),
    [
        ([{"standardize": {"columns": ["a"]}}], "standardise"),
        ([{"standardise": {}}], "columns"),
        ([{"impute": {"columns": ["a"], "value": 1}}], "value goes with fill: constant"),
        ([{"min_max": {"columns": ["a"], "low": 1.0, "high": 1.0}}], "low must be below high"),
        ([{"standardise": {"columns": ["a"]}, "robust": {"columns": ["a"]}}], "a step is one key"),
        ([{"tokenise": {"column": "t", "kind": "file"}}], "tokenizer goes with kind: file"),
    ],
)
def test_wrong_settings_are_told_before_anything_is_read(steps: list[dict[str, Any]], says: str) -> None:
    with pytest.raises(UsageError) as told:
        parse_transforms(steps)
    assert says in str(told.value)


def test_rows_that_do_not_fit_are_refused_not_cast() -> None:
    rows = pa.table({"x": [1.0, 2.0], "c": ["a", "b"]})
    pipeline = fitted(rows, {"standardise": {"columns": ["x"]}}, {"ordinal": {"columns": ["c"]}})
    with pytest.raises(UsageError, match="column 'x' holds string; the transforms were fitted to number"):
        pipeline.apply(pa.table({"x": ["1.0"], "c": ["a"]}))
    with pytest.raises(UsageError, match="no column 'c': the transforms were fitted to"):
        pipeline.apply(pa.table({"x": [1.0]}))
    with pytest.raises(UsageError, match="'x' of row 1 is missing; expected a number: put an impute step"):
        pipeline.apply(pa.table({"x": [1.0, None], "c": ["a", "a"]}))
    with pytest.raises(UsageError, match="'x' of row 0 is inf"):
        pipeline.apply(pa.table({"x": [float("inf")], "c": ["a"]}))
    with pytest.raises(UsageError, match="scale it down or give it as float"):
        pipeline.apply(pa.table({"x": pa.array([2**60 + 1], pa.int64()), "c": ["a"]}))


@pytest.mark.parametrize(
    "damage",
    [
        lambda told: told.pop("steps"),
        lambda told: told["steps"][1]["learnt"]["columns"].pop("a"),
        lambda told: told["steps"][1]["learnt"]["columns"]["a"].update(width="wide"),
        lambda told: told["steps"][1]["learnt"].update(more=1),
        lambda told: told["steps"].__setitem__(0, {"step": {"explode": {}}, "learnt": {}}),
        lambda told: told.update(schema_version=0),
    ],
)
def test_a_damaged_pipeline_is_refused(damage: Any) -> None:
    told = json.loads(json.dumps(EVERY.to_json()))
    damage(told)
    with pytest.raises(IntegrityError, match="no fitted transforms"):
        Pipeline.parse(told)


def test_a_newer_form_is_refused_with_what_to_do() -> None:
    with pytest.raises(
        UsageError, match="schema_version is 2; this version of lepton-ray reads up to 1: install a newer"
    ):
        Pipeline.parse({**EVERY.to_json(), "schema_version": 2})


def test_values_too_far_apart_are_told() -> None:
    rows = pa.table({"x": [1e308, -1e308, 1e308]})
    with pytest.raises(LeptonError, match="spreads too far"):
        fitted(rows, {"min_max": {"columns": ["x"]}})


def test_the_door_has_what_people_need() -> None:
    assert set(transforms.__all__) == {"InMemory", "Pipeline", "Stored", "matrix", "training_pieces"}
