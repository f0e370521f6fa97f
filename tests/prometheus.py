"""A real Prometheus for tests: Debian's package, on a loopback port of its own, in a folder of its own."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

START_S = 30.0
INSTALL_S = 240.0

CONFIG = """\
global:
  scrape_interval: 1s
  scrape_timeout: 1s
scrape_configs:
"""
JOB = """\
  - job_name: {name}
    sample_limit: 20000
    label_limit: 16
    label_value_length_limit: 256
    body_size_limit: 8MB
    static_configs:
      - targets: ["{target}"]
"""
CREDENTIALS = """\
    authorization:
      credentials_file: {path}
"""


def prometheus_programs() -> tuple[str, str]:
    """Paths of `prometheus` and `promtool`; installs Debian's package where they are missing.

    RuntimeError that says what to do where that is not possible.
    """
    found = shutil.which("prometheus"), shutil.which("promtool")
    if not all(found):
        _install()
        found = shutil.which("prometheus"), shutil.which("promtool")
    server, tool = found
    if server is None or tool is None:
        raise RuntimeError("prometheus is not there after its installation; apt-get install prometheus")
    return server, tool


def _install() -> None:
    if os.geteuid() != 0 or shutil.which("apt-get") is None:
        raise RuntimeError("this test needs Prometheus: run as root, or before it: apt-get install prometheus")
    # RUNLEVEL=1: the package must not start its service
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive", "RUNLEVEL": "1"}
    install = ["apt-get", "install", "-y", "-q", "--no-install-recommends", "prometheus"]
    for command in (["apt-get", "update", "-q"], install):
        done = subprocess.run(
            command,
            env=environment,
            capture_output=True,
            text=True,
            timeout=INSTALL_S,
            check=False,
            stdin=subprocess.DEVNULL,
        )
        if done.returncode != 0:
            raise RuntimeError(f"{' '.join(command)} failed: {done.stderr.strip()[-500:]}")


class Prometheus:
    """A server that scrapes `targets` (name -> `host:port`) every second, until it is closed.

    Args:
        folder: for its configuration, data and log.
        targets: what to scrape.
        credentials: target name -> file with the bearer token to send.
    """

    def __init__(self, folder: Path, targets: Mapping[str, str], credentials: Mapping[str, Path] | None = None) -> None:
        server, _ = prometheus_programs()
        config = CONFIG
        for name, target in targets.items():
            config += JOB.format(name=name, target=target)
            if credentials and name in credentials:
                config += CREDENTIALS.format(path=credentials[name])
        (folder / "prometheus.yml").write_text(config)
        self._log = folder / "log"
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [
                    server,
                    f"--config.file={folder / 'prometheus.yml'}",
                    f"--storage.tsdb.path={folder / 'data'}",
                    "--web.listen-address=127.0.0.1:0",
                ],
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
            )
        try:
            self.url = f"http://127.0.0.1:{self._port()}"
            self._wait_until_ready()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop it."""
        self._process.terminate()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait(10)

    def query(self, expression: str) -> dict[tuple[tuple[str, str], ...], float]:
        """An instant query: (sorted labels without name, job and instance) -> value."""
        answer = self._get("/api/v1/query?" + urllib.parse.urlencode({"query": expression}))
        return {
            tuple(sorted((k, v) for k, v in each["metric"].items() if k not in ("__name__", "job", "instance"))): float(
                each["value"][1]
            )
            for each in answer["result"]
        }

    def wait_for(self, expression: str, expected: float, timeout_s: float = 60.0) -> None:
        """Wait until a query's only value is `expected`; AssertionError with the last answer otherwise."""
        deadline = time.monotonic() + timeout_s
        answer = self.query(expression)
        while list(answer.values()) != [expected] and time.monotonic() < deadline:
            time.sleep(0.1)
            answer = self.query(expression)
        assert list(answer.values()) == [expected], f"{expression}: {answer}, expected {expected}"

    def targets(self) -> dict[str, tuple[str, str]]:
        """Job -> (health, last error)."""
        active = self._get("/api/v1/targets?state=active")["activeTargets"]
        return {each["labels"]["job"]: (each["health"], each["lastError"]) for each in active}

    def _get(self, path: str) -> Any:
        with urllib.request.urlopen(self.url + path, timeout=30) as answer:  # noqa: S310 - its own loopback address
            return json.load(answer)["data"]

    def _port(self) -> int:
        deadline = time.monotonic() + START_S
        while time.monotonic() < deadline and self._process.poll() is None:
            found = re.search(r'msg="Listening on" address=127\.0\.0\.1:(\d+)', self._log.read_text())
            if found:
                return int(found.group(1))
            time.sleep(0.05)
        raise RuntimeError(f"Prometheus did not start: {self._log.read_text()[-1000:]}")

    def _wait_until_ready(self) -> None:
        deadline = time.monotonic() + START_S
        while time.monotonic() < deadline:
            try:
                with urllib.request.urlopen(self.url + "/-/ready", timeout=5):  # noqa: S310 - its own loopback address
                    return
            except urllib.error.URLError:
                time.sleep(0.05)
        raise RuntimeError(f"Prometheus is not ready: {self._log.read_text()[-1000:]}")
