"""A 128-bit hash of each row of an Arrow table, vectorised, to find rows that are equal.

Not a cryptographic hash: two different rows share one by chance about once in 2**128, but somebody who tries can make
such rows. It is used within one ingest and never stored.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from lepton_ray.data.order import Int64Array, UInt64Array, mix64

Mask = npt.NDArray[np.bool_]

LONGEST_RUN = 4_000_000
"""Rows of a sorted run of hashes at most: 64 MB."""
_WORDS_AT_ONCE = 2**20
"""64-bit words hashed in one go: bounds the temporary arrays to some ten megabytes."""

_INCREMENT = np.array([0x9E3779B97F4A7C15], np.uint64)  # of SplitMix64; an array, since numpy's scalars warn at a wrap
_SECOND = np.array([0xD1342543DE82EF95], np.uint64)  # another odd number, for the second half
_NULL = np.uint64(0xA0761D6478BD642F)
_LOW_BYTES = np.array([(1 << (8 * count)) - 1 for count in range(9)], np.uint64)
"""Masks of the first 0 to 8 bytes of a word."""


def hash_rows(rows: pa.Table) -> UInt64Array:
    """The hash of each row over all columns of the table.

    Equal rows have equal hashes, whatever the chunks; null equals null, NaN equals NaN, 0.0 equals -0.0.

    Returns:
        uint64 of shape [rows, 2].
    """
    result = np.zeros((rows.num_rows, 2), np.uint64)
    for index, column in enumerate(rows.columns):
        start = 0
        for chunk in column.chunks:
            result[start : start + len(chunk)] += mix64(_hash_array(chunk) + np.uint64(index + 1) * _INCREMENT)
            start += len(chunk)
    return result


def _hash_array(values: pa.Array) -> UInt64Array:
    """One hash for each value: uint64 of shape [values, 2]."""
    kind = values.type
    if pa.types.is_dictionary(kind):
        return _hash_array(values.dictionary_decode())
    if pa.types.is_string(kind) or pa.types.is_binary(kind):
        hashes = _hash_bytes(values)
    elif pa.types.is_boolean(kind) or pa.types.is_integer(kind) or pa.types.is_floating(kind):
        hashes = _hash_words(_as_words(values)[:, None])
    else:  # times, decimals, lists, structs: seldom, so their text will do
        hashes = _hash_bytes(pa.array([repr(value) for value in values.to_pylist()], pa.string()))
    if values.null_count:
        hashes[values.is_null().to_numpy(zero_copy_only=False)] = _NULL
    return hashes


def _as_words(values: pa.Array) -> UInt64Array:
    """Numbers as 64 bits each: integers as they are, floating point as their bits with one zero and one NaN."""
    if pa.types.is_floating(values.type):
        numbers = values.cast(pa.float64()).fill_null(0).to_numpy(zero_copy_only=False) + 0.0  # -0.0 becomes 0.0
        return np.where(np.isnan(numbers), np.nan, numbers).view(np.uint64)
    if pa.types.is_boolean(values.type):
        values = values.cast(pa.uint8())
    words: UInt64Array = values.fill_null(0).to_numpy(zero_copy_only=False).astype(np.uint64)
    return words


def _hash_words(words: UInt64Array) -> UInt64Array:
    """Rows of 64-bit words, shape [rows, words], to one hash each; position and number of words count."""
    places = np.arange(1, words.shape[1] + 1, dtype=np.uint64)
    first_shift, second_factor = places * _INCREMENT, (places * _SECOND) | np.uint64(1)
    hashes = np.empty((len(words), 2), np.uint64)
    step = max(1, _WORDS_AT_ONCE // max(1, words.shape[1]))
    for start in range(0, len(words), step):
        mixed = mix64(words[start : start + step] + first_shift)
        hashes[start : start + step, 0] = mixed.sum(axis=1)
        mixed ^= mixed >> np.uint64(32)  # so that the second sum is no linear function of the first one's terms
        hashes[start : start + step, 1] = (mixed * second_factor).sum(axis=1)
    return hashes


def _hash_bytes(values: pa.Array) -> UInt64Array:
    """Strings or byte strings to one hash each."""
    hashes = np.empty((len(values), 2), np.uint64)
    if len(values) == 0:
        return hashes
    values = values.cast(pa.large_binary())
    offsets = np.frombuffer(values.buffers()[1], np.int64)[values.offset : values.offset + len(values) + 1]
    content = values.buffers()[2]
    data = np.frombuffer(content, np.uint8) if content is not None else np.empty(0, np.uint8)
    lengths = np.diff(offsets)
    words = np.maximum(1, -(-lengths // 8))
    ends = np.cumsum(words)
    alike = bool((lengths == lengths[0]).all())  # images of one size, hashes of files, ...
    start = 0
    while start < len(values):
        done = int(ends[start - 1]) if start else 0
        stop = max(start + 1, int(np.searchsorted(ends, done + _WORDS_AT_ONCE, side="right")))
        part = data[offsets[start] : offsets[stop]]
        if alike:
            block = np.zeros((stop - start, int(words[0]) * 8), np.uint8)
            block[:, : lengths[0]] = part.reshape(stop - start, lengths[0])
            hashes[start:stop] = _hash_words(block.view(np.uint64))
        else:
            hashes[start:stop] = _hash_uneven(part, lengths[start:stop], words[start:stop])
        start = stop
    hashes += lengths.astype(np.uint64)[:, None] * _INCREMENT
    return hashes


def _hash_uneven(data: npt.NDArray[np.uint8], lengths: Int64Array, words: Int64Array) -> UInt64Array:
    """As `_hash_words`, for byte strings of any lengths that lie one after the other."""
    padded = np.zeros(len(data) + 8, np.uint8)
    padded[: len(data)] = data
    begins = np.cumsum(words) - words
    within = np.arange(int(words.sum())) - np.repeat(begins, words)
    # every byte begins a word of 8: the strings are not aligned, and need not be
    anywhere: UInt64Array = np.ndarray(len(data) + 1, np.dtype("<u8"), padded.data, strides=(1,))
    found = anywhere[np.repeat(np.cumsum(lengths) - lengths, words) + within * 8]
    last = begins + words - 1
    found[last] &= _LOW_BYTES[lengths - 8 * (words - 1)]  # what follows the string is not its own
    places = np.arange(1, int(words.max()) + 1, dtype=np.uint64)
    mixed = mix64(found + (places * _INCREMENT)[within])
    hashes = np.empty((len(lengths), 2), np.uint64)
    hashes[:, 0] = np.add.reduceat(mixed, begins)
    mixed ^= mixed >> np.uint64(32)
    mixed *= ((places * _SECOND) | np.uint64(1))[within]
    hashes[:, 1] = np.add.reduceat(mixed, begins)
    return hashes


class SeenRows:
    """The hashes of all rows so far: 16 bytes per row, however many rows went by."""

    def __init__(self) -> None:
        # runs sorted by first half, each at least twice as long as the next: few to search, and rows are merged seldom
        self._runs: list[tuple[UInt64Array, UInt64Array]] = []

    def add(self, hashes: UInt64Array) -> Mask:
        """Enter rows; returns for each whether it is new, i.e. neither entered before nor earlier in this call.

        Different rows that share the first half of their hash are one in 2**64; at worst a duplicate passes as new.
        """
        order = np.argsort(hashes[:, 0], kind="stable")  # of equal rows the first stays first
        first, second = hashes[order, 0], hashes[order, 1]
        fresh = np.ones(len(hashes), bool)
        fresh[1:] = (first[1:] != first[:-1]) | (second[1:] != second[:-1])
        for run_first, run_second in self._runs:
            place = np.searchsorted(run_first, first)
            place[place == len(run_first)] = 0
            fresh &= (run_first[place] != first) | (run_second[place] != second)
        if fresh.any():
            self._runs.append((first[fresh], second[fresh]))
        while len(self._runs) > 1 and self._is_merged(len(self._runs[-2][0]), len(self._runs[-1][0])):
            self._runs.append(_merged(self._runs.pop(), self._runs.pop()))
        new = np.empty(len(hashes), bool)
        new[order] = fresh
        return new

    @staticmethod
    def _is_merged(longer: int, shorter: int) -> bool:
        # a merge takes three times the memory of its runs for a moment, so that very long ones are left alone
        return longer < 2 * shorter and longer + shorter <= LONGEST_RUN


def _merged(
    one: tuple[UInt64Array, UInt64Array], other: tuple[UInt64Array, UInt64Array]
) -> tuple[UInt64Array, UInt64Array]:
    first = np.concatenate([one[0], other[0]])
    order = np.argsort(first, kind="stable")  # finds that there are two sorted runs, and merges them
    return first[order], np.concatenate([one[1], other[1]])[order]
