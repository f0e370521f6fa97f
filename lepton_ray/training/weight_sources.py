"""Where `training.initial.weights` leads: a model version, a run's checkpoint, a safetensors file, a model folder.

Opening a source finds it, fixes which one is meant (an alias moves, a run goes on) and reads its headers; nothing that
could run code is read.
"""

from __future__ import annotations

import contextlib
import hashlib
import mmap
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import cast
from urllib.parse import unquote

from lepton_ray.errors import LeptonError, NotFoundError, RefusedError, UnavailableError, UsageError, shown
from lepton_ray.registry import Registry
from lepton_ray.registry.weights import TensorEntry, check_weights, read_header
from lepton_ray.settings.loading import parse_settings, parse_yaml
from lepton_ray.settings.tree import check_name
from lepton_ray.storage import Store, open_store
from lepton_ray.tasks import model_folder
from lepton_ray.training.checkpoints import CheckpointStore, LoadedCheckpoint

KEY = "training.initial.weights"
ACCEPTED = (
    "model:NAME[@ALIAS|:N], run:NAME[@STEP], a safetensors file (a path, file:///... or s3://...), or a folder with "
    "config.json and *.safetensors"
)
_RUN = re.compile(r"(?P<run>[^@]+)(?:@(?P<step>[0-9]{1,12}))?", re.ASCII)


@dataclass(frozen=True)
class WeightSource:
    """Tensors to start from."""

    ref: str
    """What was meant, exactly: `model:digits:3` for `model:digits@champion`, `run:digits@400` for `run:digits`."""
    parts: tuple[bytes | Path, ...]
    """safetensors: bytes in memory, or files of this machine."""
    from_folder: bool = False
    """Whether it is a Hugging Face model folder, whose tensors may have names of older days."""

    def header(self) -> dict[str, tuple[int, TensorEntry]]:
        """The number of the part and the declaration of each tensor, by name.

        Raises UsageError or RefusedError for what is no sound safetensors, or where two parts hold one name.
        """
        found: dict[str, tuple[int, TensorEntry]] = {}
        for number, part in enumerate(self.parts):
            with _named(self.ref):
                entries, _ = read_header(_look(part))
            for entry in entries:
                if entry.name in found:
                    raise UsageError(f"{KEY} {self.ref}: tensor {shown(entry.name)} stands in two of its files")
                found[entry.name] = (number, entry)
        return found

    def read(self, number: int) -> bytes:
        """The bytes of a part, all values finite. Raises UsageError or RefusedError."""
        part = self.parts[number]
        data = part if isinstance(part, bytes) else part.read_bytes()
        with _named(self.ref):
            check_weights(data)
        return data

    def sha256(self) -> str:
        """SHA-256 over all parts, one after the other."""
        digest = hashlib.sha256()
        for part in self.parts:
            digest.update(_look(part))
        return digest.hexdigest()


def open_source(weights: str, store: Store) -> WeightSource:
    """The source behind a value of `training.initial.weights`.

    Raises UsageError for what is not there or is of another kind, UnavailableError where a remote is away.
    """
    kind, _, rest = weights.partition(":")
    try:
        if kind == "model":
            return _from_model(rest, store)
        if kind == "run":
            return _from_run(rest, store)
        if kind == "s3":
            return WeightSource(weights, (_from_store(weights),))
        return _from_disk(weights)
    except (UsageError, UnavailableError):
        raise
    except LeptonError as error:
        raise UsageError(f"{KEY} is {shown(weights)}: {error}") from error


def source_checkpoint(weights: str, store: Store) -> LoadedCheckpoint:
    """The verified checkpoint that a `run:NAME[@STEP]` means, for `training.initial.optimizer`.

    Raises UsageError for another kind of source, or where the run has no such checkpoint.
    """
    kind, _, name = weights.partition(":")
    parsed = _RUN.fullmatch(name)
    if kind != "run" or parsed is None:
        raise UsageError(f"{KEY} is {shown(weights)}: training.initial.optimizer needs run:NAME or run:NAME@STEP")
    run, step = parsed["run"], parsed["step"]
    try:
        check_name(run)
    except ValueError as error:
        raise UsageError(f"{KEY} is {shown(weights)}: name of the run {error}") from error
    checkpoints = CheckpointStore(store, run, attempt=0)
    try:
        found = checkpoints.newest() if step is None else checkpoints.load(int(step))
    except NotFoundError:
        found = None
    if found is None or not found.files:
        there = ", ".join(map(str, checkpoints.steps())) or "none"
        skipped = f" ({'; '.join(found.skipped)})" if found and found.skipped else ""
        raise UsageError(
            f"{KEY} is {shown(weights)}: run {run} has no such checkpoint in store {store.uri}; steps there: {there}"
            f"{skipped}"
        )
    return found


def _from_model(ref: str, store: Store) -> WeightSource:
    version = Registry(store).resolve(ref)
    if version.card.get("compression"):
        parent = version.card["lineage"].get("parent")
        raise UsageError(f"{KEY} is model:{ref}: {version.ref} is compressed, for answers only; take {parent}")
    return WeightSource(f"model:{version.ref}", (Registry(store).load(version).weights,))


def _from_run(name: str, store: Store) -> WeightSource:
    from lepton_ray.training.state import whole_weights
    from lepton_ray.training.transfer import has_adapters, publishable

    found = source_checkpoint(f"run:{name}", store)
    run = name.partition("@")[0]
    weights = whole_weights(found.files)
    if has_adapters(entry.name for entry in read_header(weights)[0]):
        spec = f"runs/{run}/spec.yaml"
        weights = publishable(weights, parse_settings(parse_yaml(store.get(spec).decode(), spec)).training.transfer)
    return WeightSource(f"run:{run}@{found.step}", (weights,))


def _from_store(uri: str) -> bytes:
    folder, _, name = uri.rpartition("/")
    if not name.endswith(".safetensors") or folder in ("s3:", "s3:/"):
        raise UsageError(f"{KEY} is {shown(uri)}: expected s3://bucket/folder/NAME.safetensors; accepted: {ACCEPTED}")
    return open_store(folder).get(name)


def _from_disk(weights: str) -> WeightSource:
    path = Path(unquote(weights.removeprefix("file://")) if weights.startswith("file://") else weights).expanduser()
    if path.is_file():
        if path.suffix != ".safetensors":
            raise UsageError(f"{KEY} is {shown(weights)}: is no safetensors file; accepted: {ACCEPTED}")
        return WeightSource(str(path), (path,))
    if path.suffix == ".safetensors" or "://" in weights or "\0" in weights:
        raise UsageError(f"{KEY} is {shown(weights)}: there is no such file; accepted: {ACCEPTED}")
    folder = model_folder.find_folder(weights, KEY)
    model_folder.read_config(folder, KEY)
    return WeightSource(str(folder), tuple(model_folder.weight_files(folder, KEY)), from_folder=True)


def _look(part: bytes | Path) -> bytes:
    """A part's bytes without reading them all: a file is mapped into memory."""
    if isinstance(part, bytes):
        return part
    try:
        with part.open("rb") as file:
            return cast("bytes", mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    except (OSError, ValueError) as error:  # ValueError: an empty file cannot be mapped
        raise UsageError(f"{KEY}: {shown(part)} cannot be read ({shown(str(error))}); fetch it anew") from error


@contextlib.contextmanager
def _named(ref: str) -> Iterator[None]:
    """Put the source's name before what is wrong with its bytes."""
    try:
        yield
    except RefusedError as error:
        raise RefusedError(f"{KEY} {shown(ref, 300)}: {error}") from error
    except UsageError as error:
        raise UsageError(f"{KEY} {shown(ref, 300)}: {error}") from error
