"""How rows fit into a table: the same columns, or others on request; never a changed value.

A table's column keeps its type for good. On request new columns join (rows from before have nothing there), rows may
lack columns of the table, and a narrower number goes into a wider column of the table where none is rounded.
"""

from __future__ import annotations

import pyarrow as pa

from lepton_ray.data.partitions import Values
from lepton_ray.errors import UsageError, shown

_WIDER = {
    pa.int8(): {pa.int16(), pa.int32(), pa.int64(), pa.float32(), pa.float64()},
    pa.int16(): {pa.int32(), pa.int64(), pa.float32(), pa.float64()},
    pa.int32(): {pa.int64(), pa.float64()},
    pa.float32(): {pa.float64()},
}
"""Types that hold every value of another."""


def joined_schema(table: pa.Schema, rows: pa.Schema, where: str, *, evolve: bool) -> pa.Schema:
    """The schema of a table that takes in rows: its own, and with `evolve` the columns that are new after them.

    Args:
        table: its schema.
        rows: theirs.
        where: the table, for messages.
        evolve: whether columns may be new, missing or narrower.

    Raises UsageError naming the first column that does not fit, what it holds and what was expected.
    """
    hint = "--evolve takes them in" if not evolve else "rename it or convert it in the source"
    new = [field for field in rows if field.name not in table.names]
    missing = [field for field in table if field.name not in rows.names]
    if not evolve and (new or missing):
        found = [*(f"new {shown(field.name)} of {field.type}" for field in new)]
        found += [f"no {shown(field.name)} of {field.type}" for field in missing]
        raise UsageError(f"table {where}: rows with other columns, {shown(', '.join(found), 200)}; {hint}")
    for field in rows:
        if field.name not in table.names:
            continue
        kept = table.field(field.name).type
        if field.type != kept and not (evolve and kept in _WIDER.get(field.type, ())):
            widens = kept in _WIDER.get(field.type, ())
            advice = "--evolve takes it, no value changes" if widens else "convert it in the source"
            raise UsageError(
                f"table {where}: column {shown(field.name)} of the rows is {field.type}, the table's {kept}; {advice}"
            )
    lower = {name.lower(): name for name in table.names}
    for field in new:
        if field.name.lower() in lower:
            other = shown(lower[field.name.lower()])
            raise UsageError(
                f"table {where}: columns {other} and {shown(field.name)}; names must differ in more than case"
            )
    return pa.schema([*table, *new])


def fitted(rows: pa.Table, schema: pa.Schema, partition: Values = ()) -> pa.Table:
    """Rows with the columns of a schema in its order.

    A column that they lack is filled with its value in `partition` (a Delta table of another program has that in its
    log alone), else it is missing in each row. Types must be those of the schema, or narrower.
    """
    known = dict(partition)
    columns = []
    for field in schema:
        if field.name in rows.column_names:
            column = rows[field.name]
            columns.append(column if column.type == field.type else column.cast(field.type))
        elif known.get(field.name) is not None:
            value = pa.array([known[field.name]]).cast(field.type)[0]
            columns.append(pa.chunked_array([pa.repeat(value, rows.num_rows)]))
        else:
            columns.append(pa.chunked_array([pa.nulls(rows.num_rows, field.type)]))
    return pa.table(columns, schema=schema)
