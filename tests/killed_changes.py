"""A process that changes tables and is killed in the middle of it: one that has everything loaded, and its children.

Each child does one operation and kills itself by SIGKILL, before or after the n-th write that it makes to the store, or
after some time, wherever it is then.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections.abc import Mapping
from typing import Any, Self

SCRIPT = """
import json, os, signal, sys, threading
import pyarrow as pa
from lepton_ray.data import edits, merging, parts, retention, tables, upkeep
from lepton_ray.storage import local, open_store, s3

WRITES = ("put", "put_if_absent", "replace", "delete")

def die():
    os.kill(os.getpid(), signal.SIGKILL)
    threading.Event().wait(60)

def watched(kind, kill_at, after, seen):
    def watch(name):
        act = getattr(kind, name)
        def counted(*args, **options):
            number = len(seen)
            seen.append(name)
            if number == kill_at and not after:
                die()
            done = act(*args, **options)
            if number == kill_at and after:
                die()
            return done
        setattr(kind, name, counted)
    for name in WRITES:
        watch(name)

def rows(seed):
    return pa.table({"key": [f"{seed}-{n}" for n in range(40)], "x": range(40 * seed, 40 * seed + 40), "y": [0] * 40})

def work(job):
    os.environ.update(job["environment"])
    parts.PART_BYTES = 1  # a file for each batch of rows
    store, seen = open_store(job["store"]), []
    watched(type(store), job["kill_at"], job["after"], seen)
    if job["after_s"] is not None:
        timer = threading.Timer(job["after_s"], die)
        timer.daemon = True
        timer.start()
    if job["verb"] == "ingest":
        source = tables.open_source
        def in_pieces(*given):
            opened = source(*given)
            batches = (batch.slice(at, 10) for batch in opened.batches for at in range(0, batch.num_rows, 10))
            return type(opened)(opened.name, opened.digest, batches)
        tables.open_source = in_pieces
        tables.ingest(store, "t", rows(9), mode="append")
    elif job["verb"] == "update":
        edits.update(store, "t", {"x": "x + 1000"}, where="true")
    else:
        retention.vacuum(store, "t", keep_days=0)
    return len(seen)

for line in sys.stdin:
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        try:
            os.write(writer, str(work(json.loads(line))).encode())
        except BaseException as error:
            os.write(writer, repr(error).encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        said = pipe.read()
    _, status = os.waitpid(child, 0)
    print(json.dumps({"killed": os.WIFSIGNALED(status), "said": said}), flush=True)
"""


class Workshop:
    """The process that has everything loaded; a context manager."""

    def __enter__(self) -> Self:
        self._process = subprocess.Popen(
            [sys.executable, "-c", SCRIPT], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.communicate(timeout=10)
        self._process.kill()
        self._process.wait(10)

    def do(
        self,
        verb: str,
        store: str,
        environment: Mapping[str, str],
        *,
        kill_at: int = -1,
        after: bool = False,
        after_s: float | None = None,
    ) -> dict[str, Any]:
        """Have a child do it: whether it was `killed`, and what it `said`: how often it wrote, or its error."""
        job = {"verb": verb, "store": store, "environment": dict(environment), "kill_at": kill_at, "after": after}
        assert self._process.stdin is not None  # for the type checker
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps({**job, "after_s": after_s}) + "\n")
        self._process.stdin.flush()
        answer: dict[str, Any] = json.loads(self._process.stdout.readline())
        return answer
