"""Two ways to start a run's driver again: a process of this machine, or a job of a Ray cluster."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, Protocol

from lepton_ray.errors import UnavailableError, escaped, shown

State = Literal["alive", "over", "stopped", "unknown"]
"""Of a driver that was started; `unknown`: by somebody else, or the cluster has forgotten it."""

ANSWER_S = 20.0
"""Seconds that a cluster is given to take a connection, and to answer."""
_STATES: dict[str, State] = {"PENDING": "alive", "RUNNING": "alive", "STOPPED": "stopped"}


class Submission(Protocol):
    """A way to start drivers. Names are unique for each start; starting under a used name again does nothing."""

    def check(self) -> None:
        """Raise UnavailableError where nothing could be started now."""

    def start(self, name: str, run: str) -> None:
        """Start a driver of `run`. Raises UnavailableError."""

    def state(self, name: str) -> State:
        """How the driver of this name does. Raises UnavailableError."""

    def obstacle(self, job: str | None) -> str | None:
        """Why a run cannot be resumed this way whose last driver was this Ray job, or none; None where it can."""


class LocalProcesses:
    """Drivers as processes of this machine, in sessions of their own: they outlive the service that started them.

    Args:
        store_uri: where the runs are; what they print goes to this process's stderr.
    """

    def __init__(self, store_uri: str) -> None:
        self._store_uri = store_uri
        self._started: dict[str, subprocess.Popen[bytes]] = {}

    def check(self) -> None:
        """A process can always be started."""

    def start(self, name: str, run: str) -> None:
        """Start `lepton-ray train --run RUN`."""
        if name in self._started:
            return
        command = [sys.executable, "-m", "lepton_ray.cli", "train", "--run", run, "--store", self._store_uri]
        try:
            self._started[name] = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=2, start_new_session=True)
        except OSError as error:
            raise UnavailableError(f"run {run}: its driver could not be started: {error}; free memory") from error

    def state(self, name: str) -> State:
        """Whether the process still runs."""
        process = self._started.get(name)
        if process is None:
            return "unknown"
        return "alive" if process.poll() is None else "over"

    def obstacle(self, job: str | None) -> str | None:
        """A run that a Ray job drove belongs on its cluster, and only that cluster knows whether it was stopped."""
        return f"it was the Ray job {shown(job)}; give --address of its cluster" if job else None


class RayJobs:
    """Drivers as jobs of a Ray cluster.

    Args:
        address: of the cluster's dashboard, e.g. `http://head:8265`.
        store_uri: where the runs are; the jobs find it in LEPTON_STORE.
        working_dir: a folder that is sent with each job, for clusters where lepton-ray is not installed.
    """

    def __init__(self, address: str, store_uri: str, working_dir: Path | None = None) -> None:
        self._address, self._store_uri, self._working_dir = address, store_uri, working_dir
        self._client: Any = None

    def check(self) -> None:
        """Ask the cluster for its version."""
        with self._translated():
            self._connected().get_version()

    def start(self, name: str, run: str) -> None:
        """Submit the job; of any number of services that do, the cluster takes one."""
        program = "jobs/train.py" if self._working_dir else "-m lepton_ray.cli train"
        environment: dict[str, Any] = {"env_vars": {"LEPTON_STORE": self._store_uri}}
        if self._working_dir:
            environment["working_dir"] = str(self._working_dir)
        try:
            with self._translated():
                self._connected().submit_job(
                    entrypoint=f"python {program} --run {run}",  # the name of a run is letters, digits and dashes
                    submission_id=name,
                    runtime_env=environment,
                )
        except UnavailableError:
            if self.state(name) == "unknown":  # else it was this request, or another service's, that made the job
                raise

    def state(self, name: str) -> State:
        """What the cluster says of the job."""
        try:
            with self._translated():
                status = str(self._connected().get_job_status(name).value)
        except UnavailableError as error:
            if "status code 404" in str(error.__cause__):
                return "unknown"
            raise
        return _STATES.get(status, "over")

    def obstacle(self, job: str | None) -> str | None:
        """None: every run can be driven by a job."""
        return None

    def _connected(self) -> Any:
        if self._client is None:
            from ray.job_submission import JobSubmissionClient

            class Client(JobSubmissionClient):  # type: ignore[misc] # Ray is untyped here
                def _do_request(self, *arguments: Any, **options: Any) -> Any:  # else it waits without end
                    return super()._do_request(*arguments, **{"timeout": ANSWER_S, **options})

            # Ray lets this variable, and after it RAY_ADDRESS, overrule the argument
            os.environ["RAY_API_SERVER_ADDRESS"] = self._address
            self._client = Client(self._address)
        return self._client

    @contextlib.contextmanager
    def _translated(self) -> Iterator[None]:
        from ray.exceptions import RayError

        try:
            yield
        except (RayError, RuntimeError, OSError, ValueError) as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise UnavailableError(
                f"Ray at {shown(self._address)}: {escaped(reason)}; check address, token and that Ray runs"
            ) from error
