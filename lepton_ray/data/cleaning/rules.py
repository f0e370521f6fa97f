"""What is wrong with a value: types, ranges, patterns and sets, over Arrow arrays.

Each function takes an array and gives a mask of the values that fail. A missing value never fails here: whether it may
be missing is a rule of its own.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from lepton_ray.errors import UsageError, shown

Mask = npt.NDArray[np.bool_]

TYPES: dict[str, pa.DataType] = {
    "int64": pa.int64(),
    "float64": pa.float64(),
    "bool": pa.bool_(),
    "date": pa.date32(),
    "timestamp": pa.timestamp("us", tz="UTC"),
    "text": pa.string(),
}
_SHAPES = {
    # what Arrow's casts take and no more, so that nearly every cast succeeds at the first try
    "int64": r"^[+-]?[0-9]{1,19}$",
    "float64": r"(?i)^[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)(e[+-]?[0-9]{1,3})?$",
    "date": r"^[0-9]{4}-[0-9]{2}-[0-9]{2}$",
    "timestamp": r"^[0-9]{4}-[0-9]{2}-[0-9]{2}([T ][0-9]{2}:[0-9]{2}(:[0-9]{2}(\.[0-9]{1,6})?)?(Z|[+-][0-9]{2}:?[0-9]{2})?)?$",  # noqa: E501
}
_TRUE, _FALSE = ("true", "yes", "1", "t", "y"), ("false", "no", "0", "f", "n")


def missing(values: pa.Array) -> Mask:
    """Nulls, and floating point values that are no number."""
    mask: Mask = pc.is_null(values, nan_is_null=pa.types.is_floating(values.type)).to_numpy(zero_copy_only=False)
    return mask


def converted(values: pa.Array, to: str) -> tuple[pa.Array, Mask]:
    """The values in another type, null where they are none, and which of them are none.

    Args:
        values: of any type that a table keeps.
        to: a key of `TYPES`.

    Raises UsageError for a pair of types between which nothing is converted.
    """
    kind, wanted = values.type, TYPES[to]
    if kind == wanted:
        return values, np.zeros(len(values), bool)
    if pa.types.is_string(kind):
        return _read(pc.utf8_trim_whitespace(values), to)
    if to == "text" and not (pa.types.is_nested(kind) or pa.types.is_binary(kind)):
        return values.cast(pa.string()), np.zeros(len(values), bool)
    if to == "bool" and pa.types.is_integer(kind):
        wrong = _false_if_null(pc.invert(pc.is_in(values, pa.array([0, 1], kind))))
        return _without(values, wrong).cast(pa.bool_()), wrong
    numbers = pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind)
    times = pa.types.is_date(kind) or pa.types.is_timestamp(kind)
    if (numbers and to in ("int64", "float64")) or (times and to in ("date", "timestamp")):
        return _cast(values, wanted)
    raise UsageError(f"{kind} is not turned into {to}")


def _read(values: pa.Array, to: str) -> tuple[pa.Array, Mask]:
    """Text in another type."""
    if to == "bool":
        folded = pc.utf8_lower(values)
        true = pc.is_in(folded, pa.array(_TRUE))
        wrong = _false_if_null(pc.invert(pc.or_(true, pc.is_in(folded, pa.array(_FALSE)))), values)
        return pc.if_else(pc.or_(pc.is_null(values), pa.array(wrong)), pa.scalar(None, pa.bool_()), true), wrong
    wrong = _false_if_null(pc.invert(pc.match_substring_regex(values, _SHAPES[to])))
    kept = _without(values, wrong)
    if to == "int64":  # Arrow does not take the plus sign that people write
        kept = pc.replace_substring_regex(kept, r"^\+", "")
    if to == "timestamp":
        return _timestamps(kept, wrong)
    made, also = _cast(kept, TYPES[to])
    return made, wrong | also


def _timestamps(values: pa.Array, wrong: Mask) -> tuple[pa.Array, Mask]:
    """ISO 8601, in UTC where no zone is given."""
    bare = _false_if_null(pc.invert(pc.match_substring_regex(values, r"(Z|:[0-9]{2}[+-][0-9:]+|\.[0-9]+[+-][0-9:]+)$")))
    zoned, also = _cast(_without(values, bare), TYPES["timestamp"])
    local, more = _cast(_without(values, ~bare), pa.timestamp("us"))
    made = pc.if_else(pa.array(bare), pc.assume_timezone(local, "UTC"), zoned)
    return made, wrong | (also & ~bare) | (more & bare)


def _cast(values: pa.Array, to: pa.DataType) -> tuple[pa.Array, Mask]:
    """A cast that turns what does not fit into null, found by halving: as many casts as there are wrong values."""
    try:
        return values.cast(to), np.zeros(len(values), bool)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        if len(values) == 1:
            return pa.nulls(1, to), np.ones(1, bool)
    half = len(values) // 2
    (left, wrong_left), (right, wrong_right) = _cast(values[:half], to), _cast(values[half:], to)
    return pa.concat_arrays([left, right]), np.concatenate([wrong_left, wrong_right])


def outside(values: pa.Array, low: Any, high: Any) -> Mask:
    """Values below `low`, above `high`, or not finite; a bound that is None does not bind."""
    wrong = np.zeros(len(values), bool)
    if pa.types.is_floating(values.type):
        wrong |= _false_if_null(pc.invert(pc.is_finite(values)))
    if low is not None:
        wrong |= _false_if_null(pc.less(values, bound(low, values.type)))
    if high is not None:
        wrong |= _false_if_null(pc.greater(values, bound(high, values.type)))
    return wrong


def bound(value: Any, kind: pa.DataType) -> pa.Scalar:
    """A bound of a range in a type that compares with the column's. Raises UsageError."""
    try:
        if pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind):
            if isinstance(value, str):
                raise UsageError(f"{shown(value)} is text; expected a number for a column of {kind}")
            return pa.scalar(float(value))
        if not isinstance(value, str):
            raise UsageError(f"{shown(value)} is a number; expected a date such as '2024-01-31' for a column of {kind}")
        made, wrong = converted(pa.array([value]), "date" if pa.types.is_date(kind) else "timestamp")
        if wrong[0]:
            raise UsageError(f"{shown(value)} is no date; expected one such as '2024-01-31'")
        return made[0] if pa.types.is_date(kind) or kind.tz else made.cast(kind)[0]
    except (pa.ArrowException, ValueError) as error:
        raise UsageError(f"{shown(value)}: does not fit a column of {kind}") from error


def unmatched(values: pa.Array, regex: str) -> Mask:
    """Text that the regular expression does not match as a whole."""
    return _false_if_null(pc.invert(pc.match_substring_regex(values, rf"^(?:{regex})$")))


def among(values: pa.Array, options: list[Any]) -> Mask:
    """Values that equal one of the options; an option of another type equals none."""
    mask: Mask = pc.is_in(values, fitting(options, values.type)).to_numpy(zero_copy_only=False)
    return mask


def not_among(values: pa.Array, options: list[Any]) -> Mask:
    """Values, missing ones aside, that equal none of the options."""
    wrong: Mask = ~among(values, options) & values.is_valid().to_numpy(zero_copy_only=False)
    return wrong


def fitting(options: list[Any], kind: pa.DataType) -> pa.Array:
    """The options that are values of a type."""
    kept = []
    for option in options:
        if pa.types.is_boolean(kind) != isinstance(option, bool) or pa.types.is_string(kind) != isinstance(option, str):
            continue
        try:
            kept.append(pa.scalar(option, kind).as_py())
        except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError):
            continue  # e.g. 2.5 in a column of whole numbers
    return pa.array(kept, kind)


def _false_if_null(mask: Any, values: pa.Array | None = None) -> Mask:
    """A mask of Arrow as numpy has it; where the value is missing, false."""
    made: Mask = pc.fill_null(mask, False).to_numpy(zero_copy_only=False)
    return made & values.is_valid().to_numpy(zero_copy_only=False) if values is not None else made


def _without(values: pa.Array, wrong: Mask) -> pa.Array:
    """The values with null for those that are wrong."""
    return pc.if_else(pa.array(wrong), pa.scalar(None, values.type), values) if wrong.any() else values
