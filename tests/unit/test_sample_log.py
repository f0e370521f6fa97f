"""The log of samples: what a killed rank can tell of its newest steps."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from lepton_ray.data.order import SampleLedger
from lepton_ray.training.sample_log import SETTLED_EVERY, STEPS, SampleLog, account_at, logged

ABOUT = {"rank": 1, "generation": 3, "world_size": 2}


def batch(step: int) -> np.ndarray:
    """Samples of a step: one to four of them."""
    return np.arange(1 + step % 4, dtype=np.int64) + 10 * step


def written(path: Path, first: int, last: int) -> dict[int, SampleLedger]:
    """A log of the steps after `first` up to `last`; the true account after each step."""
    log, ledger, truth = SampleLog(path, 4, ABOUT), SampleLedger(), {}
    log.settle(first, ledger.to_json())
    for step in range(first + 1, last + 1):
        if (step - 1) % SETTLED_EVERY == 0:
            log.settle(step - 1, ledger.to_json())
        log.took(step, batch(step), step // 50)
        ledger.add(step // 50, batch(step))
        truth[step] = SampleLedger.from_json(ledger.to_json())
    return truth


@pytest.mark.parametrize("last", [1, 2, 31, 32, 33, 64, 65, 200])
def test_the_account_of_each_step_that_is_covered(tmp_path: Path, last: int) -> None:
    """The settled account and the ring give, for every step they cover, what was really taken up to there."""
    truth = written(tmp_path / "g3-rank1.log", 0, last)
    (found,) = logged(tmp_path)
    assert {key: found[key] for key in ABOUT} == ABOUT
    assert found["last"] == last
    for step in range(max(1, found["first"]), last + 1):
        assert account_at(Path(found["path"]), step) == truth[step], step


def test_the_newest_two_steps_are_always_covered(tmp_path: Path) -> None:
    """Ranks are one step apart at most, so whatever the survivors hold the lost rank's log covers."""
    for last in range(2, 3 * STEPS):
        written(tmp_path / "g3-rank1.log", 0, last)
        (found,) = logged(tmp_path)
        assert found["first"] <= last - 1 <= last <= found["last"]


def test_a_step_that_was_half_written_is_not_there(tmp_path: Path) -> None:
    """A rank that is killed while it writes its entry has none for that step."""
    path = tmp_path / "g3-rank1.log"
    written(path, 0, 10)
    ring = np.fromfile(path, np.int64).reshape(STEPS, -1)
    ring[10 % STEPS, 0] = -1
    ring.tofile(path)
    assert logged(tmp_path)[0]["last"] == 9


def test_a_rank_without_a_share_has_an_empty_entry(tmp_path: Path) -> None:
    """A small last batch may leave a rank without samples; the step is covered all the same."""
    log = SampleLog(tmp_path / "g1-rank0.log", 0, {"rank": 0, "generation": 1, "world_size": 1})
    log.settle(0, {})
    log.took(1, np.empty(0, np.int64), 0)
    assert logged(tmp_path)[0]["last"] == 1
    assert account_at(tmp_path / "g1-rank0.log", 1) == SampleLedger()


def test_what_is_no_log_is_passed_over(tmp_path: Path) -> None:
    """An unreadable file costs that rank's account, not the restart."""
    written(tmp_path / "g3-rank1.log", 0, 5)
    (tmp_path / "g3-rank2.log").write_bytes(b"short")
    (tmp_path / "g3-rank2.account").write_text("{}", encoding="utf-8")
    (tmp_path / "g3-rank4.log").write_bytes(b"")
    assert [found["rank"] for found in logged(tmp_path)] == [1]
