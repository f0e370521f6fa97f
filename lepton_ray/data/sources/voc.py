"""Pascal VOC: an XML file per image, in the image's folder or in one of its own."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from collections.abc import Iterator

from lepton_ray.data.sources.boxes import Box, box_columns, fits
from lepton_ray.data.sources.media import IMAGES
from lepton_ray.data.sources.media_rows import Item, Paths
from lepton_ray.data.sources.rejects import Unreadable
from lepton_ray.data.sources.streams import Meter
from lepton_ray.errors import UsageError, shown
from lepton_ray.storage import Input

MAX_XML_BYTES = 16 * 2**20
_CORNERS = ("xmin", "ymin", "xmax", "ymax")

_Annotation = tuple[Input, Input | None, list[Box], tuple[int | None, int | None], tuple[str, str] | None]


def voc_items(inputs: list[Input], meter: Meter, where: str) -> Iterator[Item]:
    """An item for each XML file; the class numbers are those of the class names in alphabetical order.

    An annotation that cannot be read, or whose image is missing, is an item with a fault. Raises UsageError where there
    are no XML files.
    """
    images = Paths(entry for entry in inputs if entry.path.lower().endswith(IMAGES.endings))
    annotations = [_read(entry, images, meter) for entry in inputs if entry.path.lower().endswith(".xml")]
    if not annotations:
        raise UsageError(f"{where}: no .xml files in it; expected a Pascal VOC annotation for each image")
    classes = {name: at for at, name in enumerate(sorted({box.name for found in annotations for box in found[2]}))}
    seen: set[str] = set()
    for entry, image, boxes, (height, width), fault in annotations:
        key = entry.path if image is None else image.path
        if key in seen:
            raise UsageError(f"{where}: image {shown(key)} has two annotations, one is {shown(entry.path)}; remove one")
        seen.add(key)
        yield Item(image, key, box_columns(boxes, classes), fault, fits(boxes, height, width))


def _read(entry: Input, images: Paths, meter: Meter) -> _Annotation:
    """An annotation with its image, boxes, height and width, and what is wrong with it."""
    try:
        if not 0 < entry.size <= MAX_XML_BYTES:
            raise Unreadable("annotation cannot be read", f"{entry.size} bytes; expected 1 to {MAX_XML_BYTES}")  # noqa: TRY301
        root = _parsed(entry.read(meter.add))
        boxes = [_box(found, number) for number, found in enumerate(root.iter("object"), start=1)]
        size = (_whole(root, "size/height"), _whole(root, "size/width"))
        return entry, _image(entry, root.findtext("filename"), images), boxes, size, None
    except Unreadable as fault:
        return entry, None, [], (None, None), (fault.rule, fault.reason)


def _parsed(data: bytes) -> ET.Element:
    """The root of a document that declares nothing of its own: entities can grow without end or read other files."""
    try:
        text = data.decode("utf-8-sig")
        if "<!DOCTYPE" in text or "<!ENTITY" in text:
            raise Unreadable("annotation cannot be read", "declares a document type; expected plain XML")
        root = ET.fromstring(text.partition("?>")[2] if text.startswith("<?xml") else text)  # noqa: S314 - see above
    except (ET.ParseError, UnicodeDecodeError, ValueError) as error:
        raise Unreadable("annotation cannot be read", shown(str(error), 120)) from error
    if root.tag != "annotation":
        raise Unreadable("annotation cannot be read", f"is <{shown(root.tag)}>; expected <annotation> (Pascal VOC)")
    return root


def _box(found: ET.Element, number: int) -> Box:
    name = (found.findtext("name") or "").strip()
    corners = [found.findtext(f"bndbox/{corner}") for corner in _CORNERS]
    try:
        x_min, y_min, x_max, y_max = (float(str(corner)) for corner in corners)
    except ValueError as error:
        reason = f"object {number} has corners {shown(corners)}; expected four numbers"
        raise Unreadable("annotation cannot be read", reason) from error
    if not name:
        raise Unreadable("annotation cannot be read", f"object {number} has no name; expected its class")
    return Box((x_min, y_min, x_max, y_max), name, (found.findtext("difficult") or "0").strip() == "1")


def _whole(root: ET.Element, path: str) -> int | None:
    """A size, where the annotation has one: some programs write 0 for what they do not know."""
    text = (root.findtext(path) or "").strip()
    return int(text) or None if text.isdecimal() and len(text) < 10 else None


def _image(entry: Input, name: str | None, images: Paths) -> Input | None:
    """The image by the name in the annotation, or that of the annotation itself with another ending."""
    folder, _, file = entry.path.rpartition("/")
    stem = file.rpartition(".")[0]
    names = [name.strip()] if name and name.strip() else []
    names += [stem + ending for ending in IMAGES.endings]
    for candidate in names:
        beside = images.find(f"{folder}/{candidate}" if folder else candidate)
        if beside is not None:
            return beside
    return next((found for candidate in names if (found := images.find(candidate)) is not None), None)
