"""Bad input on its way into a table: what is left out is counted, too much of it ends the ingest, none is half done."""

from __future__ import annotations

import json
import pathlib
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from lepton_ray.data.images import pack_images
from lepton_ray.data.tables import ingest, list_tables, open_table
from lepton_ray.errors import LeptonError, RefusedError, UsageError
from lepton_ray.settings import CleaningSettings, LimitSettings, ReadingSettings


def pictures(folder: pathlib.Path, good: int, bad: int = 0) -> str:
    """Images of two classes, the bad ones cut short."""
    for number in range(good + bad):
        path = folder / ("cat" if number % 2 else "dog") / f"{number:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(number).integers(0, 256, (8, 8, 3), np.uint8)
        Image.fromarray(pixels).save(path)
        if number >= good:
            path.write_bytes(path.read_bytes()[:60])
    return str(folder)


def test_rejected_files_are_counted_up_to_a_share(store, tmp_path):
    """One in a hundred by default; with more, nothing is written and the first is named."""
    report = ingest(store, "few", pictures(tmp_path / "few", 99, 1))
    assert (report.rows_read, report.rows_written, report.rejected) == (100, 99, 1)
    assert report.reasons == {"image cannot be decoded": 1}
    assert report.labels == {"0": 49, "1": 50}
    assert len(report.source_sha256) == 64
    many = pictures(tmp_path / "many", 98, 2)
    with pytest.raises(UsageError, match=r"2 of 100 rows rejected, more than 0.01.*cat/099.png'?: image cannot be dec"):
        ingest(store, "many", many)
    assert list_tables(store) == ["few"]
    assert store.list("datasets/many") == []
    reading = ReadingSettings(limits=LimitSettings(max_rejected_share=0.02))
    assert ingest(store, "many", many, reading=reading).rejected == 2


def test_strict_ingest_takes_all_or_nothing(file_store, tmp_path):
    """A duplicate, a missing value, a value that cannot be, a rejected cell, a file listed twice: each ends it."""
    good = {"a": [1.0, 2.0], "b": ["x", "y"]}
    bad = [
        {"a": [1.0, 1.0], "b": ["x", "x"]}, {"a": [1.0, None], "b": ["x", "y"]},
        {"a": [1.0, float("nan")], "b": ["x", "y"]}, {"a": [1.0, float("-inf")], "b": ["x", "y"]},
    ]  # fmt: skip
    for rows in bad:
        with pytest.raises(UsageError, match="strict, and not all of it is good: '1 "):
            ingest(file_store, "t", pa.table(rows), strict=True)
    folder = tmp_path / "twice"
    folder.mkdir()
    for name in ("one", "two"):
        pq.write_table(pa.table(good), folder / f"{name}.parquet")
    with pytest.raises(UsageError, match="is the same as"):
        ingest(file_store, "t", str(folder), strict=True)
    assert file_store.list("datasets") == []
    assert ingest(file_store, "t", pa.table(good), strict=True).rows_written == 2
    report = ingest(file_store, "u", str(folder))
    assert (report.duplicates, len(report.warnings)) == (2, 1)
    kept = ingest(file_store, "v", str(folder), cleaning=CleaningSettings(drop_duplicates=False))
    assert kept.rows_written == 4


def test_values_at_the_edge_of_a_float_stay_what_they_are(file_store):
    """1e308 and denormal numbers are numbers."""
    values = [1e308, -1e308, 5e-324, 0.1]
    ingest(file_store, "t", pa.table({"a": values}))
    assert open_table(file_store, "t").read()["a"].to_pylist() == values


@pytest.mark.parametrize("labels", [["cat", "dog"], [1.0, 2.0000001], [1.0, float("nan")], [0, -1], [0, 7]], ids=str)
def test_labels_that_are_none_never_reach_training(file_store, labels):
    """Text, fractions, no number, below zero, beyond the classes: told by the ingest or by the task, in one line."""
    from lepton_ray.tasks.image_classification import ImageClassification, ImageClassificationOptions

    raw = pa.table({**pack_images(np.zeros((2, 8, 8), np.uint8)), "label": labels, "n": [1, 2]})
    task = ImageClassification(ImageClassificationOptions(classes=5))

    def ingest_and_fit() -> None:
        ingest(file_store, "t", raw, strict=True)
        task.fit(open_table(file_store, "t").read())

    with pytest.raises(UsageError, match="label"):
        ingest_and_fit()
    if not all(isinstance(label, int) for label in labels):
        with pytest.raises(UsageError, match="column label holds"):
            task.fit(raw)


def good_lines(count: int) -> str:
    return "".join(json.dumps({"a": number, "b": "x" * 50}) + "\n" for number in range(count))


LATE_FAULTS = {
    "a.csv": "a,b\n" + "".join(f"{number},x\n" for number in range(20_000)) + "oops,x\n",
    "b.csv": "a,b\n" + "".join(f"{number},x\n" for number in range(20_000)) + "1,x\0\n",
    "a.jsonl": good_lines(40_000) + '{"a": "1", "b": "x"}\n',
    "b.jsonl": good_lines(40_000) + '{"a": 1',
}


@pytest.mark.parametrize("name", LATE_FAULTS)
def test_fault_at_the_end_leaves_nothing_behind(store, tmp_path, monkeypatch, name):
    """Data files of earlier rows had been written; they are gone again, and the table is what it was."""
    monkeypatch.setattr("lepton_ray.data.parts.PART_BYTES", 50_000)
    ingest(store, "t", pa.table({"key": ["k"], "a": [1], "b": ["x"]}))
    before = [entry.key for entry in store.list("datasets")]
    (tmp_path / name).write_text(LATE_FAULTS[name])
    reading = ReadingSettings(limits=LimitSettings(max_row_bytes=10_000))
    for mode in ("append", "overwrite"):
        with pytest.raises(UsageError, match=f"{name}'.*(row|line) "):
            ingest(store, "t", str(tmp_path / name), mode=mode, reading=reading)
    assert [entry.key for entry in store.list("datasets")] == before
    assert open_table(store, "t").version == 0


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    program = [sys.executable, "-m", "lepton_ray.cli", *arguments]
    return subprocess.run(program, capture_output=True, text=True, timeout=120, check=False)


def test_faults_have_their_exit_code_and_one_line(tmp_path):
    """As a user meets them: 2 for bad input, 4 for what may run code; no traceback, and one JSON document."""
    store = ("--store", (tmp_path / "store").as_uri())
    (tmp_path / "a.csv").write_text("a,b\n1,2\n3\n")
    (tmp_path / "a.pkl").write_bytes(b"x")
    cases = [
        (["a.csv"], 2, "row 2: 1 values, '3'; expected 2"),
        (["a.pkl"], 4, "may run code"),
        (["a.csv", "--limit", "max_cell=5"], 2, "did you mean 'max_cell_bytes'?"),
    ]
    for (name, *options), code, message in cases:
        done = command("data", "ingest", str(tmp_path / name), "t", *options, *store)
        assert done.returncode == code, done.stderr
        assert message in done.stderr
        assert len(done.stderr.splitlines()) == 1
        assert done.stdout == ""
    assert not (tmp_path / "store").exists() or not list((tmp_path / "store" / "datasets").glob("*"))
    folder = pictures(tmp_path / "pictures", 20, 1)
    done = command("data", "ingest", folder, "t", "--limit", "max_rejected_share=0.5", "--json", *store)
    report = json.loads(done.stdout)
    assert (report["rows_written"], report["rejected_rows"][0]["rule"]) == (20, "image cannot be decoded")


@pytest.mark.parametrize("error", [RefusedError, UsageError])
def test_source_is_looked_at_before_the_store_is(tmp_path, error):
    """A source that is none makes no folder."""
    from lepton_ray.storage import open_store

    name = "a.pkl" if error is RefusedError else "a.xyz"
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(LeptonError) as caught:
        ingest(open_store((tmp_path / "store").as_uri()), "t", str(tmp_path / name))
    assert type(caught.value) is error
    assert not (tmp_path / "store").exists()
