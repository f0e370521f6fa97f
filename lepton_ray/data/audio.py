"""What a recording says of itself: rate, channels, length. WAV, read without decoding the samples.

Source of the layout: "Multimedia Programming Interface and Data Specifications 1.0" (IBM, Microsoft 1991), and
Microsoft's WAVEFORMATEXTENSIBLE.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

AUDIO_COLUMNS = ("audio", "encoding", "rate", "channels", "frames", "duration_s")
"""What makes a table a table of recordings."""
_FORMATS = {1: "pcm", 3: "float", 6: "alaw", 7: "mulaw"}
_EXTENSIBLE = 0xFFFE


@dataclass(frozen=True)
class AudioShape:
    """The measures of a recording."""

    encoding: str
    """`pcm16` and the like: the coding of a sample and its bits."""
    rate: int
    """Frames per second."""
    channels: int
    frames: int
    """Samples of each channel."""

    @property
    def duration_s(self) -> float:
        """Seconds."""
        return self.frames / self.rate


def wav_shape(data: bytes) -> AudioShape:
    """The measures of a WAV file. Raises ValueError saying what is wrong with it."""
    if data[:4] != b"RIFF" or data[8:12] != b"WAVE":
        raise ValueError(f"begins with {data[:4]!r}; expected a WAV file (RIFF, WAVE)")
    place, described = 12, None
    while place + 8 <= len(data):
        name, size = data[place : place + 4], int.from_bytes(data[place + 4 : place + 8], "little")
        if name == b"fmt ":
            described = _described(data[place + 8 : place + 8 + size])
        elif name == b"data":
            if described is None:
                raise ValueError("samples stand before their description")
            return _measured(described, size, len(data) - place - 8)
        place += 8 + size + size % 2
    raise ValueError("no samples in it; the file is cut short")


def _described(chunk: bytes) -> tuple[str, int, int, int]:
    """Coding, rate, channels and bytes of a frame."""
    try:
        code, channels, rate, _, frame_bytes, bits = struct.unpack_from("<HHIIHH", chunk)
        if code == _EXTENSIBLE:
            (code,) = struct.unpack_from("<H", chunk, 24)
    except struct.error as error:
        raise ValueError("its description is cut short") from error
    if code not in _FORMATS:
        raise ValueError(f"coding {code}; expected PCM, float, A-law or mu-law")
    if not (1 <= channels <= 64 and 1 <= rate <= 1_000_000 and frame_bytes == channels * -(-bits // 8) and bits):
        raise ValueError(f"{channels} channels, {rate} Hz, {bits} bits, {frame_bytes} bytes per frame do not fit")
    return f"{_FORMATS[code]}{bits}", rate, channels, frame_bytes


def _measured(described: tuple[str, int, int, int], size: int, there: int) -> AudioShape:
    encoding, rate, channels, frame_bytes = described
    if size > there:
        raise ValueError(f"says {size} bytes of samples, holds {there}; the file is cut short")
    if size < frame_bytes or size % frame_bytes:
        raise ValueError(f"{size} bytes of samples; expected one or more frames of {frame_bytes}")
    return AudioShape(encoding, rate, channels, size // frame_bytes)
