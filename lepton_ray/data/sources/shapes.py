"""What a source is, told by its name and, of a folder, by what lies in it. The one place where that is decided."""

from __future__ import annotations

import tarfile
from collections import Counter
from dataclasses import dataclass
from typing import get_args

from lepton_ray.data.sources.media import AUDIO, IMAGES, MEDIA, TEXT
from lepton_ray.errors import RefusedError, UsageError, shown
from lepton_ray.settings.reading import Format
from lepton_ray.storage import Found, Input

TABLE_ENDINGS = {
    ".csv": "csv",
    ".csv.gz": "csv",
    ".tsv": "csv",
    ".tsv.gz": "csv",
    ".jsonl": "jsonl",
    ".jsonl.gz": "jsonl",
    ".ndjson": "jsonl",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".arrows": "arrow",
    ".feather": "arrow",
}
"""Ending of a file's name -> its format."""
CODE_CARRYING = (".pkl", ".pickle", ".joblib", ".dill", ".pt", ".pth", ".npy", ".npz", ".rds", ".rdata", ".mat")
"""Files whose loaders may run what is in them."""
ARCHIVES = (".tar", ".tar.gz", ".tgz", ".zip")
FORMATS: tuple[str, ...] = get_args(Format)
MANIFESTS = tuple(
    f"{name}{ending}" for name in ("metadata", "manifest") for ending in (".csv", ".tsv", ".jsonl", ".ndjson", ".json")
)
"""Names of a file that says more of the files in its folder."""


@dataclass(frozen=True)
class Shape:
    """What was told."""

    format: str
    """A name of FORMATS."""
    files: list[Input]
    """What is to be read."""
    manifest: Input | None = None
    """What says more of the files: a table, or COCO's JSON."""
    ignored: Counter[str] | None = None
    """Files that are none of that, by ending."""


def accepted(names: tuple[str, ...] = ()) -> str:
    """The kinds of source, for messages; `names` are those of the built-in ones."""
    return (
        f"{''.join(f'{name}, ' for name in names)}a file or a folder of files that end in "
        f"{', '.join(TABLE_ENDINGS)}, a folder of images ({', '.join(IMAGES.endings)}), of recordings "
        f"({', '.join(AUDIO.endings)}) or of texts ({', '.join(TEXT.endings)}), with COCO JSON, Pascal VOC XML or a "
        f"manifest ({MANIFESTS[0]}, ...) where there is one"
    )


def ending_of(path: str) -> str:
    """`.csv.gz` and the like; the last part alone for what is not packed; in lower case."""
    name = path.rpartition("/")[2].lower()
    stem, dot, last = name.rpartition(".")
    if last == "gz" and "." in stem:
        return f".{stem.rpartition('.')[2]}.gz"
    return dot + last if dot else ""


def shape_of(found: Found, where: str, wanted: str | None, expected: str) -> Shape:
    """What a source is.

    Args:
        found: its files.
        where: begins messages.
        wanted: the format that the user names, or None.
        expected: ends messages: what is accepted.

    Raises RefusedError for files that may run code, UsageError for what is no known format or could be several.
    """
    for entry in found.inputs:
        if ending_of(entry.path) in CODE_CARRYING:
            raise RefusedError(
                f"{where}: {shown(entry.path)} is of a format that may run code when it is loaded; store the data as "
                "Parquet, CSV or files of their own"
            )
    if not found.is_folder:
        return _of_file(found.inputs[0], where, wanted, expected)
    if not found.inputs:
        raise UsageError(f"{where}: no rows in it, the folder has no files; expected {expected}")
    endings = Counter(ending_of(entry.path) for entry in found.inputs)
    return _of_folder(found.inputs, where, wanted or _guessed(found.inputs, endings, where, expected))


def _of_file(file: Input, where: str, wanted: str | None, expected: str) -> Shape:
    ending = ending_of(file.path)
    if wanted in ("csv", "jsonl", "parquet", "arrow"):
        return Shape(wanted, [file])
    if wanted is not None:
        raise UsageError(f"{where}: is a file; format {wanted} takes a folder")
    if ending in TABLE_ENDINGS:
        return Shape(TABLE_ENDINGS[ending], [file])
    if ending in ARCHIVES:
        _refuse_code_in(file, where)
        raise UsageError(f"{where}: is an archive; unpack it and give the folder")
    raise UsageError(f"{where}: unknown kind; expected {expected}")


def _refuse_code_in(file: Input, where: str) -> None:
    """Raise RefusedError where an archive lists a member that may run code; what is no archive is left alone."""
    if ending_of(file.path) == ".zip":
        return
    try:
        with file.open() as stream, tarfile.open(fileobj=stream, mode="r:*") as archive:
            for _, member in zip(range(1000), archive, strict=False):
                if ending_of(member.name) in CODE_CARRYING:
                    raise RefusedError(
                        f"{where}: holds {shown(member.name)}, of a format that may run code when it is loaded; store "
                        "the data as files of their own"
                    )
    except (tarfile.TarError, EOFError, OSError):
        return


def _guessed(inputs: list[Input], endings: Counter[str], where: str, expected: str) -> str:
    """The format of a folder; media come before tables, since a table beside them says more of them."""
    media = [media.name for media in (IMAGES, AUDIO, TEXT) if any(endings[ending] for ending in media.endings)]
    if "text" in media and len(media) > 1:
        media.remove("text")  # lists of class names, licences
    if len(media) > 1:
        raise UsageError(f"{where}: holds {' and '.join(media)}; say which with --format, or give one folder of each")
    if media == ["images"]:
        if endings[".xml"]:
            return "voc"
        return "coco" if endings[".json"] and _manifest(inputs) is None else "images"
    if media and not (media == ["text"] and any(endings[ending] for ending in TABLE_ENDINGS)):
        return media[0]
    tables = {TABLE_ENDINGS[ending] for ending in endings if ending in TABLE_ENDINGS}
    if len(tables) > 1:
        raise UsageError(f"{where}: holds {' and '.join(sorted(tables))} files; say which with --format")
    if not tables:
        seen = ", ".join(f"{count} {ending or 'without ending'}" for ending, count in endings.most_common(5))
        raise UsageError(f"{where}: unknown kind, holds {shown(seen, 120)}; expected {expected}")
    return tables.pop()


def _of_folder(inputs: list[Input], where: str, wanted: str) -> Shape:
    manifest = None
    if wanted in ("coco", "voc"):
        media, rest = IMAGES, (".json",) if wanted == "coco" else (".xml",)
        manifest = _coco_file(inputs, where) if wanted == "coco" else None
        files = [entry for entry in inputs if entry.path.lower().endswith((*media.endings, *rest))]
    elif wanted in MEDIA:
        manifest = _manifest(inputs)
        files = [entry for entry in inputs if entry.path.lower().endswith(MEDIA[wanted].endings)]
    else:
        files = [entry for entry in inputs if TABLE_ENDINGS.get(ending_of(entry.path)) == wanted]
        for entry in files:
            if "=" in entry.path.rpartition("/")[0]:
                raise UsageError(
                    f"{where}: {shown(entry.path)} lies in a folder that stands for a column; write it into the file"
                )
    if not files:
        raise UsageError(f"{where}: no rows in it, none of its files is of format {wanted}")
    taken = {id(entry) for entry in (*files, *([] if manifest is None else [manifest]))}
    return Shape(wanted, files, manifest, Counter(ending_of(e.path) for e in inputs if id(e) not in taken))


def _manifest(inputs: list[Input]) -> Input | None:
    return next((entry for entry in inputs if entry.path.lower() in MANIFESTS), None)


def _coco_file(inputs: list[Input], where: str) -> Input:
    """The one JSON file of the folder."""
    files = [entry for entry in inputs if ending_of(entry.path) == ".json"]
    if len(files) != 1:
        names = shown(", ".join(entry.path for entry in files[:5]), 160)
        raise UsageError(f"{where}: {len(files)} .json files ({names}); expected one with the annotations (COCO)")
    return files[0]
