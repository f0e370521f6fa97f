"""Rules over several columns of a row, e.g. `begin <= end and kind in ("a", "b")`, worked out on Arrow columns.

A rule is parsed by Python's parser and then worked out here, node by node, with Arrow's kernels; nothing of it is ever
run as Python. What is not named below is refused. As in SQL a comparison with a missing value is neither true nor
false, and a row fails only where the rule is false.
"""

from __future__ import annotations

import ast
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from lepton_ray.errors import UsageError, shown

Mask = npt.NDArray[np.bool_]

_COMPARE: dict[type, Callable[[Any, Any], Any]] = {
    ast.Eq: pc.equal,
    ast.NotEq: pc.not_equal,
    ast.Lt: pc.less,
    ast.LtE: pc.less_equal,
    ast.Gt: pc.greater,
    ast.GtE: pc.greater_equal,
}
_ARITHMETIC: dict[type, Callable[[Any, Any], Any]] = {
    ast.Add: pc.add_checked,
    ast.Sub: pc.subtract_checked,
    ast.Mult: pc.multiply_checked,
}
MAX_NODES = 500
"""Parts of a rule at most."""


class Rule:
    """A parsed rule.

    Raises UsageError for what is no rule, naming the part that is not understood.
    """

    def __init__(self, text: str) -> None:
        self.text = text
        try:
            self._tree = ast.parse(text, mode="eval").body
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            raise UsageError(f"rule {shown(text)}: {shown(str(error))}; expected e.g. begin <= end") from error
        nodes = list(ast.walk(self._tree))
        if len(nodes) > MAX_NODES:
            raise UsageError(f"rule {shown(text)}: {len(nodes)} parts; at most {MAX_NODES}")
        self.columns: set[str] = set()
        self._note_columns(self._tree)

    def check(self, schema: pa.Schema) -> None:
        """Raise UsageError where the rule cannot be worked out on rows of this schema."""
        missing = sorted(self.columns - set(schema.names))
        if missing:
            raise UsageError(f"no column {shown(missing[0])}; the table has {shown(', '.join(schema.names), 200)}")
        self.failing(schema.empty_table())

    def failing(self, rows: pa.Table) -> Mask:
        """The rows for which the rule is false."""
        try:
            result = self._value(self._tree, rows)
        except (pa.ArrowException, OverflowError) as error:
            raise UsageError(f"rule {shown(self.text)}: {shown(' '.join(str(error).split()), 200)}") from error
        if isinstance(result, pa.Scalar):
            result = pa.chunked_array([pa.repeat(result, rows.num_rows)])
        if not pa.types.is_boolean(result.type):
            raise UsageError(f"rule {shown(self.text)}: gives {result.type}; expected true or false, e.g. begin <= end")
        mask: Mask = pc.invert(pc.fill_null(result, True)).to_numpy()
        return mask

    def _note_columns(self, node: ast.AST) -> None:
        if isinstance(node, ast.Name):
            self.columns.add(node.id)
        elif isinstance(node, ast.Call):
            name = self._function(node)
            if name == "column":
                argument = node.args[0]
                if not isinstance(argument, ast.Constant) or not isinstance(argument.value, str):
                    raise self._not_understood(node)
                self.columns.add(argument.value)
            else:
                self._note_columns(node.args[0])
        else:
            for child in ast.iter_child_nodes(node):
                self._note_columns(child)

    def _function(self, node: ast.Call) -> str:
        known = isinstance(node.func, ast.Name) and node.func.id in ("column", "missing", "length")
        if not known or len(node.args) != 1 or node.keywords:
            raise self._not_understood(node)
        return str(node.func.id)  # type: ignore[attr-defined] # a Name, see above

    def _value(self, node: ast.AST, rows: pa.Table) -> Any:
        """A column or a scalar."""
        if isinstance(node, ast.Name):
            return rows[node.id]
        if isinstance(node, ast.Constant) and isinstance(node.value, str | int | float | bool):
            return pa.scalar(node.value)
        kinds: dict[type, Callable[[Any, pa.Table], Any]] = {
            ast.Call: self._called,
            ast.BoolOp: self._joined,
            ast.UnaryOp: self._negated,
            ast.BinOp: self._reckoned,
            ast.Compare: self._compared,
        }
        if type(node) not in kinds:
            raise self._not_understood(node)
        return kinds[type(node)](node, rows)

    def _joined(self, node: ast.BoolOp, rows: pa.Table) -> Any:
        join = pc.and_kleene if isinstance(node.op, ast.And) else pc.or_kleene
        first, *others = (self._value(each, rows) for each in node.values)
        for other in others:
            first = join(first, other)
        return first

    def _negated(self, node: ast.UnaryOp, rows: pa.Table) -> Any:
        value = self._value(node.operand, rows)
        if isinstance(node.op, ast.Not):
            return pc.invert(value)
        if isinstance(node.op, ast.USub):
            return pc.negate_checked(value)
        raise self._not_understood(node)

    def _reckoned(self, node: ast.BinOp, rows: pa.Table) -> Any:
        left, right = self._value(node.left, rows), self._value(node.right, rows)
        if type(node.op) in _ARITHMETIC:
            return _ARITHMETIC[type(node.op)](left, right)
        if isinstance(node.op, ast.Div):  # by zero gives infinity, as for floating point, not an error
            return pc.divide(left.cast(pa.float64()), right.cast(pa.float64()))
        raise self._not_understood(node)

    def _called(self, node: ast.Call, rows: pa.Table) -> Any:
        name, argument = self._function(node), node.args[0]
        if name == "column":
            return rows[argument.value]  # type: ignore[attr-defined] # a Constant, see _note_columns
        value = self._value(argument, rows)
        if name == "missing":
            return pc.is_null(value, nan_is_null=pa.types.is_floating(value.type))
        return pc.binary_length(value) if pa.types.is_binary(value.type) else pc.utf8_length(value)

    def _compared(self, node: ast.Compare, rows: pa.Table) -> Any:
        """Comparisons, also chained: `0 <= x < y`."""
        result, left = None, self._value(node.left, rows)
        for operator, comparator in zip(node.ops, node.comparators, strict=True):
            if isinstance(operator, ast.In | ast.NotIn):
                here = self._is_in(left, comparator)
                here = pc.invert(here) if isinstance(operator, ast.NotIn) else here
                right = left
            elif type(operator) in _COMPARE:
                right = self._value(comparator, rows)
                here = _COMPARE[type(operator)](*_same_kind(left, right))
            else:
                raise self._not_understood(node)
            result = here if result is None else pc.and_kleene(result, here)
            left = right
        return result

    def _is_in(self, value: Any, node: ast.AST) -> Any:
        if not isinstance(node, ast.Tuple | ast.List | ast.Set) or not all(
            isinstance(each, ast.Constant) for each in node.elts
        ):
            raise self._not_understood(node)
        options = pa.array([each.value for each in node.elts], value.type)  # type: ignore[attr-defined]
        return pc.if_else(pc.is_null(value), pa.scalar(None, pa.bool_()), pc.is_in(value, options))

    def _not_understood(self, node: ast.AST) -> UsageError:
        part = ast.get_source_segment(self.text, node) if hasattr(node, "lineno") else type(node).__name__
        return UsageError(
            f"rule {shown(self.text)}: {shown(part or '')} is not understood; expected columns, numbers, text, "
            "+ - * /, comparisons, in, and, or, not, missing(), length(), column()"
        )


def _same_kind(left: Any, right: Any) -> tuple[Any, Any]:
    """Text beside a date or a time is read as one."""
    for one, other, swap in ((left, right, False), (right, left, True)):
        if pa.types.is_temporal(one.type) and isinstance(other, pa.Scalar) and pa.types.is_string(other.type):
            read = other.cast(one.type)
            return (read, one) if swap else (one, read)
    return left, right
