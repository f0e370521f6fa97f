"""Hugging Face model folders: which files are used, found on the disk first and on the hub second; no code from them.

A folder has `config.json`, `tokenizer.json`, and the weights as `model.safetensors` or as several `*.safetensors` with
`model.safetensors.index.json`. Weights in pickle (`pytorch_model.bin`) are never read.
"""

from __future__ import annotations

import importlib
import json
import re
from pathlib import Path
from typing import Any

from lepton_ray.errors import UsageError, shown

CONFIG, TOKENIZER = "config.json", "tokenizer.json"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
MAX_JSON_BYTES = 12 * 2**20
"""Longest config, tokenizer or index; a model version's transforms hold the first two and have at most 16 MiB."""
_HUB_NAME = re.compile(r"([A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95})(?:@([\w.-]{1,100}))?", re.ASCII)
_FILE = re.compile(r"[A-Za-z0-9][\w.-]{0,200}\.safetensors", re.ASCII)


def find_folder(name: str, key: str) -> Path:
    """The folder of a path, or of a name on the hub (`owner/model` or `owner/model@revision`), fetched if need be.

    `key` is the setting it was named in. Raises UsageError saying which files to put where.
    """
    path = Path(name.removeprefix("file://")).expanduser()
    if path.is_dir():
        return path
    hub = _HUB_NAME.fullmatch(name)
    what = f"a folder with {CONFIG}, {TOKENIZER} and {WEIGHTS}"
    if path.exists() or hub is None:
        raise UsageError(f"{key} is {shown(name)}: is no folder; expected {what}, or owner/model on the hub")
    try:
        hub_client: Any = importlib.import_module("huggingface_hub")
        found = hub_client.snapshot_download(
            hub[1], revision=hub[2], allow_patterns=[CONFIG, TOKENIZER, INDEX, "*.safetensors"], etag_timeout=10
        )
    except ImportError as error:
        raise UsageError(
            f"{key} is {shown(name)}: is no folder, and the hub needs pip install 'lepton-ray[text]'; or name {what}"
        ) from error
    except Exception as error:  # its errors come from four libraries
        raise UsageError(
            f"{key} is {shown(name)}: is no folder here, and the hub did not give it ({shown(str(error))}); fetch the "
            f"files on a machine that reaches it, make {what} from them, and name that folder's path"
        ) from error
    return Path(found)


def read_config(folder: Path, key: str) -> dict[str, Any]:
    """The folder's `config.json`. Raises UsageError."""
    return _read_json(folder, CONFIG, key)


def read_tokenizer(folder: Path, key: str) -> str:
    """The folder's `tokenizer.json`, compact. Raises UsageError where there is none, saying how to make one."""
    if not (folder / TOKENIZER).is_file():
        raise UsageError(
            f"{key}: folder {shown(folder)} has no {TOKENIZER}; write it there with "
            "transformers.AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)"
        )
    return json.dumps(_read_json(folder, TOKENIZER, key), ensure_ascii=False, separators=(",", ":"))


def weight_files(folder: Path, key: str) -> list[Path]:
    """The files that hold the folder's tensors, in the order of their names. Raises UsageError where there are none."""
    if (folder / INDEX).is_file():
        shards = _read_json(folder, INDEX, key).get("weight_map")
        if not isinstance(shards, dict) or not shards:
            raise UsageError(f"{key}: {INDEX} in {shown(folder)} has no weight_map; fetch it anew")
        names = sorted({str(name) for name in shards.values()})
        for name in names:
            # a name with a slash could lead anywhere
            if not _FILE.fullmatch(name) or not (folder / name).is_file():
                raise UsageError(f"{key}: {INDEX} names {shown(name)}, which folder {shown(folder)} lacks; fetch it")
        return [folder / name for name in names]
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    pickled = sorted(path.name for suffix in ("*.bin", "*.pt", "*.pth", "*.ckpt") for path in folder.glob(suffix))
    hint = f"{pickled[0]} can run code when loaded: convert it to {WEIGHTS}" if pickled else f"put {WEIGHTS} there"
    raise UsageError(f"{key}: folder {shown(folder)} has neither {WEIGHTS} nor {INDEX}; {hint}")


def _read_json(folder: Path, name: str, key: str) -> dict[str, Any]:
    path = folder / name
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise UsageError(f"{key}: {shown(path)} has {path.stat().st_size} bytes; expected at most {MAX_JSON_BYTES}")
        made = json.loads(path.read_bytes())
    except OSError as error:
        raise UsageError(
            f"{key}: {name} in folder {shown(folder)}: {error.strerror or error}; put {CONFIG}, {TOKENIZER} and "
            f"{WEIGHTS} of one model there"
        ) from error
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{key}: {shown(path)} is no JSON ({shown(str(error))}); fetch it anew") from error
    if not isinstance(made, dict):
        raise UsageError(f"{key}: {shown(path)} holds no JSON object; fetch it anew")
    return made
