"""One sample's value in memory: counter, gauge, histogram. All cells of a recorder share its lock."""

from __future__ import annotations

import json
import math
import threading
from abc import ABC, abstractmethod
from bisect import bisect_left
from typing import Any


class Cell(ABC):
    """What a recorder keeps for one metric and one set of labels; each kind takes its own verbs."""

    __slots__ = ("_lock",)

    def __init__(self, lock: threading.Lock) -> None:
        self._lock = lock

    def add(self, amount: float) -> None:
        """Count `amount` more."""
        raise TypeError(f"{type(self).__name__.lower()}s cannot be counted")

    def set(self, value: float) -> None:
        """Replace the value."""
        raise TypeError(f"{type(self).__name__.lower()}s cannot be set")

    def observe(self, value: float) -> None:
        """Take one observation."""
        raise TypeError(f"{type(self).__name__.lower()}s cannot observe")

    @abstractmethod
    def sample(self) -> dict[str, Any]:
        """The cell's part of a JSON sample."""


class Gauge(Cell):
    """A value that goes up and down."""

    __slots__ = ("_value",)

    def __init__(self, lock: threading.Lock) -> None:
        super().__init__(lock)
        self._value = 0.0

    def set(self, value: float) -> None:
        """Replace the value."""
        self._value = float(value)

    def add(self, amount: float) -> None:
        """Add `amount`, which may be negative."""
        with self._lock:
            self._value += amount

    def sample(self) -> dict[str, Any]:
        """`{"value": ...}`."""
        return {"value": json_number(self._value)}


class Counter(Gauge):
    """A sum that only grows."""

    __slots__ = ()

    def set(self, value: float) -> None:
        """Not for counters; see `mirror`."""
        raise TypeError(f"a counter cannot be set to {value}")

    def mirror(self, value: float) -> None:
        """Take over a sum that is kept elsewhere and only grows, such as the CPU time of the process."""
        self._value = float(value)

    def add(self, amount: float) -> None:
        """Add `amount`. ValueError unless it is finite and 0 or more."""
        if not 0.0 <= amount < math.inf:
            raise ValueError(f"a counter grows by a finite amount, not by {amount}")
        with self._lock:
            self._value += amount


class Histogram(Cell):
    """Observations by bucket; `bounds` are the upper bounds, ascending, without +Inf."""

    __slots__ = ("_bounds", "_counts", "_sum")

    def __init__(self, lock: threading.Lock, bounds: tuple[float, ...]) -> None:
        super().__init__(lock)
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float) -> None:
        """Take one observation. ValueError unless it is finite and 0 or more."""
        if not 0.0 <= value < math.inf:
            raise ValueError(f"a histogram observes finite values of 0 or more, not {value}")
        index = bisect_left(self._bounds, value)
        with self._lock:
            self._counts[index] += 1
            self._sum += value

    def totals(self) -> tuple[tuple[int, ...], float]:
        """Observations per bucket (not cumulative, the last one above all bounds), and their sum."""
        with self._lock:
            return tuple(self._counts), self._sum

    def sample(self) -> dict[str, Any]:
        """`{"buckets": [[upper bound, observations], ..., ["+Inf", ...]], "sum": .., "count": ..}`, not cumulative."""
        bounds: list[float | str] = [*self._bounds, "+Inf"]
        return {
            "buckets": [list(pair) for pair in zip(bounds, self._counts, strict=True)],
            "sum": self._sum,
            "count": sum(self._counts),
        }


def json_number(value: float) -> float | str:
    """A number that strict JSON can hold: NaN and the infinities become strings as Prometheus writes them."""
    if math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else "+Inf" if value > 0 else "-Inf"


def as_json(value: dict[str, Any]) -> bytes:
    """Compact JSON bytes. ValueError for a number that JSON cannot hold."""
    return json.dumps(value, separators=(",", ":"), allow_nan=False).encode()
