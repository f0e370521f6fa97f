"""Rows in memory become a table version, the same rows the same version."""

from __future__ import annotations

import pandas as pd
import pyarrow as pa
import pytest
from digits_slice import digits_slice

from lepton_ray.data.tables import arrow_of, table_of
from lepton_ray.errors import UsageError
from lepton_ray.storage import Store


def test_a_version_is_written_once_for_the_same_rows(file_store: Store) -> None:
    """Other rows make a new version; rows that a version holds already find that version again."""
    first = table_of(file_store, "rows", digits_slice(40))
    assert (first.version, first.read().num_rows) == (0, 40)
    other = table_of(file_store, "rows", digits_slice(20))
    assert (other.version, other.read().num_rows) == (1, 20)
    again = table_of(file_store, "rows", digits_slice(40))
    assert again.version == 0
    assert again.fingerprint() == first.fingerprint()


def test_a_frame_is_a_table() -> None:
    """A pandas frame comes over with its columns, without its index or metadata."""
    rows = arrow_of(pd.DataFrame({"text": ["a", "b"], "label": [0, 1]}))
    assert rows.column_names == ["text", "label"]
    assert rows.num_rows == 2
    assert rows.schema.metadata is None


def test_a_hugging_face_data_set_is_a_table() -> None:
    """Its Arrow table is taken, in the order of its own selection."""

    class Selected:
        _indices = None

        def __init__(self) -> None:
            self.data = type("Data", (), {"table": pa.table({"label": [3, 1]})})()

    assert arrow_of(Selected()).to_pydict() == {"label": [3, 1]}


def test_what_holds_no_rows_is_refused() -> None:
    """The message names the type and what is accepted."""
    with pytest.raises(UsageError, match="'int' holds no table; expected an Arrow table"):
        arrow_of(3)
