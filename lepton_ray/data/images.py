"""Image tables: raw pixels in a binary column, one image per row.

Columns: `key` string, `image` binary (uint8, row-major, height x width x channels bytes), `height`, `width`,
`channels` int32, `label` int64, and whatever else a source gives.
"""

from __future__ import annotations

import math
import re

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from lepton_ray.errors import UsageError, shown

UInt8Array = npt.NDArray[np.uint8]

SHAPE_COLUMNS = ("height", "width", "channels")
IMAGE_COLUMNS = ("image", *SHAPE_COLUMNS)
"""What makes a table an image table."""

_PIXEL_NAME = re.compile(r"pixel_?(\d{1,7})")


def is_image_table(schema: pa.Schema) -> bool:
    """Whether rows of this schema hold raw pixels; images as files hold them come with a column `encoding`."""
    return all(name in schema.names for name in IMAGE_COLUMNS) and "encoding" not in schema.names


def pack_images(pixels: UInt8Array) -> dict[str, pa.Array]:
    """The image columns of a stack of images of one size.

    Args:
        pixels: uint8 of shape [images, height, width] or [images, height, width, channels]; under 2 GiB.

    Returns:
        The columns `image`, `height`, `width` and `channels`, each of length images.
    """
    count, height, width = pixels.shape[:3]
    channels = pixels.shape[3] if pixels.ndim == 4 else 1
    size = height * width * channels
    if count * size >= 2**31:
        raise UsageError(f"{count} images of {size} bytes: more than 2 GiB at once; pack them in smaller stacks")
    offsets = np.arange(0, (count + 1) * size, size, dtype=np.int32) if size else np.zeros(count + 1, np.int32)
    buffers = [None, pa.py_buffer(offsets), pa.py_buffer(np.ascontiguousarray(pixels))]
    columns = {"image": pa.Array.from_buffers(pa.binary(), count, buffers)}
    for name, value in zip(SHAPE_COLUMNS, (height, width, channels), strict=True):
        columns[name] = pa.array(np.full(count, value, np.int32))
    return columns


def unpack_images(rows: pa.Table) -> UInt8Array:
    """The pixels of the rows of an image table whose images are all of one size.

    Returns:
        uint8 of shape [rows, height, width, channels]; read-only where no copy was needed.

    Raises UsageError where sizes differ or the bytes do not fit them.
    """
    if not is_image_table(rows.schema):
        raise UsageError(f"columns {', '.join(rows.column_names)}: no image table; it needs {', '.join(IMAGE_COLUMNS)}")
    if rows.num_rows == 0:
        raise UsageError("no rows: the size of the images is unknown")
    shape = []
    for name in SHAPE_COLUMNS:
        sizes = pc.unique(rows[name]).to_pylist()
        if len(sizes) != 1 or sizes[0] is None or sizes[0] < 1:
            raise UsageError(f"column {name}: {shown(sizes)}; expected one size for all images")
        shape.append(sizes[0])
    size = math.prod(shape)
    stacks = []
    for chunk in rows["image"].chunks:
        lengths = pc.unique(pc.binary_length(chunk)).to_pylist()
        if len(chunk) and lengths != [size]:
            raise UsageError(f"column image: values of {shown(lengths)} bytes; expected {size} = {shape} in each row")
        if len(chunk):
            stacks.append(_bytes_of(chunk).reshape(len(chunk), *shape))
    return stacks[0] if len(stacks) == 1 else np.concatenate(stacks)


def _bytes_of(values: pa.Array) -> UInt8Array:
    """All bytes of a binary array without nulls, in order, as a view."""
    wide = pa.types.is_large_binary(values.type)
    offsets = np.frombuffer(values.buffers()[1], np.int64 if wide else np.int32)
    first, last = offsets[values.offset], offsets[values.offset + len(values)]
    return np.frombuffer(values.buffers()[2], np.uint8)[first:last]


def pixel_columns(names: list[str]) -> list[str]:
    """The columns `pixel0`, `pixel1`, ... (or `pixel_0`, or counted from 1) in pixel order; [] where there are none.

    Raises UsageError where such columns have a gap or are no square image.
    """
    found = {int(match[1]): name for name in names if (match := _PIXEL_NAME.fullmatch(name))}
    if not found:
        return []
    numbers = sorted(found)
    side = math.isqrt(len(numbers))
    if numbers != list(range(numbers[0], numbers[0] + len(numbers))) or numbers[0] > 1 or side * side != len(numbers):
        raise UsageError(
            f"{len(numbers)} pixel columns from {found[numbers[0]]} to {found[numbers[-1]]}: expected a square number "
            "of them, counted from 0 or 1 without a gap; rename the columns if they are no pixels"
        )
    return [found[number] for number in numbers]


def pack_pixel_columns(rows: pa.Table) -> pa.Table:
    """A table with its `pixel<n>` columns replaced by the image columns; other tables unchanged.

    Pixels are whole numbers 0 to 255 of a square image with one channel, row by row. A row with a missing pixel gets
    no image (null). Raises UsageError for other values.
    """
    names = pixel_columns(rows.column_names)
    if not names:
        return rows
    side = math.isqrt(len(names))
    pixels = np.empty((rows.num_rows, len(names)), np.uint8)
    missing = np.zeros(rows.num_rows, bool)
    for index, name in enumerate(names):
        column = rows[name]
        if column.null_count:
            missing |= column.is_null().to_numpy()
            column = column.fill_null(0) if not pa.types.is_null(column.type) else pa.repeat(0, rows.num_rows)
        try:
            pixels[:, index] = column.cast(pa.uint8()).to_numpy()
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
            raise UsageError(f"column {name}: {shown(str(error), 120)}; expected whole numbers 0 to 255") from error
    packed = pack_images(pixels.reshape(rows.num_rows, side, side))
    if missing.any():
        packed["image"] = pc.if_else(pa.array(missing), pa.scalar(None, pa.binary()), packed["image"])
    rest = rows.drop_columns(names)
    for position, (name, values) in enumerate(packed.items()):
        rest = rest.add_column(position, name, values)
    return rest
