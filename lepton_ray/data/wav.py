"""The samples of a WAV file, and the same recording at another rate."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from lepton_ray.data.audio import wav_shape

Float64Array = npt.NDArray[np.float64]
_HEADER = 8
_KINDS: dict[str, npt.DTypeLike] = {
    "pcm8": np.uint8,
    "pcm16": "<i2",
    "pcm32": "<i4",
    "float32": "<f4",
    "float64": "<f8",
}


def decode_wav(data: bytes) -> tuple[Float64Array, int]:
    """The samples, float64 of shape [frames, channels], full scale -1 to 1, and the frames per second.

    Raises ValueError saying what is wrong with the file.
    """
    shape = wav_shape(data)
    if shape.encoding not in _KINDS and shape.encoding != "pcm24":
        raise ValueError(f"coding {shape.encoding}; expected PCM of 8 to 32 bits, or float; convert it")
    samples = shape.frames * shape.channels
    place = _samples_at(data)
    if shape.encoding == "pcm24":
        bytes_ = np.frombuffer(data, np.uint8, samples * 3, place).reshape(-1, 3)
        wide = np.zeros((samples, 4), np.uint8)
        wide[:, 1:] = bytes_
        numbers = wide.view("<i4").reshape(-1) / 2**31
    else:
        raw = np.frombuffer(data, _KINDS[shape.encoding], samples, place)
        numbers = raw.astype(np.float64)
        if shape.encoding == "pcm8":
            numbers = (numbers - 128) / 128
        elif shape.encoding.startswith("pcm"):
            numbers = numbers / 2 ** (int(shape.encoding[3:]) - 1)
    if not np.isfinite(numbers).all():
        raise ValueError("a sample is not finite")
    return numbers.reshape(shape.frames, shape.channels), shape.rate


def resampled(samples: Float64Array, rate: int, wanted: int) -> Float64Array:
    """A recording, [frames], at another rate: what is below half of the lower rate is kept, the rest is cut off.

    By the discrete Fourier transform of the recording with a mirrored half at each end, so that its ends do not meet.
    """
    if rate == wanted or len(samples) < 2:
        return samples
    count = max(1, round(len(samples) * wanted / rate))
    mirrored = np.concatenate([samples, samples[::-1]])
    spectrum = np.fft.rfft(mirrored)
    kept = min(len(spectrum), count + 1)
    made = np.zeros(count + 1, np.complex128)
    made[:kept] = spectrum[:kept]
    return np.fft.irfft(made, 2 * count)[:count] * (count / len(samples))


def _samples_at(data: bytes) -> int:
    """Where the samples begin; the file is known to be whole."""
    place = 12
    while data[place : place + 4] != b"data":
        size = int.from_bytes(data[place + 4 : place + 8], "little")
        place += _HEADER + size + size % 2
    return place + _HEADER
