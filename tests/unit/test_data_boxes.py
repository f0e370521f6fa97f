"""Images with boxes, from COCO and Pascal VOC; annotations that do not fit are rejected or named."""

from __future__ import annotations

import io
import json
import math

import numpy as np
import pytest
from PIL import Image

from lepton_ray.data.sources import json_stream, open_source
from lepton_ray.data.sources.json_stream import json_entries
from lepton_ray.errors import UsageError

SIZE = (40, 30)


def image_at(path, size=SIZE) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.zeros((size[1], size[0], 3), np.uint8)).save(path)


def rows_of(folder, name=None) -> tuple[dict, list[dict]]:
    source = open_source(str(folder))
    rows = [row for batch in source.batches for row in batch.to_pylist()]
    return {found.file: found.rule for found in source.rejects.rows}, rows


def coco(**changes) -> dict:
    document = {
        "info": {"year": 2024},
        "images": [
            {"id": 5, "file_name": "a.png", "width": 40, "height": 30},
            {"id": 3, "file_name": "b.png", "width": 40, "height": 30},
            {"id": 9, "file_name": "none.png", "width": 40, "height": 30},
        ],
        "categories": [{"id": 7, "name": "dog"}, {"id": 2, "name": "tree"}],
        "annotations": [
            {"id": 1, "image_id": 5, "category_id": 7, "bbox": [1.5, 2, 10, 20.25], "segmentation": [[1, 2, 3]]},
            {"id": 2, "image_id": 5, "category_id": 2, "bbox": [0, 0, 40, 30], "iscrowd": 1},
        ],
    }
    return {**document, **changes}


def write_coco(folder, document) -> None:
    for name in ("a", "b"):
        image_at(folder / "images" / f"{name}.png")
    (folder / "annotations").mkdir()
    (folder / "annotations" / "instances.json").write_text(json.dumps(document))


@pytest.mark.parametrize("chunk", [7, 2**20])
def test_coco_boxes_become_lists(tmp_path, monkeypatch, chunk):
    """Corners in pixels, classes in the order of their ids; an image without boxes stays; one that is gone is told."""
    monkeypatch.setattr(json_stream, "CHUNK_BYTES", chunk)
    write_coco(tmp_path, coco())
    image_at(tmp_path / "images" / "c.png")
    rejected, (first, second) = rows_of(tmp_path)
    source = open_source(str(tmp_path))
    assert len(list(source.batches)) == 1
    assert source.warnings == ["1 files without an annotation, not read; one is 'images/c.png'"]
    assert first["key"] == "images/a.png"
    assert first["boxes"] == [[1.5, 2.0, 11.5, 22.25], [0.0, 0.0, 40.0, 30.0]]
    assert (first["labels"], first["class_names"], first["ignored"]) == ([1, 0], ["dog", "tree"], [False, True])
    assert (second["key"], second["boxes"], second["labels"]) == ("images/b.png", [], [])
    assert rejected == {"none.png": "file is missing"}


def box(*corners) -> dict:
    return coco(annotations=[{"id": 1, "image_id": 5, "category_id": 7, "bbox": list(corners)}])


@pytest.mark.parametrize(
    ("document", "rule"),
    [
        (box(0, 0, 0, 5), "box without area"),
        (box(3, 3, -2, 5), "box without area"),
        (box(math.nan, 3, 2, 5), "box without area"),
        (box(-5, 3, 10, 5), "box outside its image"),
        (box(30, 3, 12, 5), "box outside its image"),
        (coco(images=[{"id": 5, "file_name": "a.png", "width": 30, "height": 40}]), "annotation of another image"),
    ],
)
def test_boxes_that_cannot_be_are_rejected(tmp_path, document, rule):
    """With their image, by its name."""
    write_coco(tmp_path, document)
    rejected, _ = rows_of(tmp_path)
    assert rejected["images/a.png"] == rule


@pytest.mark.parametrize(
    ("document", "message"),
    [
        (coco(annotations=[{"image_id": 1, "category_id": 7, "bbox": [1, 2, 3, 4]}]), "entry 1: image_id 1 is not in"),
        (coco(annotations=[{"image_id": 5, "category_id": 1, "bbox": [1, 2, 3, 4]}]), "entry 1: category_id 1 is not"),
        (coco(annotations=[{"image_id": 5, "category_id": 7, "bbox": [1, 2, 3]}]), r"bbox \[1, 2, 3\]; expected"),
        (coco(annotations=[{"image_id": 5, "category_id": 7, "bbox": [1, 2, 3, "4"]}]), "expected .x, y, width"),
        (coco(annotations=[{"image_id": "5", "category_id": 7, "bbox": [1, 2, 3, 4]}]), "image_id is '5'; expected a"),
        (coco(annotations=[7]), "annotations entry 1: 7; expected an object"),
        (coco(annotations={}), "'{' where '\\[' was expected"),
        (coco(images=[{"id": 5, "file_name": "a.png"}] * 2), "images entry 2: id 5"),
        (coco(categories=[{"id": 7, "name": "a"}, {"id": 8, "name": "a"}]), "categories entry 2: id 8, name 'a'"),
        ({"images": []}, "no list 'annotations'"),
        ([], "'\\[' where '{' was expected"),
    ],
)
def test_coco_file_that_is_none_is_named_by_entry(tmp_path, document, message):
    """With the value and what was expected."""
    write_coco(tmp_path, document)
    with pytest.raises(UsageError, match=f"'annotations/instances.json'.*{message}"):
        rows_of(tmp_path)


@pytest.mark.parametrize(
    "text",
    ['{"a": [1, 2', '{"a": [1,, 2]}', '{"a": [1 2]}', '{"a": [1], "a": [2]}', '{"a": [1],}', "", "\x00",
     '{"a": ' + "[" * 200_000, '{"a": ["' + "x" * 2000 + '"]}'],
)  # fmt: skip
def test_json_that_is_cut_or_broken_is_an_error(text):
    """Never a crash, never half of the entries as if they were all."""
    with pytest.raises(UsageError, match=r"^here: "):
        list(json_entries(io.BytesIO(text.encode()), frozenset("a"), 1000, "here"))


@pytest.mark.parametrize("chunk", [1, 3, 1000])
def test_json_is_read_whatever_the_pieces(monkeypatch, chunk):
    """Numbers, escapes and characters of several bytes across their borders."""
    monkeypatch.setattr(json_stream, "CHUNK_BYTES", chunk)
    text = ' {"skip": {"a": [1]}, "a" : [ 12345 , -1.5e3, "\\u00e4\u00e4\\"]", {"b": [true, null]}, 7]\n, "n": 12 } '
    found = list(json_entries(io.BytesIO(text.encode()), frozenset("a"), 1000, "here"))
    assert found == [("a", 12345), ("a", -1500.0), ("a", '\u00e4\u00e4"]'), ("a", {"b": [True, None]}), ("a", 7)]


def voc(name: str, *objects: tuple, size=SIZE, head: str = "") -> str:
    found = "".join(
        f"<object><name>{label}</name><difficult>{hard}</difficult><bndbox><xmin>{x}</xmin><ymin>{y}</ymin>"
        f"<xmax>{right}</xmax><ymax>{low}</ymax></bndbox></object>"
        for label, hard, x, y, right, low in objects
    )
    width, height = size
    return (
        f"{head}<annotation><filename>{name}</filename><size><width>{width}</width><height>{height}</height></size>"
        f"{found}</annotation>"
    )


@pytest.mark.parametrize("folders", [("", ""), ("Annotations/", "JPEGImages/")])
def test_voc_boxes_become_lists(tmp_path, folders):
    """Beside the images or in a folder of their own; the image by its name in the file, or by that of the file."""
    xml, images = folders
    for name in ("a", "b"):
        image_at(tmp_path / f"{images}{name}.png")
    (tmp_path / xml).mkdir(exist_ok=True)
    (tmp_path / f"{xml}a.xml").write_text(voc("a.png", ("tree", 0, 1, 2, 10, 20.5), ("ant", 1, 0, 0, 40, 30)))
    (tmp_path / f"{xml}b.xml").write_text(
        voc("other.tif", head="<?xml version='1.0' encoding='utf-8'?>\n", size=(0, 0))
    )
    rejected, (first, second) = rows_of(tmp_path)
    assert rejected == {}
    assert first["key"] == f"{images}a.png"
    assert first["boxes"] == [[1.0, 2.0, 10.0, 20.5], [0.0, 0.0, 40.0, 30.0]]
    assert (first["labels"], first["class_names"], first["ignored"]) == ([1, 0], ["tree", "ant"], [False, True])
    assert (second["key"], second["boxes"]) == (f"{images}b.png", [])


ENTITIES = '<!DOCTYPE a [<!ENTITY x "y"><!ENTITY z "&x;&x;">]>'
BAD_XML = {
    "cut": voc("cut.png")[:-20],
    "html": "<html></html>",
    "entities": voc("entities.png", head=ENTITIES),
    "words": voc("words.png", ("tree", 0, "left", 2, 10, 20)),
    "nameless": voc("nameless.png", ("", 0, 1, 2, 10, 20)),
    "turned": voc("turned.png", ("tree", 0, 10, 2, 1, 20)),
    "sized": voc("sized.png", size=(30, 40)),
    "empty": "",
}


def test_bad_annotations_are_rejected_each_by_its_name(tmp_path):
    """Cut short, something else, with entities that could grow, with corners that cannot be."""
    for name, text in BAD_XML.items():
        image_at(tmp_path / f"{name}.png")
        (tmp_path / f"{name}.xml").write_text(text)
    (tmp_path / "gone.xml").write_text(voc("gone.png"))
    rejected, rows = rows_of(tmp_path)
    assert rows == []
    assert {name.partition(".")[0]: rule for name, rule in rejected.items()} == {
        **dict.fromkeys(["cut", "html", "entities", "words", "nameless", "empty"], "annotation cannot be read"),
        "turned": "box without area", "sized": "annotation of another image", "gone": "file is missing",
    }  # fmt: skip
