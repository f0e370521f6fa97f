"""Texts and images that are nearly the same: MinHash with banding for text, banded perceptual hashes for images.

MinHash (Broder, 1997) and locality-sensitive hashing (Indyk and Motwani, 1998), as in Leskovec, Rajaraman and Ullman,
"Mining of Massive Datasets", chapter 3. What banding proposes is then compared exactly. The package datasketch keeps
such an index in one process and hashes text by text; here all pieces of all texts of a data file are hashed at once,
only band hashes travel, and which row stays does not depend on the number of workers.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from lepton_ray.data.order import mix64

UInt64Array = npt.NDArray[np.uint64]
UInt32Array = npt.NDArray[np.uint32]
Int64Array = npt.NDArray[np.int64]

PIECE = 5
"""Bytes of a piece of text."""
HASHES = 128
"""MinHashes of a text at most."""
RECALL = 0.995
"""Share of the pairs at the threshold that banding must propose."""
ALL_PAIRS = 50
"""Rows of a band that are paired each with each; of more, each with the first and with its neighbour."""
TEXT_AT_ONCE = 1 << 21
"""Bytes of text hashed at a time."""
_BLOCK = 1 << 16
"""Pieces hashed at a time: they stay in the processor's cache."""

_LOWER = np.arange(256, dtype=np.uint8)
_LOWER[ord("A") : ord("Z") + 1] += 32


def banding(threshold: float) -> tuple[int, int]:
    """Bands and hashes per band: as many hashes as leave the recall at the threshold above 99.5%."""
    best = (HASHES, 1)
    for rows in range(1, 17):
        bands = HASHES // rows
        if 1 - (1 - threshold**rows) ** bands >= RECALL:
            best = (bands, rows)
    return best


def slices(texts: pa.Array) -> Iterator[tuple[int, int]]:
    """Where to cut the texts so that hashing some at a time needs little memory: about 40 bytes for each of text."""
    ends = np.cumsum(pc.fill_null(pc.binary_length(texts), 0).to_numpy(zero_copy_only=False).astype(np.int64))
    low = 0
    while low < len(texts):
        done = int(ends[low - 1]) if low else 0
        high = max(low + 1, int(np.searchsorted(ends, done + TEXT_AT_ONCE, side="right")))
        yield low, high
        low = high


def pieces_of(texts: pa.Array) -> tuple[UInt64Array, Int64Array]:
    """The hashes of all pieces of 5 bytes (letters in lower case) of all texts, and where each text's begin.

    Args:
        texts: strings without nulls. A text shorter than a piece is one.

    Returns:
        uint64 of shape [pieces]; int64 of shape [texts + 1].
    """
    wide = texts.cast(pa.large_binary())
    offsets = np.frombuffer(wide.buffers()[1], np.int64)[wide.offset : wide.offset + len(wide) + 1]
    content = wide.buffers()[2]
    data = np.frombuffer(content, np.uint8)[offsets[0] : offsets[-1]] if content is not None else np.empty(0, np.uint8)
    lengths = np.diff(offsets)
    padded = np.concatenate([_LOWER[data], np.zeros(PIECE, np.uint8)])
    words = np.zeros(len(data) + 1, np.uint64)
    for place in range(PIECE):
        words |= padded[place : place + len(words)].astype(np.uint64) << np.uint64(8 * place)
    counts = np.maximum(lengths - PIECE + 1, 1)
    starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    text = np.repeat(np.arange(len(counts)), counts)
    within = np.arange(starts[-1]) - starts[:-1][text]
    chosen = words[np.minimum((offsets[:-1] - offsets[0])[text] + within, len(data))]
    short = np.flatnonzero(lengths < PIECE)
    for index in short.tolist():  # only their own bytes, and how many they are
        kept = (1 << (8 * int(lengths[index]))) - 1
        chosen[starts[index]] = (int(chosen[starts[index]]) & kept) | (int(lengths[index]) + 1) << 48
    return mix64(chosen), starts


def band_hashes(pieces: UInt64Array, starts: Int64Array, threshold: float) -> UInt64Array:
    """One hash for each band of each text: uint64 of shape [texts, bands]."""
    bands, rows = banding(threshold)
    count = len(starts) - 1
    seeds = mix64(np.arange(1, 2 * bands * rows + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15))
    factors = (seeds[: bands * rows] >> np.uint64(32)).astype(np.uint32) | np.uint32(1)
    shifts = (seeds[bands * rows :] >> np.uint64(32)).astype(np.uint32)
    small = (pieces >> np.uint64(32)).astype(np.uint32)
    made = np.empty((count, bands), np.uint64)
    first = 0
    while first < count:
        last = max(first + 1, int(np.searchsorted(starts, starts[first] + _BLOCK, side="right")) - 1)
        here, begins = small[starts[first] : starts[last]], starts[first:last] - starts[first]
        for band in range(bands):
            joined = np.full(last - first, band + 1, np.uint64)
            for index in range(band * rows, (band + 1) * rows):
                least: UInt32Array = np.minimum.reduceat(here * factors[index] + shifts[index], begins)
                joined = mix64(joined * np.uint64(0x9E3779B97F4A7C15) + least)
            made[first:last, band] = joined
        first = last
    return made


def image_bands(hashes: UInt64Array, distance: int) -> UInt64Array:
    """Bands of 64-bit hashes such that any two within the distance agree in one: uint64 of shape [images, bands]."""
    edges = np.linspace(0, 64, distance + 2).astype(int)
    columns = []
    for band, (low, high) in enumerate(zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True)):
        bits = (hashes >> np.uint64(low)) & np.uint64((1 << (high - low)) - 1)
        columns.append(mix64(bits + np.uint64(((band + 1) << 56) % 2**64)))
    return np.stack(columns, axis=1)


def entries(bands: UInt64Array, hashes: UInt64Array, places: Int64Array, part: int, buckets: int) -> pa.Table:
    """A line for each band of each row, with the bucket where equal bands meet.

    Args:
        bands: uint64 of shape [rows, bands].
        hashes: uint64 of shape [rows], carried along.
        places: row numbers: int64 of shape [rows].
        part: number of the data file.
        buckets: how many there are.
    """
    flat, each = bands.reshape(-1), bands.shape[1]
    return pa.table(
        {
            "bucket": (flat % np.uint64(buckets)).astype(np.int32),
            "band": flat,
            "hash": np.repeat(hashes, each),
            "part": np.full(len(flat), part, np.int32),
            "row": np.repeat(places, each),
        }
    )


def proposed(bucket: pa.Table, distance: int | None = None) -> pa.Table:
    """The pairs of rows of a bucket that share a band; for images only those within the distance.

    Returns:
        `part`, `row` of the later row, `of_part`, `of_row` of the earlier one; each pair once.
    """
    columns = {name: bucket[name].to_numpy() for name in ("row", "part", "band", "hash")}
    order = np.lexsort((columns["row"], columns["part"], columns["band"]))
    band = columns["band"][order]
    edges = np.flatnonzero(np.concatenate([[True], band[1:] != band[:-1], [True]])) if len(band) else np.zeros(1, int)
    one, other = [], []
    sizes = np.diff(edges)
    for size in np.unique(sizes[sizes > 1]).tolist():
        begins = edges[:-1][sizes == size]
        if size <= ALL_PAIRS:
            left, right = np.triu_indices(size, 1)
        else:
            left = np.concatenate([np.zeros(size - 1, int), np.arange(1, size - 1)])
            right = np.concatenate([np.arange(1, size), np.arange(2, size)])
        one.append((begins[:, None] + left[None, :]).reshape(-1))
        other.append((begins[:, None] + right[None, :]).reshape(-1))
    first = order[np.concatenate(one)] if one else np.empty(0, np.int64)
    second = order[np.concatenate(other)] if other else np.empty(0, np.int64)
    if distance is not None:
        apart = np.bitwise_count(columns["hash"][first] ^ columns["hash"][second])
        first, second = first[apart <= distance], second[apart <= distance]
    pairs = np.stack(
        [columns["part"][second], columns["row"][second], columns["part"][first], columns["row"][first]], axis=1
    ).astype(np.int64)
    pairs = np.unique(pairs, axis=0) if len(pairs) else pairs
    return pa.table(dict(zip(("part", "row", "of_part", "of_row"), pairs.T, strict=True)))


def similarity(one: UInt64Array, other: UInt64Array) -> float:
    """Jaccard similarity of two ascending arrays without repeats."""
    common = len(np.intersect1d(one, other, assume_unique=True))
    return common / max(1, len(one) + len(other) - common)
