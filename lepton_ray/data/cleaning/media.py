"""Images and recordings in binary columns: whether they can be decoded, and a hash of what an image looks like.

The perceptual hash is that of Zauner ("Implementation and benchmarking of perceptual image hash functions", 2010):
the 8 x 8 lowest frequencies of a cosine transform of the image at 32 x 32 grey pixels, each above or below their
median. The package imagehash does the same one image at a time on top of scipy; here a stack of raw images is hashed
in a few matrix products.
"""

from __future__ import annotations

import io
import wave
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from lepton_ray.data.audio import wav_shape
from lepton_ray.data.images import SHAPE_COLUMNS, UInt8Array
from lepton_ray.errors import UsageError

UInt64Array = npt.NDArray[np.uint64]
Float64Array = npt.NDArray[np.float64]

MAX_SIDE = 65_536
_SIDE, _LOW = 32, 8


def raw_faults(rows: pa.Table, max_pixels: int) -> Iterator[tuple[str, Any]]:
    """What can be wrong with the raw pixels of an image table, and a mask (or null) for each row."""
    sizes = [rows[name].cast(pa.int64()) for name in SHAPE_COLUMNS]
    within = [pc.and_(pc.greater_equal(size, 1), pc.less_equal(size, MAX_SIDE)) for size in sizes]
    for name, fits in zip(SHAPE_COLUMNS, within, strict=True):
        yield f"{name} outside 1 to {MAX_SIDE}", pc.invert(fits)
    safe = [pc.if_else(pc.fill_null(fits, False), size, 0) for fits, size in zip(within, sizes, strict=True)]
    pixels = pc.multiply(safe[0], safe[1])
    yield f"more than {max_pixels} pixels", pc.greater(pixels, max_pixels)
    yield (
        "length is not height x width x channels",
        pc.not_equal(pc.binary_length(rows["image"]).cast(pa.int64()), pc.multiply(pixels, safe[2])),
    )


def faults(values: pa.Array, kind: str, max_pixels: int) -> list[str | None]:
    """Why each value cannot be read, None where it can; a missing value is no fault of this kind."""
    return [
        None if value is None else _image_fault(value, max_pixels) if kind == "image" else _audio_fault(value)
        for value in values.to_pylist()
    ]


def _image_fault(data: bytes, max_pixels: int) -> str | None:
    from PIL import Image

    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None  # ours is checked before anything is decoded
    try:
        with Image.open(io.BytesIO(data)) as image:
            width, height = image.size
            if width * height > max_pixels:
                return f"image of more than {max_pixels} pixels"
            image.load()
    except Exception:  # noqa: BLE001 - the many decoders raise what they like; any of it says that it cannot be read
        return "no image that can be read"
    finally:
        Image.MAX_IMAGE_PIXELS = limit
    return None


def _audio_fault(data: bytes) -> str | None:
    if data[:4] != b"RIFF":
        return _other_audio_fault(data)
    try:
        with wave.open(io.BytesIO(data)) as sound:
            frames, size = sound.getnframes(), sound.getsampwidth() * sound.getnchannels()
            if frames == 0:
                return "recording without a sample"
            if len(sound.readframes(frames)) != frames * size:
                return "recording cut off"
    except EOFError:
        return "no recording that can be read"
    except wave.Error:  # float, A-law and mu-law, which Python's own reader does not know
        try:
            wav_shape(data)
        except ValueError:
            return "no recording that can be read"
    return None


def _other_audio_fault(data: bytes) -> str | None:
    """FLAC, Ogg and MP3 where the package soundfile is there."""
    if data[:4] not in (b"fLaC", b"OggS") and data[:3] != b"ID3" and data[:2] not in (b"\xff\xfb", b"\xff\xf3"):
        return "no recording that can be read"
    try:
        import soundfile  # type: ignore[import-not-found, import-untyped, unused-ignore] # no dependency of ours
    except ImportError as error:
        raise UsageError("readable: FLAC, Ogg and MP3 need the package soundfile; install it, or keep WAV") from error
    try:
        with soundfile.SoundFile(io.BytesIO(data)) as sound:
            return None if len(sound.read(dtype="int16")) else "recording without a sample"
    except Exception:  # noqa: BLE001 - as for images
        return "no recording that can be read"


def image_hashes(rows: pa.Table, column: str, raw: bool) -> tuple[UInt64Array, npt.NDArray[np.bool_]]:
    """The perceptual hash of each image, and which rows have one (the others are missing or cannot be read).

    Args:
        rows: with the column, and the shape columns for raw pixels.
        column: of bytes.
        raw: whether the bytes are the pixels of an image table; otherwise an encoded image.
    """
    grey = np.zeros((rows.num_rows, _SIDE, _SIDE))
    known = np.zeros(rows.num_rows, bool)
    values = rows[column].to_pylist()
    shapes = [rows[name].to_pylist() for name in SHAPE_COLUMNS] if raw else []
    for index, value in enumerate(values):
        pixels = _raw_grey(value, [shape[index] for shape in shapes]) if raw else _decoded_grey(value)
        if pixels is not None:
            grey[index] = _rows_of(pixels.shape[0]) @ pixels @ _rows_of(pixels.shape[1]).T
            known[index] = True
    return _hashes(grey), known


def _raw_grey(value: bytes | None, shape: list[Any]) -> Float64Array | None:
    if value is None or None in shape or min(shape) < 1 or len(value) != shape[0] * shape[1] * shape[2]:
        return None
    pixels: UInt8Array = np.frombuffer(value, np.uint8).reshape(shape)
    grey: Float64Array = pixels[..., :3].mean(axis=2)
    return grey


def _decoded_grey(value: bytes | None) -> Float64Array | None:
    from PIL import Image

    if value is None or _image_fault(value, 64_000_000) is not None:
        return None
    with Image.open(io.BytesIO(value)) as image:
        grey: Float64Array = np.asarray(image.convert("L"), np.float64)
        return grey


_weights: dict[int, Float64Array] = {}


def _rows_of(size: int) -> Float64Array:
    """The matrix that averages `size` pixels to 32 (by the area each covers), or spreads fewer."""
    if size not in _weights:
        edges = np.linspace(0, size, _SIDE + 1)
        low, high = np.arange(size), np.arange(1, size + 1)
        overlap = np.minimum(edges[1:, None], high) - np.maximum(edges[:-1, None], low)
        _weights[size] = np.maximum(overlap, 0) / (size / _SIDE)
        if len(_weights) > 1000:
            _weights.pop(next(iter(_weights)))
    return _weights[size]


def _hashes(grey: Float64Array) -> UInt64Array:
    """Hashes of images of 32 x 32: uint64 of shape [images]."""
    places = np.arange(_SIDE)
    cosines = np.cos(np.pi * (2 * places + 1)[None, :] * np.arange(_LOW)[:, None] / (2 * _SIDE))
    low = (cosines @ grey @ cosines.T).reshape(len(grey), _LOW * _LOW)
    low = np.round(low, 6)  # a flat image has zeros, not noise of the last bit
    above = low > np.median(low, axis=1, keepdims=True)
    return np.packbits(above, axis=1).view(">u8").astype(np.uint64).reshape(-1)
