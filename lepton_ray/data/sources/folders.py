"""Folders of images, recordings and texts: which file is which row, and what else is known of it.

Without a manifest the folders say it: `cat/1.png` is of class `cat`, `train/cat/1.png` of class `cat` and of the split
`train`, `1.png` of none. With one, its rows say it: a column names the file, all others become columns.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import pyarrow as pa

from lepton_ray.data.column_types import storable
from lepton_ray.data.sources.boxes import BOX_COLUMNS
from lepton_ray.data.sources.coco import coco_items
from lepton_ray.data.sources.csv_files import read_csv
from lepton_ray.data.sources.json_lines import read_json_lines
from lepton_ray.data.sources.media import IMAGES, MEDIA, Media
from lepton_ray.data.sources.media_rows import Item, MediaRows, Paths
from lepton_ray.data.sources.rejects import Unreadable
from lepton_ray.data.sources.shapes import Shape, ending_of
from lepton_ray.data.sources.streams import Job
from lepton_ray.data.sources.voc import voc_items
from lepton_ray.errors import UsageError, shown
from lepton_ray.storage import Input

SPLITS = {
    "train": "train", "training": "train", "test": "test", "testing": "test",
    "val": "validation", "valid": "validation", "validation": "validation", "dev": "validation",
}  # fmt: skip
"""Name of a folder -> the split it stands for, where all folders on its level are such."""
FILE_COLUMNS = ("file_name", "file", "path", "audio_filepath", "audio", "image", "filename")
"""Columns of a manifest that name the file, the first that is there."""
_CLASS_COLUMNS = pa.schema([("label", pa.int64()), ("class_name", pa.string())])
_SPLIT_COLUMN = pa.schema([("split", pa.string())])


def media_rows(shape: Shape, job: Job) -> tuple[MediaRows, Iterator[pa.Table]]:
    """The rows of a folder, and their tables. Raises UsageError as they are made; see the readers."""
    media = MEDIA.get(shape.format, IMAGES)
    extra, items = _items(shape, media, job)
    rows = MediaRows(media, extra, job.reading.limits, job.rejects, job.meter)
    return rows, rows.batches(items())


def _items(shape: Shape, media: Media, job: Job) -> tuple[pa.Schema, Callable[[], Iterator[Item]]]:
    """The columns that are known besides the files, and the items."""
    if shape.format == "voc":
        return BOX_COLUMNS, lambda: voc_items(shape.files, job.meter, job.where)
    if shape.manifest is not None:
        about = dataclasses.replace(job, input=shape.manifest, where=f"{job.where} {shown(shape.manifest.path)}")
        size, limit = shape.manifest.size, job.reading.limits.max_annotation_bytes
        if not 0 < size <= limit:
            raise UsageError(f"{about.where}: {size} bytes; expected 1 to {limit} (limit max_annotation_bytes)")
        if shape.format == "coco":
            return BOX_COLUMNS, lambda: _coco(shape, about)
        return _of_manifest(shape, media, about)
    return _of_folders(shape.files, job.where)


def _coco(shape: Shape, about: Job) -> Iterator[Item]:
    with about.open() as stream:
        yield from coco_items(stream, shape.files, about.reading.limits.max_row_bytes, about.where)


def _of_folders(files: list[Input], where: str) -> tuple[pa.Schema, Callable[[], Iterator[Item]]]:
    depths = {entry.path.count("/") for entry in files}
    if 0 in depths and len(depths) > 1:
        loose = next(entry.path for entry in files if "/" not in entry.path)
        raise UsageError(f"{where}: {shown(loose)} lies beside folders of classes; move it into one of them")
    tops = {entry.path.partition("/")[0] for entry in files} if 0 not in depths else set()
    split = bool(tops) and all(name.lower() in SPLITS for name in tops) and (len(tops) > 1 or depths != {1})
    place = 1 if split else 0
    if split and 1 in depths and len(depths) > 1:
        raise UsageError(f"{where}: some files lie right in {shown(', '.join(sorted(tops)))}, some in folders below")
    if not tops or (split and depths == {1}):
        schema = _SPLIT_COLUMN if split else pa.schema([])
        return schema, lambda: (Item(entry, entry.path, _split_of(entry, split)) for entry in files)
    names = sorted({entry.path.split("/")[place] for entry in files})
    classes = {name: at for at, name in enumerate(names)}

    def items() -> Iterator[Item]:
        for entry in files:
            name = entry.path.split("/")[place]
            label = {"label": classes[name], "class_name": name}
            yield Item(entry, entry.path, {**label, **_split_of(entry, split)})

    return pa.schema([*_CLASS_COLUMNS, *(_SPLIT_COLUMN if split else ())]), items


def _split_of(entry: Input, split: bool) -> dict[str, str]:
    return {"split": SPLITS[entry.path.partition("/")[0].lower()]} if split else {}


def _of_manifest(shape: Shape, media: Media, about: Job) -> tuple[pa.Schema, Callable[[], Iterator[Item]]]:
    """Items as a table of the folder has them."""
    reader = read_csv if ending_of(about.input.path) in (".csv", ".tsv") else read_json_lines
    uncounted = dataclasses.replace(about, meter=type(about.meter)())
    first = next(iter(reader(uncounted, None)), None)
    if first is None:
        raise UsageError(f"{about.where}: no rows in it")
    schema = storable(first.slice(0, 0), about.where).schema
    column = next((name for name in FILE_COLUMNS if name in schema.names), None)
    if column is None or not pa.types.is_string(schema.field(column).type):
        has = shown(", ".join(schema.names), 120)
        raise UsageError(f"{about.where}: has {has}; expected a column of file names: {', '.join(FILE_COLUMNS)}")
    # `duration` and the like of the manifest stay; what would stand twice cannot
    extra = pa.schema([field for field in schema if field.name != column])
    twice = [name for name in extra.names if name in (*media.columns.names, "key")]
    if twice:
        raise UsageError(f"{about.where}: column {shown(twice[0])} would stand twice, the files give it; rename it")

    def items() -> Iterator[Item]:
        files, seen = Paths(shape.files), set[str]()
        for rows in reader(uncounted, None):
            for values in storable(rows, about.where).to_pylist():
                yield _item(files, str(values.pop(column) or ""), values, seen)

    return extra, items


def _item(files: Paths, name: str, values: dict[str, Any], seen: set[str]) -> Item:
    """One row of a manifest."""
    file, fault = None, None
    try:
        file = files.find(name)
    except Unreadable as ambiguous:
        fault = (ambiguous.rule, ambiguous.reason)
    key = name if file is None else file.path
    if key in seen:
        fault = ("file stands twice", "in the manifest; expected once")
    seen.add(key)
    return Item(file, key, values, fault)
