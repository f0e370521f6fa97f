"""JSON lines become rows, and a line that is none is named by its number."""

from __future__ import annotations

import pyarrow as pa
import pytest

from lepton_ray.data.sources import json_lines
from lepton_ray.data.sources.json_lines import read_json_lines
from lepton_ray.data.sources.streams import Job
from lepton_ray.errors import UsageError
from lepton_ray.settings import LimitSettings, ReadingSettings
from lepton_ray.storage import find_inputs

BLOCK = 1000
MANY = b'{"a": 1}\n' * 500


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """A few kilobytes are many blocks."""
    monkeypatch.setattr(json_lines, "BLOCK_BYTES", BLOCK)


def rows_of(tmp_path, content: bytes, line_bytes: int = 4 * BLOCK, **types: str) -> pa.Table:
    (tmp_path / "a.jsonl").write_bytes(content)
    (file,) = find_inputs(str(tmp_path / "a.jsonl"), 1).inputs
    reading = ReadingSettings(types=types, limits=LimitSettings(max_row_bytes=line_bytes))
    return pa.concat_tables(read_json_lines(Job(file, "source 'a'", reading), None))


def test_rows_are_read_over_many_blocks(tmp_path):
    """Missing names are missing values; empty lines and a missing last line end are fine."""
    lines = b"".join(b'{"a": %d, "b": "\xc3\xa4%d"}\n' % (row, row) for row in range(400))
    rows = rows_of(tmp_path, lines + b'\n  \n{"a": null}\r\n{"b": "last"}')
    assert rows["a"].to_pylist() == [*range(400), None, None]
    assert rows["b"].to_pylist() == [*(f"\u00e4{row}" for row in range(400)), None, "last"]


def test_types_come_from_the_first_block(tmp_path):
    """Numbers, text, true and false, lists; whole numbers fit where fractions came first."""
    rows = rows_of(tmp_path, b'{"a": 1.5, "b": "x", "c": true, "d": [1, 2]}\n' * 100 + b'{"a": 2}\n')
    assert [str(kind) for kind in rows.schema.types] == ["double", "string", "bool", "list<item: int64>"]
    assert rows["a"][-1].as_py() == 2.0


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{]\n", "line 1: no JSON"),
        (MANY + b"{]\n", "line 501: no JSON"),
        (b'{"a": 1}\n{"a": "x"}\n', "line 2: column 'a': 'x', "),
        (MANY + b'{"a": "1"}\n', "line 501: column 'a': '1', "),
        (MANY + b'{"a": true}\n', "line 501: column 'a': True"),
        (b'{"a": 1}\n{"a": true}\n', "line 2: column 'a': True"),
        (b'{"a": [1]}\n{"a": ["x"]}\n', "line 2: column 'a'"),
        (b'{"a": "\\ud800"}\n', "line 1: column 'a'"),
        (MANY + b'{"a": 1.5}\n', "line 501: column 'a': 1.5, holds double; expected int64"),
        (MANY + b'{"b": 1}\n', "column 'b' is not in the lines before"),
        (b'{"a": 1, "a": 2}\n', "a name stands twice"),
        (b'{"a": NaN}\n', "NaN is no JSON"),
        (b'{"a": -Infinity}\n', "Infinity is no JSON"),
        (b'{"a": ' + b"9" * 3000 + b"}\n", "column 'a'"),
        (b'{"a": "\xff"}\n', "line 1: no JSON"),
        (b"[1, 2]\n", "expected an object"),
        (b"null\n", "expected an object"),
        (b'{"a": null}\n', "column 'a' has no values"),
        (b'{"a": "' + b"x" * 5000 + b'"}\n', "line 1: has more than 4000 bytes"),
    ],
    ids=lambda value: str(value)[:30] if isinstance(value, str) else "",
)
def test_fault_is_named_by_line(tmp_path, content, message):
    """In one line, with nothing turned into something else in silence."""
    with pytest.raises(UsageError, match=f"^source 'a'.*{message}") as caught:
        rows_of(tmp_path, content)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 400


def test_types_can_be_given(tmp_path):
    """Numbers as text where the user wants text, dates out of text; a value that does not fit is named."""
    rows = rows_of(tmp_path, b'{"a": 1, "day": "2024-02-29", "b": null}\n', a="float", day="date", b="int")
    assert [str(kind) for kind in rows.schema.types] == ["double", "date32[day]", "int64"]
    with pytest.raises(UsageError, match="line 2: column 'day': 'someday'"):
        rows_of(tmp_path, b'{"day": "2024-02-29"}\n{"day": "someday"}\n', day="date")
    with pytest.raises(UsageError, match="no column 'c'"):
        rows_of(tmp_path, b'{"a": 1}\n', c="int")


def test_deep_nesting_is_an_error_and_no_crash(tmp_path):
    """A hundred thousand brackets end the process of a reader that recurses natively."""
    with pytest.raises(UsageError, match="line 1: no JSON"):
        rows_of(tmp_path, b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}\n", 10**6)
