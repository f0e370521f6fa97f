"""How ranks are started and put away, on a real local Ray."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import psutil
import pytest
from digits_slice import small_settings

from lepton_ray.cluster import connect
from lepton_ray.errors import LeptonError
from lepton_ray.storage import open_store
from lepton_ray.training.launch import launch
from lepton_ray.training.plan import OwnFunction, RankPlan

pytestmark = pytest.mark.ray
WAIT_S = 30.0


def below() -> list[str]:
    """Command lines of all processes below this one."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            found.append(" ".join(process.cmdline()))
        except psutil.Error:
            continue
    return found


def gone(word: str) -> bool:
    """Whether within the limit no process below has the word in its command line."""
    deadline = time.monotonic() + WAIT_S
    while any(word in line for line in below()):
        if time.monotonic() > deadline:
            return False
        threading.Event().wait(0.1)
    return True


def test_ranks_of_a_run_that_is_given_up_are_put_away(tmp_path: Path) -> None:
    """A driver whose run was taken over stops its ranks at once and gives the CPUs back; a failed one says why.

    On the way: the local Ray has no process that serves operators only, and no rank loads torch's compiler.
    """
    import ray

    store = open_store((tmp_path / "store").as_uri())
    lost = threading.Event()

    def hang() -> None:
        import sys
        import time
        from pathlib import Path

        (Path(folder) / f"rank-{os.getpid()}").write_text(str("torch._dynamo" in sys.modules), encoding="utf-8")
        time.sleep(600)

    def fail() -> None:
        raise ValueError("no such luck")

    folder = str(tmp_path)

    def watch() -> None:
        if len(list(tmp_path.glob("rank-*"))) == 2:
            lost.set()

    with connect() as cluster:
        for name in ("dashboard.py", "monitor.py", "log_monitor.py"):
            assert not any(f"/{name}" in line for line in below())
        plan = RankPlan(small_settings("start", max_failures=0), store.uri, 1, {}, "")
        with pytest.raises(LeptonError, match="another driver took the run over"):
            launch(plan, OwnFunction(hang), watch=watch, lost=lost, cluster=cluster)
        assert [path.read_text() for path in tmp_path.glob("rank-*")] == ["False", "False"]
        assert gone("RayTrainWorker")
        assert gone("RunController")
        assert {entry["state"] for entry in ray.util.placement_group_table().values()} <= {"REMOVED"}
        with pytest.raises(LeptonError, match=r"run start: rank \d failed: .*no such luck"):
            launch(plan, OwnFunction(fail), watch=lambda: None, lost=threading.Event(), cluster=cluster)
        assert gone("RayTrainWorker")
