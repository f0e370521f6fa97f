"""Images as files hold them (PNG, JPEG, ...): what they say of themselves, and their pixels.

The pixel count is looked at before anything is decoded, since a file of some kilobytes may unpack to gigabytes.
Columns of a table: `image` binary (the file's bytes), `encoding` text (`png`, `jpeg`, ...), `height`, `width`,
`channels` int32 (of the decoded pixels).
"""

from __future__ import annotations

import contextlib
import io
import threading
import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image, UnidentifiedImageError

from lepton_ray.data.images import IMAGE_COLUMNS, SHAPE_COLUMNS, UInt8Array
from lepton_ray.errors import UsageError, shown

ENCODING = "encoding"
"""The column that tells encoded images from raw pixels."""
ENCODINGS = {
    ".png": "png",
    ".jpg": "jpeg",
    ".jpeg": "jpeg",
    ".bmp": "bmp",
    ".gif": "gif",
    ".webp": "webp",
    ".tif": "tiff",
    ".tiff": "tiff",
    ".ppm": "ppm",
    ".pgm": "ppm",
}
"""Ending of a file's name -> what must be in it."""
# what counts is the limit in the settings; Pillow's own warning would only stand on the terminal beside it
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
_FORMATS = ("PNG", "JPEG", "BMP", "GIF", "WEBP", "TIFF", "PPM")
_DECODED_AS = {"1": "L", "L": "L", "LA": "RGBA", "P": "RGB", "PA": "RGBA", "RGB": "RGB", "RGBA": "RGBA"}
"""Pillow's mode of a file -> that of the pixels."""
_LARGE_PIXELS = 8_000_000
_ONE_LARGE = threading.Lock()
"""Images of many pixels are decoded one at a time, whatever the number of threads: their memory would add up."""
_CHANNELS = {"L": 1, "RGB": 3, "RGBA": 4}


class ImageFault(Exception):  # noqa: N818 - no error of the program: a finding about one image
    """An image that cannot be used: the rule it breaks, and why."""

    def __init__(self, rule: str, reason: str) -> None:
        super().__init__(f"{rule}: {reason}")
        self.rule, self.reason = rule, reason


@dataclass(frozen=True)
class ImageShape:
    """What an image is once it is decoded."""

    encoding: str
    height: int
    width: int
    channels: int


def image_shape(data: bytes, expected: str | None, max_pixels: int, min_side: int) -> ImageShape:
    """The measures of an encoded image, which is decoded once to see that it can be.

    Args:
        data: the bytes of the file.
        expected: the encoding that its name announces; None where it announces none.
        max_pixels: width times height at most.
        min_side: the shorter side at least, in pixels.

    Raises ImageFault.
    """
    return _opened(data, expected, max_pixels, min_side)[0]


def decode_image(data: bytes, max_pixels: int) -> UInt8Array:
    """The pixels of an encoded image, uint8 [height, width, channels] with 1, 3 or 4 channels. Raises ImageFault.

    Orientation tags are left alone, as annotations of boxes are made on the pixels as they are stored.
    """
    pixels = np.asarray(_opened(data, None, max_pixels, 1)[1], np.uint8)
    return pixels if pixels.ndim == 3 else pixels[:, :, None]


def is_encoded_image_table(schema: pa.Schema) -> bool:
    """Whether rows of this schema hold images as files hold them."""
    return all(name in schema.names for name in (*IMAGE_COLUMNS, ENCODING))


def decoded_images(rows: pa.Table, max_pixels: int) -> pa.Table:
    """A table of encoded images as one of raw pixels (see `images`), without the column `encoding`.

    Raises UsageError naming the row of an image that cannot be decoded or is not of the size that its row says.
    """
    if not is_encoded_image_table(rows.schema):
        return rows
    pixels = []
    shapes = zip(*(rows[name].to_pylist() for name in SHAPE_COLUMNS), strict=True)
    for index, (data, shape) in enumerate(zip(rows["image"], shapes, strict=True)):
        try:
            image = decode_image(data.as_py(), max_pixels)
        except ImageFault as fault:
            raise UsageError(f"image of row {index}: {fault}; clean the table") from fault
        if image.shape != shape:
            raise UsageError(f"image of row {index} is {image.shape}; its row says {shape}; clean the table")
        pixels.append(image.tobytes())
    place = rows.column_names.index("image")
    return rows.set_column(place, "image", pa.array(pixels, pa.binary())).drop_columns([ENCODING])


def _opened(data: bytes, expected: str | None, max_pixels: int, min_side: int) -> tuple[ImageShape, Any]:
    """The measures and the decoded image."""
    try:
        with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
            shape = _judged(image, expected, max_pixels, min_side)
            large = image.width * image.height > _LARGE_PIXELS
            with _ONE_LARGE if large else contextlib.nullcontext():
                image.load()
            mode = "RGBA" if image.mode == "P" and "transparency" in image.info else _DECODED_AS[image.mode]
            decoded = image if image.mode == mode else image.convert(mode)
            return ImageShape(shape.encoding, image.height, image.width, _CHANNELS[mode]), decoded
    except UnidentifiedImageError as error:
        raise ImageFault("no image", f"begins with {data[:8]!r}; expected {', '.join(ENCODINGS)}") from error
    except Image.DecompressionBombError as error:
        raise ImageFault("image too large", shown(str(error), 120)) from error
    except (OSError, ValueError, SyntaxError, EOFError, IndexError, TypeError, MemoryError) as error:
        reason = shown(" ".join(str(error).split()) or type(error).__name__, 120)
        raise ImageFault("image cannot be decoded", reason) from error


def _judged(image: Any, expected: str | None, max_pixels: int, min_side: int) -> ImageShape:
    """What the header says; ImageFault before anything is decoded."""
    encoding = "jpeg" if image.format == "MPO" else str(image.format).lower()
    if image.width * image.height > max_pixels:
        size = f"{image.width}x{image.height}"
        raise ImageFault("image too large", f"{size} pixels; expected at most {max_pixels} (limit max_pixels)")
    if min(image.width, image.height) < min_side:
        reason = f"{image.width}x{image.height} pixels; expected sides of {min_side} or more (limit min_side)"
        raise ImageFault("image too small", reason)
    if expected is not None and encoding != expected:
        raise ImageFault("wrong ending", f"named as {expected}, holds {encoding}; rename the file")
    if getattr(image, "n_frames", 1) > 1 and image.format != "MPO":
        raise ImageFault("animated image", f"{image.n_frames} frames; expected one")
    if image.mode not in _DECODED_AS:
        raise ImageFault("colours", f"mode {image.mode}; expected grey, RGB, RGBA or a palette; convert it")
    return ImageShape(encoding, image.height, image.width, 0)
