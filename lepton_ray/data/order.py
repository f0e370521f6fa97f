"""The order in which samples are used, and the account of which were.

The position of a run in its data is ONE integer: the global sample offset in the endless row of epochs. Each epoch is
a permutation of the rows that is computed, not stored, so any rank can name the samples of any step from nothing but
(rows, seed, offset): no shuffle buffer to save, no order to send around, and a changed number of ranks changes only
who takes which slice.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from lepton_ray.errors import UsageError, shown

Int64Array = npt.NDArray[np.int64]
UInt64Array = npt.NDArray[np.uint64]

MAX_ROWS = 2**48
"""Rows of a table at most: keeps every product below inside 64 bits with room to spare."""

MAX_OFFSET = 2**62
"""Samples of a run at most."""

ROUNDS = 8
"""Feistel rounds. Four make a pseudorandom permutation for strong round functions (Luby and Rackoff, 1988); the
surplus is for weak ones and for tables of a handful of rows."""

_GOLDEN = 0x9E3779B97F4A7C15  # 2**64 / golden ratio, odd: the increment of SplitMix64
_FACTOR_1 = 0xBF58476D1CE4E5B9
_FACTOR_2 = 0x94D049BB133111EB
_MASK = 2**64 - 1


def mix64(values: UInt64Array) -> UInt64Array:
    """The finaliser of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014): a bijection on 64 bits that mixes well.

    Args:
        values: any shape.

    Returns:
        A new array of the same shape.
    """
    mixed = values ^ (values >> np.uint64(30))
    mixed *= np.uint64(_FACTOR_1)
    mixed ^= mixed >> np.uint64(27)
    mixed *= np.uint64(_FACTOR_2)
    mixed ^= mixed >> np.uint64(31)
    return mixed


def _mixed_number(value: int) -> int:
    """`mix64` of one number, in plain integers (numpy scalars warn where 64 bits wrap)."""
    value &= _MASK
    value = (value ^ (value >> 30)) * _FACTOR_1 & _MASK
    value = (value ^ (value >> 27)) * _FACTOR_2 & _MASK
    return value ^ (value >> 31)


class SampleOrder:
    """The endless row of epochs over `rows` samples, each epoch a permutation decided by (seed, epoch).

    The permutation is a Feistel network over pairs (position // b, position % b) with a x b the smallest near-square
    that holds all rows, and cycle walking for the few pairs beyond the last row (Black and Rogaway, "Ciphers with
    arbitrary finite domains", CT-RSA 2002, method 3). It needs no memory per sample and about 0.1 ms for a batch.

    Args:
        rows: samples per epoch, at least 1.
        seed: 0 <= seed < 2**63; another seed gives other permutations.
    """

    def __init__(self, rows: int, seed: int) -> None:
        if not 1 <= rows <= MAX_ROWS:
            raise UsageError(f"sample order: {shown(rows)} rows; expected 1 to 2**48, is the training split empty?")
        if not 0 <= seed < 2**63:
            raise UsageError(f"sample order: seed {shown(seed)}; expected 0 <= seed < 2**63")
        self.rows = rows
        self.seed = seed
        self._left = math.isqrt(rows - 1) + 1  # ceil(sqrt(rows))
        self._right = -(-rows // self._left)
        self._seed_key = _mixed_number(seed + _GOLDEN)

    def sample_ids(self, offset: int, count: int) -> Int64Array:
        """The ids of the samples at global offsets `offset` to `offset + count - 1`.

        Args:
            offset: global sample offset since the start of epoch 0.
            count: number of samples; the request may straddle any number of epochs.

        Returns:
            int64 of shape [count], each in [0, rows).
        """
        self._check(offset, count)
        if count == 0:
            return np.empty(0, np.int64)
        first, last = offset // self.rows, (offset + count - 1) // self.rows
        if first == last:
            start = offset - first * self.rows
            return self._permuted(np.arange(start, start + count, dtype=np.uint64), self._round_keys(first, last))
        offsets = np.arange(offset, offset + count, dtype=np.uint64)
        epochs, positions = np.divmod(offsets, np.uint64(self.rows))
        keys = self._round_keys(first, last)[:, (epochs - np.uint64(first)).astype(np.int64)]
        return self._permuted(positions, keys)

    def epochs_of(self, offset: int, count: int) -> Int64Array:
        """The epoch (from 0) that each of the global offsets `offset` to `offset + count - 1` belongs to.

        Returns:
            int64 of shape [count], ascending.
        """
        self._check(offset, count)
        return np.arange(offset, offset + count, dtype=np.int64) // self.rows

    @staticmethod
    def _check(offset: int, count: int) -> None:
        if offset < 0 or count < 0 or offset + count > MAX_OFFSET:
            raise UsageError(f"sample order: offset {offset}, count {count}; expected both in 0 to 2**62")

    def _round_keys(self, first: int, last: int) -> UInt64Array:
        """One key for each round and epoch: uint64 of shape [ROUNDS, last - first + 1]."""
        rounds = range(1, ROUNDS + 1)
        if first == last:  # nearly always; a third of the time of the arrays below
            key = _mixed_number(self._seed_key + (first + 1) * _GOLDEN)
            return np.array([[_mixed_number(key + turn * _GOLDEN)] for turn in rounds], np.uint64)
        epochs = np.arange(first + 1, last + 2, dtype=np.uint64)
        keys = mix64(np.array([self._seed_key], np.uint64) + epochs * np.uint64(_GOLDEN))
        turns = np.array([turn * _GOLDEN & _MASK for turn in rounds], np.uint64)
        return mix64(keys[None, :] + turns[:, None])

    def _permuted(self, positions: UInt64Array, keys: UInt64Array) -> Int64Array:
        """Positions in [0, rows) moved by the permutation of their epoch; keys are [ROUNDS, 1 or len(positions)]."""
        moved = self._feistel(positions, keys)
        beyond = np.flatnonzero(moved >= np.uint64(self.rows))
        while beyond.size:  # ends: the network permutes a finite set, so each walk comes back below `rows`
            again = self._feistel(moved[beyond], keys if keys.shape[1] == 1 else keys[:, beyond])
            moved[beyond] = again
            beyond = beyond[again >= np.uint64(self.rows)]
        return moved.astype(np.int64)

    def _feistel(self, values: UInt64Array, keys: UInt64Array) -> UInt64Array:
        """One pass of the network over [0, left x right), a bijection whatever the round function does."""
        left_size, right_size = np.uint64(self._left), np.uint64(self._right)
        left, right = np.divmod(values, right_size)
        for turn in range(0, ROUNDS, 2):
            # one bit less, so that the sum cannot wrap: a wrap would break the bijection
            left = (left + (mix64(right + keys[turn]) >> np.uint64(1))) % left_size
            right = (right + (mix64(left + keys[turn + 1]) >> np.uint64(1))) % right_size
        result: UInt64Array = left * right_size + right
        return result


def _mixed_ids(ids: Int64Array) -> UInt64Array:
    return mix64(ids.astype(np.uint64) + np.uint64(_GOLDEN))  # shifted, since the mixer leaves 0 at 0


def _account(mixed: UInt64Array) -> tuple[int, int, int]:
    """Count, sum modulo 2**64 and exclusive or of mixed ids."""
    return len(mixed), int(np.add.reduce(mixed)), int(np.bitwise_xor.reduce(mixed))


@lru_cache(maxsize=16)
def _full_epoch(rows: int) -> tuple[int, int, int]:
    """The account of ids 0 to rows - 1."""
    total = parity = 0
    chunk = 2**20  # bounds memory to some ten megabytes
    for start in range(0, rows, chunk):
        _, added, flipped = _account(_mixed_ids(np.arange(start, min(start + chunk, rows), dtype=np.int64)))
        total, parity = (total + added) & _MASK, parity ^ flipped
    return rows, total, parity


class SampleLedger:
    """Which samples were used, as an account small enough to ride in every checkpoint.

    For each epoch: how many samples, and the sum and the exclusive or of their mixed ids modulo 2**64. The order of
    samples and their spread over ranks do not matter, so ranks keep their own ledgers and merge them by addition.
    An epoch equal to `expected(rows)` used each row exactly once, but for a chance of about 2**-64 that several wrong
    ids cancel each other out in both figures.
    """

    def __init__(self) -> None:
        self._epochs: dict[int, tuple[int, int, int]] = {}  # epoch -> count, sum, exclusive or

    def add(self, epochs: int | Int64Array, ids: Int64Array) -> None:
        """Enter samples that were used.

        Args:
            epochs: one epoch for all ids, or int64 of the shape of `ids` as `SampleOrder.epochs_of` gives them.
            ids: int64 of shape [count], each >= 0.
        """
        if len(ids) == 0:
            return
        mixed = _mixed_ids(ids)
        if isinstance(epochs, int):
            self._enter(epochs, mixed)
        elif len(epochs) != len(ids):
            raise UsageError(f"sample ledger: {len(epochs)} epochs for {len(ids)} ids; expected one each")
        elif epochs[0] == epochs[-1] and (epochs == epochs[0]).all():
            self._enter(int(epochs[0]), mixed)
        else:
            for epoch in np.unique(epochs):
                self._enter(int(epoch), mixed[epochs == epoch])

    def add_full(self, epoch: int, rows: int) -> None:
        """Enter each of the ids 0 to rows - 1 once; about 30 ns per row the first time."""
        self._put(epoch, *_full_epoch(rows))

    def _enter(self, epoch: int, mixed: UInt64Array) -> None:
        self._put(epoch, *_account(mixed))

    def _put(self, epoch: int, count: int, total: int, parity: int) -> None:
        before = self._epochs.get(epoch, (0, 0, 0))
        self._epochs[epoch] = (before[0] + count, (before[1] + total) & _MASK, before[2] ^ parity)

    def merge(self, other: SampleLedger) -> None:
        """Add another rank's ledger to this one."""
        for epoch, (count, total, parity) in other._epochs.items():
            self._put(epoch, count, total, parity)

    def epochs(self) -> list[int]:
        """The epochs with an entry, ascending."""
        return sorted(self._epochs)

    def count(self, epoch: int) -> int:
        """Samples used in `epoch`, repeats included."""
        return self._epochs.get(epoch, (0, 0, 0))[0]

    def used_exactly_once(self, epoch: int, rows: int) -> bool:
        """Whether `epoch` used each of the ids 0 to rows - 1 exactly once."""
        return self._epochs.get(epoch) == _full_epoch(rows)

    @staticmethod
    def expected(rows: int) -> SampleLedger:
        """The ledger of one full epoch (entered as epoch 0) of `rows` samples, each used once.

        Takes about 30 ns per row the first time.
        """
        ledger = SampleLedger()
        ledger.add_full(0, rows)
        return ledger

    def to_json(self) -> dict[str, dict[str, int | str]]:
        """Plain JSON; the 64-bit figures as hex, since many readers of JSON round large numbers."""
        return {
            str(epoch): {"count": count, "sum": f"{total:016x}", "xor": f"{parity:016x}"}
            for epoch, (count, total, parity) in sorted(self._epochs.items())
        }

    @classmethod
    def from_json(cls, value: Any) -> SampleLedger:
        """The ledger that `to_json` wrote.

        Raises UsageError where the value is not one.
        """
        ledger = cls()
        try:
            for epoch, entry in value.items():
                count, total, parity = entry["count"], int(entry["sum"], 16), int(entry["xor"], 16)
                if type(count) is not int or count < 1 or not 0 <= total <= _MASK or not 0 <= parity <= _MASK:
                    raise ValueError(f"entry {entry}")  # noqa: TRY301 - all faults of the value get one sentence
                ledger._put(int(epoch), count, total, parity)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise UsageError(f"sample ledger: {shown(value)}; expected epoch -> count, sum, xor") from error
        return ledger

    def __eq__(self, other: object) -> bool:
        return isinstance(other, SampleLedger) and self._epochs == other._epochs

    __hash__ = None  # type: ignore[assignment]  # it changes with every step
