"""Files that become one row each: images, recordings, texts. What each kind is called, holds, and is refused for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from lepton_ray.data.audio import wav_shape
from lepton_ray.data.encoded_images import ENCODINGS, ImageFault, image_shape
from lepton_ray.data.sources.rejects import Unreadable
from lepton_ray.errors import shown
from lepton_ray.settings.reading import LimitSettings


@dataclass(frozen=True)
class Media:
    """One kind of file."""

    name: str
    """Of the format in settings."""
    endings: tuple[str, ...]
    columns: pa.Schema
    """What a file gives to its row."""
    row: Callable[[bytes, str, LimitSettings], Mapping[str, Any]]
    """The columns of a file's bytes and path; raises Unreadable."""


def _image(data: bytes, path: str, limits: LimitSettings) -> Mapping[str, Any]:
    expected = ENCODINGS.get("." + path.rpartition(".")[2].lower())
    try:
        shape = image_shape(data, expected, limits.max_pixels, limits.min_side)
    except ImageFault as fault:
        raise Unreadable(fault.rule, fault.reason) from fault
    return {
        "image": data, "encoding": shape.encoding, "height": shape.height, "width": shape.width,
        "channels": shape.channels,
    }  # fmt: skip


def _audio(data: bytes, _path: str, _limits: LimitSettings) -> Mapping[str, Any]:
    try:
        shape = wav_shape(data)
    except ValueError as error:
        raise Unreadable("recording cannot be read", shown(str(error), 160)) from error
    return {
        "audio": data, "encoding": shape.encoding, "rate": shape.rate, "channels": shape.channels,
        "frames": shape.frames, "duration_s": shape.duration_s,
    }  # fmt: skip


def _text(data: bytes, _path: str, _limits: LimitSettings) -> Mapping[str, Any]:
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise Unreadable(
            "text is not UTF-8", f"byte {error.start} is {data[error.start]:#04x}; save as UTF-8"
        ) from error
    if "\0" in text:
        raise Unreadable("text with a zero byte", f"at character {text.index(chr(0))}; expected text")
    if not text.strip():
        raise Unreadable("text is empty", f"{len(data)} bytes; expected words")
    return {"text": text}


IMAGES = Media(
    "images",
    tuple(ENCODINGS),
    pa.schema(
        [
            ("image", pa.binary()),
            ("encoding", pa.string()),
            ("height", pa.int32()),
            ("width", pa.int32()),
            ("channels", pa.int32()),
        ]
    ),
    _image,
)
AUDIO = Media(
    "audio",
    (".wav", ".wave"),
    pa.schema(
        [
            ("audio", pa.binary()),
            ("encoding", pa.string()),
            ("rate", pa.int32()),
            ("channels", pa.int32()),
            ("frames", pa.int64()),
            ("duration_s", pa.float64()),
        ]
    ),
    _audio,
)
TEXT = Media("text", (".txt",), pa.schema([("text", pa.string())]), _text)
MEDIA = {media.name: media for media in (IMAGES, AUDIO, TEXT)}
"""Kinds of file by name."""
