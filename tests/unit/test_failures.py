"""What Ray Train hands over after a failure, told in one kind and one line."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ray.exceptions import ActorDiedError, NodeDiedError, OutOfMemoryError, RayActorError, RayTaskError
from ray.train.v2._internal.exceptions import (  # noqa: TID251 - what is told
    UserExceptionWithTraceback,
    WorkerGroupStartupFailedError,
    WorkerGroupStartupTimeoutError,
    WorkerHealthCheckFailedError,
    WorkerHealthCheckTimeoutError,
)
from ray.train.v2._internal.execution.preemption import PreemptionInfo  # noqa: TID251
from ray.train.v2.api.exceptions import (  # noqa: TID251
    ControllerError,
    PreemptionError,
    WorkerGroupError,
)

from lepton_ray.errors import ConflictError, IntegrityError, LeptonError, RefusedError, UnavailableError, UsageError
from lepton_ray.training.divergence import Diverged
from lepton_ray.training.failures import classify, explain, words_of_ranks
from lepton_ray.training.preemption import Preempted

GLOO = RuntimeError("[/src/gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:4711")
CRASH = (
    "The actor died unexpectedly before finishing this task.\n\tclass_name: RayTrainWorkerHost\n\tactor_id: 0123\n"
    "\tpid: 4242\n\tnamespace: lepton-ray\n\tip: 10.0.0.7\n"
    "The actor is dead because its worker process has died. Worker exit type: SYSTEM_ERROR Worker exit detail: Worker "
    "unexpectedly exits with a connection error code 2. End of file. There are some potential root causes. (1) The "
    "process is killed by SIGKILL by OOM killer due to high memory usage. (2) ray stop --force is called. (3) The "
    "worker is crashed unexpectedly due to SIGSEGV or other unexpected errors."
)
NODE = (
    "The actor died unexpectedly before finishing this task.\n\tpid: 4242\n\tip: 10.0.0.7\nThe actor died because its "
    "node has died. Node Id: 12ab\n\tthe actor's node was terminated unexpectedly: health check failed"
)
RAY_MEMORY = (
    "Task was killed due to the node running low on memory.\nMemory on the node (IP: 10.0.0.7) was 30.5GB / 32GB, "
    "which exceeds the memory usage threshold of 0.95.\nRefer to the documentation on how to address it"
)


def died(text: str, *, preempted: bool = False) -> Exception:
    """As Ray Train tells a rank whose process is gone."""
    return WorkerHealthCheckFailedError("A worker health check failed.", RayActorError("0123", text, False, preempted))


def group(**ranks: Exception) -> WorkerGroupError:
    return WorkerGroupError("...", {int(name.removeprefix("r")): error for name, error in ranks.items()})


def in_task(cause: Exception) -> Exception:
    return RayTaskError("poll_status", "Traceback ...\n  file\nValueError: boom", cause)


@pytest.mark.parametrize(
    ("error", "kind", "rank", "words"),
    [
        (group(r1=died(CRASH)), "worker_lost", 1, "rank 1 failed: its process was killed or crashed (pid 4242, on "),
        (group(r0=GLOO, r1=died(CRASH)), "worker_lost", 1, "rank 1 failed: its process was killed or crashed"),
        (group(r1=died(NODE)), "worker_lost", 1, "rank 1 failed: its node is gone (pid 4242, on 10.0.0.7)"),
        (group(r2=NodeDiedError("the node 1.2.3.4 is dead")), "worker_lost", 2, "rank 2 failed: its node is gone"),
        (group(r0=died("unknown end")), "worker_lost", 0, "rank 0 failed: unknown end"),
        (group(r0=GLOO, r1=ValueError("boom")), "error", 1, "rank 1 failed: boom"),
        (group(r0=ValueError("boom"), r1=died(CRASH)), "error", 0, "rank 0 failed: boom"),
        (group(r1=UserExceptionWithTraceback(ValueError("boom"), "Traceback")), "error", 1, "rank 1 failed: boom"),
        (group(r1=in_task(ValueError("boom"))), "error", 1, "rank 1 failed: boom"),
        (group(r0=GLOO, r1=GLOO), "worker_lost", None, "rank 0 failed: [/src/gloo"),
        (
            group(r0=torch.distributed.DistBackendError("NCCL error: remote process exited"), r1=died(CRASH)),
            "worker_lost", 1, "rank 1 failed: its process was killed",
        ),
        (group(r0=died(CRASH), r1=WorkerHealthCheckFailedError("", OutOfMemoryError(RAY_MEMORY))),
         "out_of_memory", 1, "rank 1 failed: out of memory: Task was killed due to the node running low on memory."),
        (group(r0=torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nSee docs")),
         "out_of_memory", 0, "rank 0 failed: out of memory: CUDA out of memory. Tried to allocate 2.00 GiB."),
        (group(r0=MemoryError()), "out_of_memory", 0, "rank 0 failed: out of memory: MemoryError"),
        (group(r1=RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory")),
         "out_of_memory", 1, "rank 1 failed: out of memory: "),
        (group(r0=WorkerHealthCheckTimeoutError("A worker health check has been hanging for 600 seconds.\n")),
         "hang", 0, "rank 0 failed: A worker health check has been hanging"),
        (group(r0=died(CRASH, preempted=True), r1=ValueError("x")), "preempted", None, "The actor is dead because"),
        (group(r0=Preempted("r", 7, (1,), committed=True), r1=GLOO), "preempted", None, "run r: rank 1 preempted"),
        (PreemptionError(PreemptionInfo(1, {"node": [0]})), "preempted", None, "Training was interrupted by node"),
        (group(r0=UnavailableError("s3 is away")), "storage", 0, "rank 0 failed: s3 is away"),
        (group(r0=Diverged("weights differ")), "divergence", 0, "rank 0 failed: weights differ"),
        (group(r0=LeptonError("not finite again and again")), "error", 0, "rank 0 failed: not finite again and again"),
        (ControllerError(WorkerGroupStartupFailedError("a node is gone")), "worker_lost", None, "a node is gone"),
        (ControllerError(WorkerGroupStartupTimeoutError(2)), "waiting", None, "The worker group startup timed out"),
        (ControllerError(ValueError("in a callback")), "error", None, "in a callback"),
    ],
)  # fmt: skip
def test_failure_is_told_in_kind_rank_and_words(error: Exception, kind: str, rank: int | None, words: str) -> None:
    failure = classify(error, step=12, at=3.0)
    assert (failure.kind, failure.rank, failure.step, failure.at) == (kind, rank, 12, 3.0)
    assert failure.words.startswith(words)
    assert "\n" not in failure.words


@pytest.mark.parametrize(
    ("error", "final"),
    [
        (group(r0=UsageError("training.options.x is 3")), True),
        (group(r0=IntegrityError("does not fit the model")), True),
        (group(r0=RefusedError("attempt 1 was taken over by attempt 2")), True),
        (ControllerError(ValueError("in a callback")), True),
        (group(r0=ConflictError("changed meanwhile")), False),
        (group(r0=ValueError("boom")), False),
        (ControllerError(WorkerGroupStartupFailedError("a node is gone")), False),
    ],
)
def test_what_would_only_repeat_itself_is_known(error: Exception, final: bool) -> None:
    """A fenced driver, a wrong setting: trying again changes nothing."""
    assert classify(error).final is final


def test_a_crash_is_no_lack_of_memory_unless_the_kernel_counted_one() -> None:
    """Ray's words name the OOM killer at each crash; evidence is what the cgroup says, and of a dead process only."""
    evidence = {0: "ended by the kernel at the memory limit of 512 MiB", 1: "no"}
    assert classify(group(r0=died(CRASH))).kind == "worker_lost"
    failure = classify(group(r0=died(CRASH), r1=GLOO), out_of_memory=evidence)
    assert (failure.kind, failure.rank) == ("out_of_memory", 0)
    assert failure.words == "rank 0 failed: out of memory: ended by the kernel at the memory limit of 512 MiB"
    assert classify(group(r1=ValueError("boom")), out_of_memory=evidence).kind == "error"


def test_real_death_of_an_actor_is_read() -> None:
    """Without a context, as Ray makes it where it knows nothing."""
    assert classify(group(r0=WorkerHealthCheckFailedError("", ActorDiedError()))).kind == "worker_lost"


def test_all_ranks_words_are_kept_for_the_incident() -> None:
    """One line each, by rank."""
    said = words_of_ranks(group(r1=ValueError("boom"), r0=GLOO))
    assert list(said) == ["0", "1"]
    assert said["1"] == "boom"
    assert words_of_ranks(RuntimeError("x")) == {}


class Odd(Exception):  # noqa: N818 - as users name theirs
    def __init__(self, cause: Any) -> None:
        super().__init__("odd")
        self.cause = cause


def test_a_users_own_cause_is_not_taken_for_rays() -> None:
    """An attribute of that name means nothing on a class that is not Ray's."""
    assert explain(group(r0=Odd(ValueError("inner")))) == "rank 0 failed: odd"
