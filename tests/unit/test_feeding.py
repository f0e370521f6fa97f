"""The feed: rows decoded once per node, taken by number."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from lepton_ray.errors import LeptonError
from lepton_ray.training import feeding
from lepton_ray.training.feeding import Feed

CPU = torch.device("cpu")


class Doubler:
    """A task's decoding half: each value and its double as inputs, the value as target; counts its calls."""

    def __init__(self) -> None:
        self.calls: list[int] = []

    def inputs(self, rows: pa.Table, transforms: Any) -> torch.Tensor:
        self.calls.append(rows.num_rows)
        values = torch.from_numpy(rows["value"].to_numpy().copy())
        return torch.stack([values, values * transforms["factor"]], 1).float()

    def targets(self, rows: pa.Table, transforms: Any) -> torch.Tensor:
        return torch.from_numpy(rows["value"].to_numpy().copy())


def table(rows: int) -> pa.Table:
    return pa.table({"value": np.arange(rows, dtype=np.int64)})


def feed(task: Any, rows: pa.Table, folder: Path, **options: Any) -> Feed:
    return Feed(task, rows, {"factor": 2}, CPU, folder / "attempt", **options)


def test_batch_has_rows_asked_for_in_their_order(tmp_path):
    """Any row numbers, repeated ones too, give what the task decodes for them."""
    made = feed(Doubler(), table(1000), tmp_path)
    inputs, targets = made.take(np.array([999, 0, 7, 7]))
    assert inputs.tolist() == [[999, 1998], [0, 0], [7, 14], [7, 14]]
    assert targets.tolist() == [999, 0, 7, 7]
    assert targets.dtype == torch.int64
    assert inputs.dtype == torch.float32
    assert len(made) == 1000


def test_parts_join_without_seam(tmp_path, monkeypatch):
    """Rows decoded in many small parts are those decoded in one."""
    monkeypatch.setattr(feeding, "PART_BYTES", 800)
    task = Doubler()
    made = feed(task, table(1001), tmp_path)
    assert len(task.calls) > 10
    assert sum(task.calls) == 1001
    assert torch.equal(made.targets, torch.arange(1001))
    assert torch.equal(made.inputs[:, 1], 2.0 * torch.arange(1001))


def test_ranks_of_one_node_decode_once_together(tmp_path):
    """Of feeds that are made at the same time, one decodes and the others map its files."""
    task = Doubler()
    with ThreadPoolExecutor(4) as pool:
        feeds = list(pool.map(lambda _: feed(task, table(50_000), tmp_path), range(4)))
    assert sum(task.calls) == 50_000
    assert all(torch.equal(made.targets, torch.arange(50_000)) for made in feeds)


def test_group_that_replaces_a_failed_one_decodes_nothing(tmp_path):
    """Files outlive a feed that is closed without having finished."""
    feed(Doubler(), table(100), tmp_path).close()
    again = Doubler()
    made = feed(again, table(100), tmp_path)
    assert again.calls == []
    assert made.take(np.array([42]))[1].item() == 42


def test_finished_run_leaves_nothing(tmp_path):
    """The last rank that finishes removes the folder; one before it does not; taken tensors stay."""
    first, second = (feed(Doubler(), table(100), tmp_path) for _ in range(2))
    inputs, _ = second.take(np.array([5]))
    first.close(finished=True)
    assert (tmp_path / "attempt").exists()
    second.close(finished=True)
    assert list(tmp_path.iterdir()) == []
    assert inputs.tolist() == [[5, 10]]


def test_two_feeds_of_one_run_stay_apart(tmp_path):
    """Training and held-out rows share a folder by name; no rows at all are fine."""
    train = feed(Doubler(), table(10), tmp_path)
    held_out = feed(Doubler(), table(0), tmp_path, name="held_out")
    assert (len(train), len(held_out)) == (10, 0)
    assert held_out.inputs.shape == (0, 2)
    assert held_out.take(np.empty(0, np.int64))[0].shape == (0, 2)


def test_feed_of_killed_decoder_is_made_by_another(tmp_path):
    """A rank that is killed while it decodes leaves no file that is taken for complete, and holds up nobody."""
    program = (
        "import sys, time, pathlib, torch, numpy as np, pyarrow as pa\n"
        "from lepton_ray.training.feeding import Feed\n"
        "class Slow:\n"
        "    def inputs(self, rows, transforms):\n"
        "        print('decoding', flush=True)\n"
        "        if rows.num_rows != 64: time.sleep(600)\n"
        "        return torch.zeros(rows.num_rows, 2)\n"
        "    def targets(self, rows, transforms):\n"
        "        return torch.zeros(rows.num_rows, dtype=torch.int64)\n"
        "Feed(Slow(), pa.table({'value': np.arange(1000)}), {}, torch.device('cpu'), pathlib.Path(sys.argv[1]))\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path / "attempt")], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert [process.stdout.readline() for _ in range(2)] == ["decoding\n"] * 2
        process.kill()
    made = feed(Doubler(), table(1000), tmp_path, stall_s=30.0)
    assert torch.equal(made.targets, torch.arange(1000))


def test_waiting_rank_gives_up_on_decoder_that_stands_still(tmp_path):
    """A bounded wait: the error says what stands still."""
    folder = tmp_path / "attempt"
    folder.mkdir()
    with (folder / "train.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        begun = time.monotonic()
        with pytest.raises(LeptonError, match=r"feed train: .* no progress in 0\.3 s"):
            feed(Doubler(), table(10), tmp_path, stall_s=0.3)
        assert time.monotonic() - begun < 20


def test_task_whose_rows_depend_on_each_other_is_refused(tmp_path, monkeypatch):
    """Padding to the longest row of a part would give another model input for the same row."""
    monkeypatch.setattr(feeding, "PART_BYTES", 800)

    class Padder(Doubler):
        def inputs(self, rows: pa.Table, transforms: Any) -> torch.Tensor:
            return torch.zeros(rows.num_rows, int(rows["value"][-1].as_py()) // 100 + 1)

    with pytest.raises(LeptonError, match="decode each row to the same shape and type"):
        feed(Padder(), table(1000), tmp_path)
    assert not (tmp_path / "attempt" / "train.json").exists()


def test_full_disk_is_told_before_anything_is_decoded_to_it(tmp_path, monkeypatch):
    """One line that names folder and size, not a bus error on a page of a hole."""

    def full(descriptor: int, offset: int, length: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(LeptonError, match=r"attempt cannot hold the decoded rows .* No space left"):
        feed(Doubler(), table(1000), tmp_path)


def test_abandoned_folders_of_others_are_removed_and_used_ones_kept(tmp_path):
    """What killed runs left on a node goes with the next run there; what a live one uses stays."""
    live = Feed(Doubler(), table(10), {"factor": 2}, CPU, tmp_path / "live")
    Feed(Doubler(), table(10), {"factor": 2}, CPU, tmp_path / "dead").close()
    for name in ("live", "dead"):
        os.utime(tmp_path / name / feeding._IN_USE, (0, 0))
    made = feed(Doubler(), table(10), tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["attempt", "live"]
    assert live.take(np.array([3]))[1].item() == 3
    made.close(finished=True)


def test_files_say_what_they_hold(tmp_path):
    """The index is written last, as JSON: type and shape of each file."""
    feed(Doubler(), table(10), tmp_path)
    assert json.loads((tmp_path / "attempt" / "train.json").read_text()) == {
        "inputs": {"dtype": "float32", "shape": [10, 2]},
        "targets": {"dtype": "int64", "shape": [10]},
    }
