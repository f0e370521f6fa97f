"""Columns are kept in types a table has, with no value changed; types that could run code are refused."""

from __future__ import annotations

import base64
import contextlib
from decimal import Decimal

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lepton_ray.data.column_types import MAX_COLUMNS, refuse_extensions, refuse_marked_extensions, storable
from lepton_ray.errors import RefusedError, UsageError


class Trap(pa.ExtensionType):
    """A type of another library, as one that unpickles what it finds."""

    def __init__(self) -> None:
        super().__init__(pa.int64(), "lepton.trap")

    def __arrow_ext_serialize__(self) -> bytes:
        return b""

    @classmethod
    def __arrow_ext_deserialize__(cls, storage_type, serialized) -> Trap:
        return cls()


TRAPS = [
    Trap(),
    pa.list_(Trap()),
    pa.struct([("a", pa.list_(pa.struct([("b", Trap())])))]),
    pa.map_(pa.string(), Trap()),
    pa.json_(),
    pa.uuid(),
    pa.opaque(pa.binary(), "type", "vendor"),
]


@pytest.mark.parametrize("kind", TRAPS, ids=str)
def test_extension_types_are_refused_at_any_depth(kind):
    """The harmless ones, too: one rule that nobody has to think about."""
    with pytest.raises(RefusedError, match="column 'x' is of an Arrow extension type"):
        refuse_extensions(pa.schema([("ok", pa.int64()), ("x", kind)]), "source 'a'")


def test_extensions_of_unknown_libraries_are_seen_by_their_mark():
    """Where no library registered the type, Arrow shows a plain column with a note: the note is enough."""
    field = pa.field("x", pa.binary(), metadata={"ARROW:extension:name": "ray.data.arrow_pickled_object"})
    with pytest.raises(RefusedError):
        refuse_extensions(pa.schema([field]), "rows")


@pytest.mark.parametrize("name", ["x", "xy", "xyz", "xyzw"])
@pytest.mark.parametrize("in_file", [False, True])
def test_parquet_is_judged_by_the_bytes_of_its_footer(tmp_path, name, in_file):
    """Wherever in the encoded schema the announcement lies; before the library opens the file."""
    for column, refused in [(pa.ExtensionArray.from_storage(Trap(), pa.array([1])), True), (pa.array([1]), False)]:
        path = tmp_path / "a.parquet"
        pq.write_table(pa.table({name: column, "other": pa.array(["ARROW:extension:name"])}), path)
        with pytest.raises(RefusedError, match="file") if refused else contextlib.nullcontext():
            refuse_marked_extensions(path if in_file else path.read_bytes(), "file")


@pytest.mark.parametrize("before", range(7))
def test_announcement_is_seen_at_every_place(before):
    """Base64 shows the same bytes in three ways, depending on how many stand before them."""
    encoded = base64.b64encode(b"?" * before + b"ARROW:extension:name" + b"!" * 9)
    with pytest.raises(RefusedError):
        refuse_marked_extensions(b"PAR1" + encoded + len(encoded).to_bytes(4, "little") + b"PAR1", "file")


@pytest.mark.parametrize("data", [b"", b"PAR1", b"\xff" * 100])
def test_what_is_no_parquet_is_left_to_the_reader(data):
    """It will say what is wrong with it."""
    refuse_marked_extensions(data, "file")


@pytest.mark.parametrize(
    ("values", "kept"),
    [
        (pa.array([255], pa.uint8()), pa.int16()),
        (pa.array([2**32 - 1], pa.uint32()), pa.int64()),
        (pa.array([2**63 - 1], pa.uint64()), pa.int64()),
        (pa.array([1.5], pa.float16()), pa.float32()),
        (pa.array(["a"], pa.large_string()), pa.string()),
        (pa.array(["a"]).dictionary_encode(), pa.string()),
        (pa.array([b"ab"], pa.binary(2)), pa.binary()),
        (pa.array([1], pa.timestamp("s")), pa.timestamp("us")),
        (pa.array([1], pa.timestamp("ms", "Europe/Berlin")), pa.timestamp("us", "UTC")),
        (pa.array([Decimal("1.25")]), pa.decimal128(3, 2)),
        (pa.array([True]), pa.bool_()),
        (pa.array([[1]], pa.large_list(pa.uint8())), pa.list_(pa.field("element", pa.int16()))),
    ],
    ids=lambda value: str(getattr(value, "type", value)),
)
def test_values_survive_the_change_of_type(values, kept):
    """The next wider type that a Delta table has, never one in which a value would wrap."""
    column = storable(pa.table({"x": values}), "rows")["x"]
    assert column.type == kept
    assert column.to_pylist() == values.to_pylist()


@pytest.mark.parametrize(
    "values",
    [
        pa.array([2**63], pa.uint64()),
        pa.array([1], pa.timestamp("ns")),
        pa.array([1], pa.time64("us")),
        pa.array([1], pa.duration("s")),
        pa.array([{"a": 1}]),
        pa.array([None], pa.null()),
    ],
    ids=lambda values: str(values.type),
)
def test_what_does_not_fit_is_named(values):
    """An error with the column, not a silently changed value."""
    with pytest.raises(UsageError, match="rows: column 'x'"):
        storable(pa.table({"x": values}), "rows")


@pytest.mark.parametrize("names", [["a", "a"], ["a", "A"], [""], ["a\nb"], ["x" * 256], ["\x1b[31m"]])
def test_names_must_be_plain_and_differ(names):
    """Names that a reader of another kind, a terminal or a person would take for the same or for commands."""
    with pytest.raises(UsageError, match="column"):
        storable(pa.table([pa.array([1])] * len(names), names=names), "rows")


def test_number_of_columns_is_bounded():
    """A file with a million columns is no table."""
    columns = [pa.array([1])] * (MAX_COLUMNS + 1)
    with pytest.raises(UsageError, match="at most 10000"):
        storable(pa.table(columns, names=[f"c{index}" for index in range(len(columns))]), "rows")
