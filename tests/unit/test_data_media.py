"""Folders of images, recordings and texts become rows, and files that cannot are rejected by name."""

from __future__ import annotations

import io
import json
import struct
import wave
import zlib

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from lepton_ray.data.encoded_images import decode_image, decoded_images
from lepton_ray.data.images import is_image_table, unpack_images
from lepton_ray.data.sources import open_source
from lepton_ray.data.sources.opening import Source
from lepton_ray.errors import IntegrityError, UsageError
from lepton_ray.settings import LimitSettings, ReadingSettings


def opened(folder, reading: ReadingSettings = ReadingSettings()) -> tuple[Source, list[dict]]:  # noqa: B008 - frozen
    source = open_source(str(folder), reading)
    return source, [row for batch in source.batches for row in batch.to_pylist()]


def picture(mode: str = "RGB", size: tuple[int, int] = (5, 4), seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8)
    return Image.fromarray(pixels, "RGB").convert(mode)


def save(path, image: Image.Image | bytes, **options) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(image, bytes):
        path.write_bytes(image)
    else:
        image.save(path, **options)


def wav(frames: int = 8, rate: int = 8000, channels: int = 1, width: int = 2) -> bytes:
    out = io.BytesIO()
    with wave.open(out, "wb") as file:
        file.setnchannels(channels)
        file.setsampwidth(width)
        file.setframerate(rate)
        file.writeframes(bytes(frames * channels * width))
    return out.getvalue()


def test_folders_are_classes_of_images(tmp_path):
    """Class numbers follow the names; the bytes are those of the file, the shape that of its pixels."""
    save(tmp_path / "cat" / "1.png", picture())
    save(tmp_path / "cat" / "deep" / "2.jpg", picture("L", (6, 3)))
    glass = picture()
    glass.putalpha(99)
    save(tmp_path / "ant" / "1.webp", glass, lossless=True)
    save(tmp_path / "ant" / ".DS_Store", b"x")
    save(tmp_path / "classes.md", b"x")
    source, rows = opened(tmp_path)
    assert [(row["key"], row["label"], row["class_name"], row["encoding"]) for row in rows] == [
        ("ant/1.webp", 0, "ant", "webp"), ("cat/1.png", 1, "cat", "png"), ("cat/deep/2.jpg", 1, "cat", "jpeg"),
    ]  # fmt: skip
    assert [(row["height"], row["width"], row["channels"]) for row in rows] == [(4, 5, 4), (4, 5, 3), (3, 6, 1)]
    assert rows[1]["image"] == (tmp_path / "cat" / "1.png").read_bytes()
    assert np.array_equal(decode_image(rows[1]["image"], 100), np.asarray(picture()))
    assert source.ignored == {".md": 1}
    assert source.meter.share == 1.0
    again, _ = opened(tmp_path)
    assert source.digest == again.digest
    save(tmp_path / "cat" / "1.png", picture(seed=1))
    assert opened(tmp_path)[0].digest != source.digest


def test_folders_above_the_classes_are_splits(tmp_path):
    """As many published sets lie; names of their own mean classes."""
    for name in ("train/cat/1", "train/dog/1", "val/cat/1", "test/dog/1"):
        save(tmp_path / "a" / f"{name}.png", picture())
    _, rows = opened(tmp_path / "a")
    assert [(row["split"], row["class_name"], row["label"]) for row in rows] == [
        ("test", "dog", 1), ("train", "cat", 0), ("train", "dog", 1), ("validation", "cat", 0),
    ]  # fmt: skip
    for name in ("train/1", "bus/1"):
        save(tmp_path / "b" / f"{name}.png", picture())
    assert [row["class_name"] for row in opened(tmp_path / "b")[1]] == ["bus", "train"]
    save(tmp_path / "b" / "loose.png", picture())
    with pytest.raises(UsageError, match=r"'loose.png' lies beside folders of classes"):
        opened(tmp_path / "b")


def test_decoded_rows_are_an_image_table(tmp_path):
    """What the tasks learn from, and wrong rows are named."""
    for number in range(3):
        save(tmp_path / f"{number}.png", picture(seed=number))
    source = open_source(str(tmp_path))
    rows = pa.concat_tables(source.batches)
    assert not is_image_table(rows.schema)
    raw = decoded_images(rows, 100)
    assert is_image_table(raw.schema)
    assert np.array_equal(unpack_images(raw)[2], np.asarray(picture(seed=2)))
    assert decoded_images(raw, 100) is raw
    wrong = rows.set_column(rows.column_names.index("height"), "height", pa.array([4, 9, 4], pa.int32()))
    with pytest.raises(UsageError, match="image of row 1 is"):
        decoded_images(wrong, 100)
    with pytest.raises(UsageError, match="image of row 0: image too large"):
        decoded_images(rows, 10)


def bomb(width: int, height: int) -> bytes:
    """A PNG of some bytes that says it has this size."""
    chunks = {b"IHDR": struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0), b"IDAT": zlib.compress(bytes(1000))}
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in chunks.items()
    )


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


BAD_IMAGES = {
    "cut.jpg": (encoded(picture(size=(64, 64)), "JPEG")[:-200], "image cannot be decoded"),
    "cut.png": (encoded(picture(size=(64, 64)), "PNG")[:-200], "image cannot be decoded"),
    "empty.png": (b"", "file is empty"),
    "html.png": (b"<html>not found</html>", "no image"),
    "bomb.png": (bomb(60_000, 60_000), "image too large"),
    "bomb2.png": (bomb(10_001, 10_000), "image too large"),
    "dot.png": (encoded(picture(size=(1, 1)), "PNG"), "image too small"),
    "cmyk.jpg": (encoded(picture("CMYK"), "JPEG"), "colours"),
    "deep.png": (encoded(Image.fromarray(np.ones((4, 4), np.uint16)), "PNG"), "colours"),
    "animated.gif": (
        encoded(picture(), "GIF", save_all=True, append_images=[picture(seed=1)]), "animated image",
    ),
    "really-png.jpg": (encoded(picture(), "PNG"), "wrong ending"),
    "large.bmp": (encoded(picture(size=(200, 200)), "BMP"), "file too large"),
}  # fmt: skip


def test_bad_images_are_rejected_each_by_its_name(tmp_path):
    """Whatever is wrong with them, before a bomb is unpacked; good ones stay."""
    for name, (content, _) in BAD_IMAGES.items():
        save(tmp_path / name, content)
    for name, mode in {"grey": "L", "palette": "P", "bits": "1", "alpha": "LA"}.items():
        save(tmp_path / f"good-{name}.png", picture(mode))
    source, rows = opened(tmp_path, ReadingSettings(limits=LimitSettings(max_object_bytes=100_000)))
    assert {row["key"]: row["channels"] for row in rows} == {
        "good-alpha.png": 4, "good-bits.png": 1, "good-grey.png": 1, "good-palette.png": 3,
    }  # fmt: skip
    assert {found.file: found.rule for found in source.rejects.rows} == {
        name: rule for name, (_, rule) in BAD_IMAGES.items()
    }
    assert all(found.reason and found.reason.isprintable() for found in source.rejects.rows)
    assert source.rejects.total == len(BAD_IMAGES)


def test_image_changed_since_it_was_listed_is_told(tmp_path):
    """The folder would be half old and half new."""
    for number in range(3):
        save(tmp_path / f"{number}.png", picture())
    source = open_source(str(tmp_path))
    save(tmp_path / "1.png", picture(seed=1, size=(9, 9)))
    with pytest.raises(IntegrityError, match=r"1\.png': was changed while it was read"):
        list(source.batches)
    source = open_source(str(tmp_path))
    (tmp_path / "2.png").unlink()
    with pytest.raises(IntegrityError, match=r"2\.png': is gone"):
        list(source.batches)


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_recordings_come_with_what_a_manifest_says(tmp_path, kind):
    """Transcript and speaker beside rate, channels and seconds; absolute paths are found by their end."""
    save(tmp_path / "clips" / "a.wav", wav(frames=800))
    save(tmp_path / "clips" / "b.wav", wav(frames=441, rate=44_100, channels=2, width=3))
    entries = [
        {"audio_filepath": "clips/a.wav", "text": "hello, world", "speaker": 7},
        {"audio_filepath": "/elsewhere/set/clips/b.wav", "text": "good bye", "speaker": 8},
        {"audio_filepath": "clips/none.wav", "text": "silence", "speaker": 8},
        {"audio_filepath": "./clips/a.wav", "text": "again", "speaker": 8},
    ]
    if kind == "csv":
        lines = ["audio_filepath,text,speaker"]
        lines += [f'{entry["audio_filepath"]},"{entry["text"]}",{entry["speaker"]}' for entry in entries]
    else:
        lines = [json.dumps(entry) for entry in entries]
    (tmp_path / f"manifest.{kind}").write_text("\n".join(lines))
    source, rows = opened(tmp_path)
    assert [(row["key"], row["text"], row["speaker"]) for row in rows] == [
        ("clips/a.wav", "hello, world", 7), ("clips/b.wav", "good bye", 8),
    ]  # fmt: skip
    shapes = [(row["encoding"], row["rate"], row["channels"], row["frames"], row["duration_s"]) for row in rows]
    assert shapes == [("pcm16", 8000, 1, 800, 0.1), ("pcm24", 44_100, 2, 441, 0.01)]
    assert [(found.file, found.rule) for found in source.rejects.rows] == [
        ("clips/none.wav", "file is missing"), ("clips/a.wav", "file stands twice"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("manifest", "message"),
    [
        ("text\nhello\n", "expected a column of file names: file_name"),
        ("file,rate\na.wav,1\n", "column 'rate' would stand twice"),
        ("file,text\n", "no rows in it"),
        ("", "0 bytes"),
        ("file,text\na.wav\n", "row 1: 1 values"),
    ],
)
def test_manifest_that_is_none_is_named(tmp_path, manifest, message):
    """By its own name, with what was expected."""
    save(tmp_path / "a.wav", wav())
    (tmp_path / "metadata.csv").write_text(manifest)
    with pytest.raises(UsageError, match=f"metadata.csv.*{message}"):
        opened(tmp_path)


GOOD = wav(frames=8)
BAD_RECORDINGS = {
    "cut": GOOD[:-4],
    "header only": GOOD[:30],
    "ogg": b"OggS" + bytes(40),
    "no samples": wav(frames=0),
    "compressed": GOOD[:20] + struct.pack("<H", 85) + GOOD[22:],
    "no channels": GOOD[:22] + struct.pack("<H", 0) + GOOD[24:],
    "no rate": GOOD[:24] + struct.pack("<I", 0) + GOOD[28:],
}


def test_bad_recordings_are_rejected_each_by_its_name(tmp_path):
    """Cut short, of another format, empty, or with measures that cannot be; the classes of the others stay."""
    for name, content in BAD_RECORDINGS.items():
        save(tmp_path / "yes" / f"{name}.wav", content)
    save(tmp_path / "no" / "good.wav", GOOD)
    source, rows = opened(tmp_path)
    assert [(row["key"], row["label"]) for row in rows] == [("no/good.wav", 0)]
    assert sorted(found.file for found in source.rejects.rows) == sorted(f"yes/{name}.wav" for name in BAD_RECORDINGS)
    assert set(source.rejects.counts) == {"recording cannot be read"}


def test_texts_are_read_with_and_without_classes(tmp_path):
    """UTF-8 with or without a mark; what is none, or empty, is rejected."""
    save(tmp_path / "a" / "pos" / "1.txt", "\ufeffsch\u00f6n".encode())
    save(tmp_path / "a" / "neg" / "1.txt", b"bad\n")
    save(tmp_path / "a" / "neg" / "2.txt", b"\xff\xfe")
    save(tmp_path / "a" / "neg" / "3.txt", b" \n")
    source, rows = opened(tmp_path / "a")
    assert [(row["text"], row["label"], row["class_name"]) for row in rows] == [
        ("bad\n", 0, "neg"),
        ("sch\u00f6n", 1, "pos"),
    ]
    assert set(source.rejects.counts) == {"text is not UTF-8", "text is empty"}
    save(tmp_path / "b" / "1.txt", b"plain")
    assert opened(tmp_path / "b")[1] == [{"key": "1.txt", "text": "plain"}]
