"""Images of one size and recordings as log-mel features."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from lepton_ray.data.cleaning.steps import Fitting, Pieces, array_of
from lepton_ray.data.encoded_images import ENCODING, ImageFault, decode_image
from lepton_ray.data.images import SHAPE_COLUMNS, UInt8Array
from lepton_ray.data.transforms.step import Float64Array, Transform, added, replaced, vectors, with_field
from lepton_ray.data.wav import decode_wav, resampled
from lepton_ray.errors import UsageError, shown
from lepton_ray.settings import transforms as settings
from lepton_ray.settings.node import Node

LOWEST = 1e-10
"""Energy below which the logarithm is taken of this: silence has a number."""
LUMA = np.array([0.299, 0.587, 0.114])
"""Shares of red, green and blue in grey (ITU-R BT.601)."""


class Channels(Node):
    """Mean and standard deviation of each channel, of pixels from 0 to 1."""

    mean: list[settings.Finite]
    deviation: list[settings.Finite]


class Sums(Fitting):
    """Sums over the pixels of each channel, in whole numbers: the same in whatever order they are added."""

    def __init__(self, step: Image) -> None:
        self._step = step
        self._sums = np.zeros((3, step.settings.channels), object)

    def look(self, rows: pa.Table) -> Pieces:
        """See Fitting."""
        count, total, squares = 0, 0, 0
        for pixels in self._step.pixels(rows):
            wide = pixels.astype(np.int64)
            count += wide.shape[0] * wide.shape[1]
            total = total + wide.sum((0, 1))
            squares = squares + np.square(wide).sum((0, 1))
        channels = self._step.settings.channels
        return {
            "sums": pa.table({
                "count": np.full(channels, count, np.int64),
                "total": np.zeros(channels, np.int64) + total,
                "squares": np.zeros(channels, np.int64) + squares,
            })
        }  # fmt: skip

    def narrow(self, answers: Sequence[Pieces]) -> None:
        """See Fitting."""
        for answer in answers:
            for place, name in enumerate(("count", "total", "squares")):
                self._sums[place] += np.array(answer["sums"][name].to_pylist(), object)
        self.done = True

    def result(self) -> Any:
        """See Fitting."""
        return self._sums.tolist()


class Image(Transform[settings.Image]):
    """See `settings.transforms.Image`. The column becomes lists of float32; the columns of its shape stay."""

    Learnt = Channels
    kinds = "bytes"

    @property
    def reads(self) -> list[str]:
        """See Transform."""
        return ["image", *SHAPE_COLUMNS]

    @property
    def optional(self) -> tuple[str, ...]:
        """See Transform."""
        return (ENCODING,)

    def after(self, schema: pa.Schema) -> pa.Schema:
        """See Transform."""
        told = self.settings
        return with_field(schema, "image", pa.list_(pa.float32(), told.channels * told.height * told.width))

    def fitting(self) -> Fitting | None:
        """See Transform."""
        return Sums(self) if self.settings.normalise else None

    def learn(self, result: Any) -> Channels:
        """See Transform."""
        if not self.settings.normalise:
            return Channels(mean=[0.0] * self.settings.channels, deviation=[1.0] * self.settings.channels)
        counts, totals, squares = result
        if not counts[0]:
            raise UsageError(f"{self.where()}: there is no image to learn from")
        mean = [total / count for count, total in zip(counts, totals, strict=True)]
        # in whole numbers up to the one division, so that nothing cancels
        spread = [
            (n * square - total * total) / (n * n) for n, total, square in zip(counts, totals, squares, strict=True)
        ]
        return Channels(
            mean=[each / 255 for each in mean],
            deviation=[max(each, 0.0) ** 0.5 / 255 or 1.0 for each in spread],
        )

    def complete(self, learnt: Channels) -> bool:
        """See Transform."""
        return {len(learnt.mean), len(learnt.deviation)} == {self.settings.channels}

    def apply(self, rows: pa.Table, learnt: Channels) -> pa.Table:
        """See Transform."""
        told = self.settings
        mean, deviation = np.array(learnt.mean), np.array(learnt.deviation)
        made = np.empty((rows.num_rows, told.channels * told.height * told.width), np.float32)
        for index, pixels in enumerate(self.pixels(rows)):
            made[index] = ((pixels / 255 - mean) / deviation).transpose(2, 0, 1).reshape(-1)
        return replaced(rows, "image", vectors(made))

    def pixels(self, rows: pa.Table) -> list[UInt8Array]:
        """Each image in the size and with the channels that are wanted, uint8 [height, width, channels]."""
        shapes = zip(*(rows[name].to_pylist() for name in SHAPE_COLUMNS), strict=True)
        encoded = ENCODING in rows.column_names
        images = zip(array_of(rows, "image").to_pylist(), shapes, strict=True)
        return [self._one(index, data, shape, encoded) for index, (data, shape) in enumerate(images)]

    def _one(self, index: int, data: bytes | None, shape: tuple[int, ...], encoded: bool) -> UInt8Array:
        where = f"{self.where()}: image of row {index}"
        if data is None:
            raise UsageError(f"{where} is missing; clean the table")
        if encoded:
            try:
                pixels = decode_image(data, self.settings.max_pixels)
            except ImageFault as fault:
                raise UsageError(f"{where}: {fault}; clean the table") from fault
        else:
            pixels = np.frombuffer(data, np.uint8)
            if None in shape or pixels.size != shape[0] * shape[1] * shape[2]:
                raise UsageError(f"{where} has {pixels.size} bytes; its row says {shape}; clean the table")
            pixels = pixels.reshape(shape)
        return _sized(_coloured(pixels, self.settings.channels), self.settings.height, self.settings.width)


def _coloured(pixels: UInt8Array, channels: int) -> UInt8Array:
    """Pixels with one (grey) or three (red, green, blue) channels; what an alpha channel says is left out."""
    colour = pixels[:, :, :3] if pixels.shape[2] >= 3 else pixels[:, :, :1]
    if colour.shape[2] == channels:
        return colour
    if channels == 3:
        return np.repeat(colour, 3, 2)
    grey: UInt8Array = np.rint(colour @ LUMA).astype(np.uint8)[:, :, None]
    return grey


def _sized(pixels: UInt8Array, height: int, width: int) -> UInt8Array:
    """Pixels in another size: bilinear, and smoothed where the image shrinks."""
    if pixels.shape[:2] == (height, width):
        return pixels
    from PIL import Image as Pillow

    flat = pixels[:, :, 0] if pixels.shape[2] == 1 else pixels
    made = np.asarray(Pillow.fromarray(np.ascontiguousarray(flat)).resize((width, height), Pillow.Resampling.BILINEAR))
    return made.reshape(height, width, pixels.shape[2])


class LogMel(Transform[settings.LogMel]):
    """See `settings.transforms.LogMel`. The column becomes lists of float32 of one length."""

    kinds = "bytes"

    @property
    def window(self) -> int:
        """Samples of a frame."""
        return max(2, round(self.settings.rate * self.settings.window_ms / 1000))

    @property
    def hop(self) -> int:
        """Samples from one frame to the next."""
        return max(1, round(self.settings.rate * self.settings.hop_ms / 1000))

    @property
    def frames(self) -> int:
        """Frames of the longest recording."""
        return 1 + round(self.settings.max_s * self.settings.rate) // self.hop

    def after(self, schema: pa.Schema) -> pa.Schema:
        """See Transform."""
        name = self.settings.column
        if f"{name}_frames" in schema.names:
            raise UsageError(f"{self.where()}: there is a column {shown(name + '_frames')} already; rename it")
        schema = with_field(schema, name, pa.list_(pa.float32(), self.frames * self.settings.mels))
        return with_field(schema, f"{name}_frames", pa.int32())

    def apply(self, rows: pa.Table, learnt: Any) -> pa.Table:
        """See Transform."""
        name, mels = self.settings.column, self.settings.mels
        made = np.zeros((rows.num_rows, self.frames, mels), np.float32)
        counts = np.zeros(rows.num_rows, np.int32)
        for index, data in enumerate(array_of(rows, name).to_pylist()):
            features = self._features(data, f"{self.where()}: {shown(name)} of row {index}")
            counts[index] = len(features)
            made[index, : len(features)] = features
        rows = replaced(rows, name, vectors(made.reshape(rows.num_rows, -1)))
        return added(rows, f"{name}_frames", pa.array(counts))

    def _features(self, data: bytes | None, where: str) -> Float64Array:
        """One recording, [frames, mels]."""
        if data is None:
            raise UsageError(f"{where} is missing; clean the table")
        try:
            samples, rate = decode_wav(data)
        except ValueError as error:
            raise UsageError(f"{where}: {error}") from error
        if len(samples) > self.settings.max_s * rate:
            raise UsageError(
                f"{where} lasts {len(samples) / rate:.1f} s; expected at most {self.settings.max_s:g} (max_s); cut it"
            )
        mono = resampled(samples.mean(1), rate, self.settings.rate)
        window, hop = self.window, self.hop
        padded = np.concatenate([mono, np.zeros(max(0, window - len(mono)))])
        count = min(self.frames, 1 + (len(padded) - window) // hop)
        frames = np.lib.stride_tricks.sliding_window_view(padded, window)[::hop][:count]
        size = 1 << (window - 1).bit_length()
        power = np.abs(np.fft.rfft(frames * np.hanning(window), size)) ** 2
        bands: Float64Array = np.log(
            np.maximum(power @ mel_bands(self.settings.rate, size, self.settings.mels), LOWEST)
        )
        if not self.settings.normalise:
            return bands
        deviation = bands.std(0)
        bands -= bands.mean(0)
        bands /= np.where(deviation > 0, deviation, 1.0)
        return bands


@functools.lru_cache(maxsize=8)
def mel_bands(rate: int, size: int, mels: int) -> npt.NDArray[np.float64]:
    """Triangles over the frequencies of a Fourier transform, [size // 2 + 1, mels], evenly spaced on the mel scale.

    mel = 2595 log10(1 + hertz / 700) (O'Shaughnessy, Speech Communication, 1987), from 0 to half of the rate.
    """
    top = 2595 * np.log10(1 + rate / 2 / 700)
    edges = 700 * (10 ** (np.linspace(0, top, mels + 2) / 2595) - 1)
    hertz = np.linspace(0, rate / 2, size // 2 + 1)[:, None]
    rising = (hertz - edges[:-2]) / (edges[1:-1] - edges[:-2])
    falling = (edges[2:] - hertz) / (edges[2:] - edges[1:-1])
    return np.maximum(0.0, np.minimum(rising, falling))
