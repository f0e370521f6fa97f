"""The `lepton-ray serve` commands: what they tell before any Ray is started."""

from __future__ import annotations

import socket
import subprocess
import sys
from typing import Any

import pytest
from click.testing import CliRunner, Result
from served_model import publish

from lepton_ray.cli.serve import serve
from lepton_ray.errors import LeptonError, NotFoundError, UnavailableError, UsageError
from lepton_ray.storage import Store


def invoke(*words: str) -> Result:
    return CliRunner().invoke(serve, list(words))


def told(result: Result) -> LeptonError:
    """The error that the command ended with."""
    assert isinstance(result.exception, LeptonError), result.output
    assert "\n" not in str(result.exception)
    return result.exception


@pytest.fixture(autouse=True)
def no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing here may start or reach a Ray; the commands write RAY_ADDRESS, so it is put back."""

    def started(*_: Any, **__: Any) -> None:
        pytest.fail("Ray was asked for")

    monkeypatch.setenv("RAY_ADDRESS", "")
    monkeypatch.setattr("ray.init", started)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("max_batchh=3", "serving.max_batchh: unknown key; did you mean 'max_batch'?"),
        ("max_batch=many", "serving.max_batch is 'many'"),
        ("max_batch=0", "serving.max_batch is 0"),
        ("min_replicas=9", "min_replicas 9 is above max_replicas 2"),
        ("serving.max_batch=3", "expected a serving setting as key=value"),
        ("max_batch", "expected key.path=value"),
        ("=3", "expected key.path=value"),
    ],
)
def test_a_wrong_setting_is_told(override: str, words: str) -> None:
    error = told(invoke("deploy", "digits", "--model", "digits", "-s", override))
    assert words in str(error)
    assert error.exit_code == 2


@pytest.mark.parametrize("port", ["-1", "65536", "2.5", "x"])
def test_a_wrong_port_is_told(port: str) -> None:
    result = invoke("deploy", "digits", "--model", "digits", "--port", port)
    assert result.exit_code == 2
    assert "--port" in result.output


def test_a_port_in_use_is_told(file_store: Store) -> None:
    publish(file_store)
    with socket.create_server(("127.0.0.1", 0)) as owner:
        port = str(owner.getsockname()[1])
        words = ("deploy", "digits", "--model", "digits", "--store", file_store.uri, "--port", port)
        error = told(invoke(*words))
    assert isinstance(error, UsageError)
    assert port in str(error)


def test_a_model_is_looked_up_before_ray_starts(file_store: Store) -> None:
    publish(file_store)
    error = told(invoke("deploy", "digits", "--model", "nope", "--store", file_store.uri, "--port", "0"))
    assert isinstance(error, NotFoundError)
    assert error.exit_code == 5
    assert "models there: digits" in str(error)


@pytest.mark.parametrize(
    "words", [("../x",), ("UPPER",), ("digits", "--route-prefix", "digits"), ("digits", "--route-prefix", "/a/../b")]
)
def test_a_wrong_name_or_path_is_told(file_store: Store, words: tuple[str, ...]) -> None:
    publish(file_store)
    error = told(invoke("deploy", *words, "--model", "digits", "--store", file_store.uri, "--port", "0"))
    assert isinstance(error, UsageError)
    assert ascii(words[-1]) in str(error)


@pytest.mark.parametrize("words", [("status",), ("status", "digits"), ("delete", "digits")])
def test_a_cluster_that_is_away_is_exit_code_6(words: tuple[str, ...]) -> None:
    """Within seconds: Ray itself goes on trying for many minutes."""
    with socket.create_server(("127.0.0.1", 0)) as gone:
        address = f"127.0.0.1:{gone.getsockname()[1]}"
    error = told(invoke(*words, "--address", address))
    assert isinstance(error, UnavailableError)
    assert error.exit_code == 6
    assert address in str(error)


@pytest.mark.parametrize("command", [(), ("deploy",), ("status",), ("delete",)])
def test_help_loads_no_heavy_library(command: tuple[str, ...]) -> None:
    code = f"""import sys
from lepton_ray.cli.serve import serve
serve.main([*{command!r}, "--help"], standalone_mode=False)
print("loaded:", *({{"torch", "ray", "pyarrow", "deltalake"}} & sys.modules.keys()), sep="")"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.splitlines()[-1] == "loaded:"
