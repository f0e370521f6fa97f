"""TensorBoard event files of a run, for `training.logging.tensorboard`; the extra `tensorboard` writes them.

They are made in a temporary folder and put into the store as a whole, under `runs/<run>/tensorboard/`: point
`tensorboard --logdir` there, or at a copy of it where the store is S3. Nothing here reaches training: what fails is
logged once, and no more is written.
"""

from __future__ import annotations

import importlib.util
import logging
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lepton_ray.errors import LeptonError, UsageError
from lepton_ray.settings.training import LoggingSettings
from lepton_ray.storage import Store

_OF_TRAINING = ("loss", "learning_rate", "gradient_norm", "samples_per_second")
_log = logging.getLogger(__name__)


def check_tensorboard(settings: LoggingSettings) -> None:
    """Raise UsageError where event files are asked for and cannot be written."""
    if settings.tensorboard and importlib.util.find_spec("tensorboard") is None:
        raise UsageError(
            "training.logging.tensorboard is true: needs pip install 'lepton-ray[tensorboard]'; or set it to false"
        )


class TensorBoard:
    """The event file of one worker group. Called by the history's thread, never by training itself."""

    def __init__(self, store: Store, run: str, generation: int) -> None:
        self._store, self._key = store, f"runs/{run}/tensorboard/g{generation}"
        self._folder: Path | None = None
        self._writer: Any = None
        self._failed = False

    def add(self, rows: Sequence[Mapping[str, Any]], evaluations: Sequence[Mapping[str, Any]]) -> None:
        """Add rows and evaluations of the history, and write the file to the store."""
        if self._failed:
            return
        try:
            self._add(rows, evaluations)
        except LeptonError as error:  # storage is away: what is missing there comes with the next write
            _log.warning("tensorboard: %s; tried again with the next write", error)
        except Exception as error:  # noqa: BLE001 - of whatever library; training goes on
            _log.warning("tensorboard: %s; no more is written", error)
            self._failed = True

    def _add(self, rows: Sequence[Mapping[str, Any]], evaluations: Sequence[Mapping[str, Any]]) -> None:
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter

            self._folder = Path(tempfile.mkdtemp(prefix="lepton-tensorboard-"))
            self._writer = SummaryWriter(log_dir=str(self._folder))
        for row in rows:
            for name, value in row.items():
                if name not in ("step", "epoch", "time"):
                    tag = f"train/{name}" if name in _OF_TRAINING else f"seconds_per_step/{name}"
                    self._writer.add_scalar(tag, value, row["step"], walltime=row["time"])
        for each in evaluations:
            for name, value in each["metrics"].items():
                if value is not None:
                    self._writer.add_scalar(f"evaluation/{name}", value, each["step"], walltime=each["time"])
        self._writer.flush()
        for file in (self._folder or Path()).iterdir():
            self._store.put(f"{self._key}/{file.name}", file.read_bytes())

    def close(self) -> None:
        """Remove the temporary folder."""
        try:
            if self._writer is not None:
                self._writer.close()
        except Exception as error:  # noqa: BLE001 - as above
            _log.warning("tensorboard: %s", error)
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
