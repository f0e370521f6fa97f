"""Connecting to Ray: the cluster that is there, or a local one that ends with the command that started it."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import secrets
import shutil
import socket
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

from lepton_ray.errors import UnavailableError, escaped, shown

LOCAL_OBJECT_STORE_BYTES = 256 * 2**20
"""Shared memory of a local Ray: holds the training rows of one run."""

RAY_ENVIRONMENT = {
    # Ray reports usage over the network by default
    "RAY_USAGE_STATS_ENABLED": "0",
    # else Ray hides all GPUs from actors that ask for none, and warns about it at every start
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    # a dead worker is noticed by this poll of Ray Train; its default is 2 s
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    # Ray Train's gauges vanish while a healthy run goes on; the exporter shows ours
    "RAY_TRAIN_METRICS_ENABLED": "0",
    # ranks keep the working directory of the job
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    # checks headers in front of Serve's proxy; see that module
    "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "lepton_ray.serving.edge:middlewares",
}
"""Set, where not set already, before Ray starts: a local cluster's processes inherit it."""

REACH_TIMEOUT_S = 5.0
"""Seconds within which the head of a cluster must take a TCP connection."""
_SCRATCH = re.compile(r"lepton-ray-([0-9]+)-[a-z0-9_]{8}")


@dataclass(frozen=True)
class Cluster:
    """A connection to Ray."""

    local: bool
    """Started by this process, and gone with it."""


def available_cpus() -> int:
    """CPUs this process may use: its affinity mask and the cgroup quota, at least 1."""
    from ray._private.utils import get_num_cpus

    return max(1, min(len(os.sched_getaffinity(0)), int(get_num_cpus())))


@contextlib.contextmanager
def connect(*, object_store_bytes: int = LOCAL_OBJECT_STORE_BYTES, verbose: bool = False) -> Iterator[Cluster]:
    """Ray for the length of a `with` block.

    An open connection is used as it is. Inside a Ray job, or where RAY_ADDRESS is set, that cluster is connected to;
    otherwise a local one with this machine's CPUs, token authentication and no dashboard is started, which is shut
    down at the end together with every process and folder that it made.

    Raises UnavailableError where the cluster does not answer.
    """
    for name, value in RAY_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    import ray

    if ray.is_initialized():
        yield Cluster(local=not os.environ.get("RAY_ADDRESS"))
        return
    level = logging.INFO if verbose else logging.ERROR
    address = os.environ.get("RAY_ADDRESS")
    with contextlib.ExitStack() as stack:
        try:
            if address:
                _check_reachable(address)
                ray.init(address=address, log_to_driver=verbose, logging_level=level, namespace="lepton-ray")
            else:
                scratch = stack.enter_context(scratch_folder())
                stack.enter_context(_environment(scratch))
                stack.enter_context(_fewer_processes(log_monitor=verbose))
                ray.init(
                    address="local",
                    num_cpus=available_cpus(),
                    include_dashboard=False,
                    object_store_memory=object_store_bytes,
                    log_to_driver=verbose,
                    logging_level=level,
                    namespace="lepton-ray",
                    _temp_dir=str(scratch),
                )
        except (OSError, ValueError, RuntimeError, OverflowError) as error:
            ray.shutdown()
            where = f"RAY_ADDRESS {shown(address)}" if address else "local Ray"
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise UnavailableError(
                f"{where}: {escaped(reason)}; check the address, the token and that Ray runs there"
            ) from error
        stack.callback(ray.shutdown)
        yield Cluster(local=not address)


def _check_reachable(address: str) -> None:
    """Raise OSError within seconds where nobody listens: Ray itself goes on trying for many minutes."""
    found = re.fullmatch(r"(?:ray://)?\[?([^/\]]+)\]?:([0-9]{1,5})", address)
    if found:
        socket.create_connection((found.group(1), int(found.group(2))), timeout=REACH_TIMEOUT_S).close()


@contextlib.contextmanager
def scratch_folder() -> Iterator[Path]:
    """A folder of this process, removed at the end of the block; those of processes that were killed go too."""
    base = Path(tempfile.gettempdir())
    for left in base.glob("lepton-ray-*"):
        found = _SCRATCH.fullmatch(left.name)
        if found and left.stat().st_uid == os.getuid() and not Path(f"/proc/{found.group(1)}").exists():
            shutil.rmtree(left, ignore_errors=True)
    # short: a Unix socket's path has at most 107 bytes
    folder = Path(tempfile.mkdtemp(prefix=f"lepton-ray-{os.getpid()}-", dir=base))
    try:
        yield folder
    except BaseException:
        # where Ray's start is interrupted, nobody else ends what it had started, and that makes its folders anew
        _end_processes_of(folder)
        raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _end_processes_of(folder: Path) -> None:
    """End the processes that were given this folder: it has a name of its own, so they are this process's."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.pid != os.getpid() and any(str(folder) in part for part in process.cmdline()):
                process.kill()
                found.append(process)
    psutil.wait_procs(found, timeout=10)


@contextlib.contextmanager
def _environment(scratch: Path) -> Iterator[None]:
    """What the processes of a local Ray inherit, for as long as it lives."""
    settings = {
        # nobody preempts a local Ray: one process less that looks out for it
        "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
        # start idle workers at once, not when the driver has connected
        "RAY_enable_worker_prestart": "1",
        # torch makes its compiler's cache folder as soon as an optimizer is made, and leaves it
        "TORCHINDUCTOR_CACHE_DIR": str(scratch / "torchinductor"),
    }
    if not any(name in os.environ for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")):
        # a token of its own, gone with it: Ray would write one to the home folder, readable by all, and leave it there
        path = scratch / "auth_token"
        path.touch(mode=0o600)
        path.write_text(secrets.token_hex(32), encoding="ascii")
        settings |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(path)}
    mine = {name: value for name, value in settings.items() if name not in os.environ}
    os.environ.update(mine)
    _read_ray_settings_again()
    try:
        yield
    finally:
        for name in mine:
            os.environ.pop(name, None)
        _read_ray_settings_again()


@contextlib.contextmanager
def _fewer_processes(*, log_monitor: bool) -> Iterator[None]:
    """Ray starts without what serves a cluster's operators: dashboard server, autoscaler's monitor, agent's extras.

    They take 4 s of CPU at each start, and `ray.init` has no option for them (`include_dashboard=False` starts the
    server all the same). The block is around `ray.init`; what runs in other processes is Ray's own code as it is.
    """
    from ray._private import node, parameter, utils

    was = parameter.RayParams, node.Node.start_api_server, utils.get_dashboard_dependency_error

    def parameters(**options: object) -> object:
        return was[0](**options, no_monitor=True, include_log_monitor=log_monitor)

    def no_server(self: object, **_: object) -> None:
        self._webui_url = None  # type: ignore[attr-defined]

    parameter.RayParams = parameters
    node.Node.start_api_server = no_server
    # what Ray sees where it was installed without `ray[default]`; the look itself imports half a second of packages
    utils.get_dashboard_dependency_error = lambda: ImportError("no dashboard is wanted")
    try:
        yield
    finally:
        parameter.RayParams, node.Node.start_api_server, utils.get_dashboard_dependency_error = was


def _read_ray_settings_again() -> None:
    """Ray reads mode and token once per process; a second local Ray in one process has others."""
    from ray._raylet import AuthenticationTokenLoader, Config  # type: ignore[attr-defined] # compiled

    Config.initialize("")
    AuthenticationTokenLoader.instance().reset_cache()
