"""Pixels go into the image columns and come out unchanged."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from lepton_ray.data.images import is_image_table, pack_images, pack_pixel_columns, unpack_images
from lepton_ray.errors import UsageError

RANDOM = np.random.default_rng(0)


@pytest.mark.parametrize("shape", [(5, 4, 3), (5, 4, 3, 1), (2, 8, 8, 3), (1, 1, 1)])
def test_images_come_back_as_they_went(shape):
    """Height, width and channels in row-major order, also after slicing and chunking."""
    pixels = RANDOM.integers(0, 256, shape, np.uint8)
    table = pa.table(pack_images(pixels))
    assert is_image_table(table.schema)
    expected = pixels.reshape(*shape[:3], -1)
    assert np.array_equal(unpack_images(table), expected)
    assert np.array_equal(unpack_images(table.slice(1 if len(pixels) > 1 else 0)), expected[-max(1, shape[0] - 1) :])
    assert np.array_equal(unpack_images(pa.concat_tables([table, table])), np.concatenate([expected] * 2))


def test_images_of_several_sizes_are_refused():
    """A batch is one array, so the fault is told by column before anything is reshaped."""
    tables = [pa.table(pack_images(np.zeros((1, 2, width), np.uint8))) for width in (2, 3)]
    with pytest.raises(UsageError, match="column width"):
        unpack_images(pa.concat_tables(tables))
    short = tables[0].set_column(0, "image", pa.array([b"abc"]))
    with pytest.raises(UsageError, match="expected 4"):
        unpack_images(short)
    missing = tables[0].set_column(0, "image", pa.array([None], pa.binary()))
    with pytest.raises(UsageError, match="expected 4"):
        unpack_images(missing)


@pytest.mark.parametrize("rows", [pa.table({"x": [1]}), pa.table(pack_images(np.zeros((0, 2, 2), np.uint8)))])
def test_no_images_to_unpack(rows):
    """A table of another kind, or none at all."""
    with pytest.raises(UsageError):
        unpack_images(rows)


@pytest.mark.parametrize("name", ["pixel{}", "pixel_{}"])
@pytest.mark.parametrize("first", [0, 1])
def test_pixel_columns_become_one_image(name, first):
    """The layout of the CSV files that digits are passed around in; a column's place in the file does not matter."""
    values = np.array([[1, 2, 3, 255], [0, 9, 8, 7]], np.int64)
    columns = {name.format(index + first): values[:, index] for index in (2, 0, 3, 1)}
    packed = pack_pixel_columns(pa.table({"label": [3, 4], **columns}))
    assert packed.column_names == ["image", "height", "width", "channels", "label"]
    assert np.array_equal(unpack_images(packed).reshape(2, 4), values)


def test_row_with_a_missing_pixel_has_no_image():
    """Cleaning then counts the row as one with a missing value."""
    packed = pack_pixel_columns(pa.table({"pixel0": [1, None, 3], "label": [0, 1, 2]}))
    assert packed["image"].to_pylist() == [b"\1", None, b"\3"]


@pytest.mark.parametrize(
    "columns",
    [
        {"pixel0": [256]},
        {"pixel0": [-1]},
        {"pixel0": [0.5]},
        {"pixel0": ["x"]},
        {"pixel0": [1], "pixel1": [1]},
        {"pixel0": [1], "pixel2": [1], "pixel3": [1], "pixel4": [1]},
        {"pixel7": [1]},
    ],
)
def test_columns_that_are_no_pixels_are_named(columns):
    """Values out of range, and columns that make no square image."""
    with pytest.raises(UsageError, match="pixel"):
        pack_pixel_columns(pa.table(columns))


def test_other_tables_stay_as_they_are():
    """No copy, no change."""
    table = pa.table({"pixels": [1], "pixel": [2], "a_pixel1": [3]})
    assert pack_pixel_columns(table) is table
