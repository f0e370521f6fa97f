"""COCO's JSON of boxes: one file for a folder of images."""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from io import BufferedIOBase
from typing import Any

import numpy as np

from lepton_ray.data.sources.boxes import Box, box_columns, fits
from lepton_ray.data.sources.json_stream import json_entries
from lepton_ray.data.sources.media import IMAGES
from lepton_ray.data.sources.media_rows import Item, Paths
from lepton_ray.data.sources.rejects import Unreadable
from lepton_ray.errors import UsageError, shown
from lepton_ray.storage import Input

LISTS = frozenset({"images", "annotations", "categories"})


def coco_items(stream: BufferedIOBase, inputs: list[Input], most: int, where: str) -> Iterator[Item]:
    """An item for each image of the file; class numbers are the categories' in the order of their ids.

    Args:
        stream: the annotations.
        inputs: the files of the folder.
        most: bytes of one entry at most.
        where: begins messages.

    Raises UsageError naming the entry that is not as COCO has it.
    """
    found = _Annotations(where)
    for name, entry in json_entries(stream, LISTS, most, where):
        found.add(name, entry)
    found.check()
    classes = {name: at for at, (_, name) in enumerate(sorted(found.categories.items()))}
    files = Paths(entry for entry in inputs if entry.path.lower().endswith(IMAGES.endings))
    seen: set[str] = set()
    for identity, (name, height, width) in found.images.items():
        boxes, fault, file = found.boxes_of(identity), None, None
        try:
            file = files.find(name)
        except Unreadable as ambiguous:
            fault = (ambiguous.rule, ambiguous.reason)
        key = name if file is None else file.path
        if key in seen:
            raise UsageError(f"{where}: image {shown(key)} stands twice in images; expected once")
        seen.add(key)
        yield Item(file, key, box_columns(boxes, classes), fault, fits(boxes, height, width))


class _Annotations:
    """What a file says, in arrays: a million annotations take some fifty megabytes."""

    def __init__(self, where: str) -> None:
        self._where = where
        self.images: dict[int, tuple[str, int | None, int | None]] = {}
        self.categories: dict[int, str] = {}
        self._image_ids, self._category_ids = array("q"), array("q")
        self._corners, self._crowds = array("d"), array("b")
        self._counts = {"images": 0, "annotations": 0, "categories": 0}

    def add(self, name: str, entry: Any) -> None:
        """Enter one entry of a list."""
        self._counts[name] += 1
        where = f"{self._where} {name} entry {self._counts[name]}"
        if not isinstance(entry, dict):
            raise UsageError(f"{where}: {shown(entry)}; expected an object")
        if name == "images":
            identity, file = _whole(entry, "id", where), entry.get("file_name")
            if not isinstance(file, str) or not file or identity in self.images:
                raise UsageError(f"{where}: id {identity}, file_name {shown(file)}; expected a new id and a name")
            self.images[identity] = (file, _size(entry.get("height")), _size(entry.get("width")))
        elif name == "categories":
            identity, label = _whole(entry, "id", where), entry.get("name")
            if not isinstance(label, str) or identity in self.categories or label in self.categories.values():
                raise UsageError(f"{where}: id {identity}, name {shown(label)}; expected a new id and a new name")
            self.categories[identity] = label
        else:
            self._add_box(entry, where)

    def _add_box(self, entry: dict[str, Any], where: str) -> None:
        box = entry.get("bbox")
        if not isinstance(box, list) or len(box) != 4 or not all(type(side) in (int, float) for side in box):
            raise UsageError(f"{where}: bbox {shown(box)}; expected [x, y, width, height]")
        self._image_ids.append(_whole(entry, "image_id", where))
        self._category_ids.append(_whole(entry, "category_id", where))
        try:
            x, y, width, height = map(float, box)
        except OverflowError as error:
            raise UsageError(f"{where}: bbox {shown(box)}; expected numbers that a float can hold") from error
        self._corners.extend((x, y, x + width, y + height))
        self._crowds.append(bool(entry.get("iscrowd", 0)))

    def check(self) -> None:
        """Raise UsageError for an annotation of an image or category that is not there; sorts them by image."""
        for what, there, ids in (
            ("image_id", self.images, self._image_ids),
            ("category_id", self.categories, self._category_ids),
        ):
            given = np.frombuffer(ids, np.int64) if len(ids) else np.zeros(0, np.int64)
            unknown = np.setdiff1d(given, np.fromiter(there, np.int64, len(there)))
            if len(unknown):
                row = int(np.argmax(given == unknown[0])) + 1
                raise UsageError(
                    f"{self._where} annotations entry {row}: {what} {unknown[0]} is not in the file; expected the id "
                    f"of one of its {len(there)} {'images' if what == 'image_id' else 'categories'}"
                )
        self._by_image = np.frombuffer(self._image_ids, np.int64) if len(self._image_ids) else np.zeros(0, np.int64)
        self._order = np.argsort(self._by_image, kind="stable")
        self._by_image = self._by_image[self._order]

    def boxes_of(self, identity: int) -> list[Box]:
        """The boxes of an image, in the order of the file."""
        first, last = np.searchsorted(self._by_image, [identity, identity + 1])
        return [
            Box(
                (
                    self._corners[4 * at],
                    self._corners[4 * at + 1],
                    self._corners[4 * at + 2],
                    self._corners[4 * at + 3],
                ),
                self.categories[self._category_ids[at]],
                bool(self._crowds[at]),
            )
            for at in self._order[first:last].tolist()
        ]


def _whole(entry: dict[str, Any], name: str, where: str) -> int:
    value = entry.get(name)
    if type(value) is not int or abs(value) >= 2**62:
        raise UsageError(f"{where}: {name} is {shown(value)}; expected a whole number")
    return value


def _size(value: Any) -> int | None:
    return value if type(value) is int and value > 0 else None
