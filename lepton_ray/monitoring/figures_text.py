"""Figures as people read them: durations, sizes, shares, scores. A value that is absent or no number is `-`."""

from __future__ import annotations

import math
from datetime import UTC, datetime
from typing import Any

_SHARES = ("accuracy", "precision", "recall", "f1", "top5")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def number(value: Any) -> str:
    """Four significant digits, thousands separated: `1,860`, `0.08301`."""
    if not _is_number(value):
        return "-"
    if abs(value) >= 1000 or float(value).is_integer():
        return f"{value:,.0f}"
    return f"{value:.4g}"


def percent(value: Any) -> str:
    """A share as per cent: `57.6%`."""
    return f"{100 * value:.1f}%" if _is_number(value) else "-"


def score(name: str, value: Any) -> str:
    """A metric: shares such as accuracy with two digits of per cent, others as numbers."""
    if _is_number(value) and 0 <= value <= 1 and any(share in name.lower() for share in _SHARES):
        return f"{100 * value:.2f}%"
    return number(value)


def duration(seconds: Any) -> str:
    """`430 ms`, `45.6 s`, `2 min 14 s`, `3 h 05 min`, `2 d 4 h`."""
    if not _is_number(seconds):
        return "-"
    if seconds < 1:
        return "0 s" if seconds <= 0 else f"{1000 * seconds:.3g} ms"
    if seconds < 60:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    if whole < 48 * 3600:
        return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    return f"{whole // 86400} d {whole % 86400 // 3600} h"


def brief_duration(seconds: Any) -> str:
    """A duration for narrow places: `2m 14s`."""
    text = duration(seconds)
    if text.count(" ") < 2:
        return text
    return text.replace(" min", "m").replace(" h", "h").replace(" d", "d").replace(" s", "s")


def data_size(value: Any) -> str:
    """`2.68 MiB`."""
    if not _is_number(value):
        return "-"
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(value) < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.3g} {unit}"
        value /= 1024
    return f"{value:.4g} TiB"


def clock_time(at: Any) -> str:
    """Unix seconds as `2026-03-01 14:05:09 UTC`."""
    if not _is_number(at) or not 0 <= at < 253_402_300_800:
        return "-"
    return datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
