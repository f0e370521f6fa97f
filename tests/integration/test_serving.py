"""Endpoints on a real Ray Serve: deployed, asked over HTTP, scaled, broken, replaced, deleted."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from urllib.parse import urlsplit

import httpx
import pytest
from bad_requests import MALFORMED, REFUSED
from click.testing import CliRunner
from served_model import OPTIONS, TRANSFORMS, image, predictor, publish
from serving_clients import load, read_document, wait_for

from lepton_ray.cli.serve import serve
from lepton_ray.cluster import connect
from lepton_ray.errors import ConflictError, IntegrityError, NotFoundError, UsageError
from lepton_ray.registry import Registry
from lepton_ray.serving import Endpoint, control, delete, deploy, endpoints, status
from lepton_ray.settings import ServingSettings
from lepton_ray.storage import Store, open_store

pytestmark = pytest.mark.ray

SETTINGS = ServingSettings(
    min_replicas=1,
    max_replicas=2,
    target_ongoing_requests=3.0,
    max_batch=8,
    max_body_bytes=65_536,
    request_timeout_s=15.0,
    cpus_per_replica=1.0,
)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """A file store with `digits:1`."""
    made = open_store(tmp_path_factory.mktemp("store").as_uri())
    publish(made)
    return made


@pytest.fixture(scope="module")
def ray() -> Iterator[None]:
    """A local Ray of four CPUs, whatever the machine has, for the module."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("RAY_ADDRESS", raising=False)
        patch.setattr("lepton_ray.cluster.available_cpus", lambda: 4)
        with connect(object_store_bytes=150_000_000):
            yield


@pytest.fixture(scope="module")
def endpoint(ray: None, store: Store) -> Endpoint:
    """`digits:1`, deployed."""
    return deploy("digits", "digits:1", store, SETTINGS, port=0)


def pids() -> list[int]:
    """Processes of the running replicas of `digits`."""
    details = control.details()
    assert details is not None
    replicas = details["applications"]["digits"]["deployments"]["endpoint"]["replicas"]
    return [replica["pid"] for replica in replicas if replica["state"] == "RUNNING"]


def test_the_command_serves_until_it_is_interrupted(store: Store) -> None:
    """Without a cluster it starts a Ray of its own, and Ctrl-C takes both down; the session checks for leftovers."""
    words = ["serve", "deploy", "alone", "--model", "digits:1", "--port", "0", "-s", "max_replicas=1", "--json"]
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    with subprocess.Popen(
        [sys.executable, "-m", "lepton_ray.cli", *words, "--store", store.uri],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            document = read_document(process)
            answer = httpx.post(f"{document['url']}/predict", json={"image": image(0)}, trust_env=False, timeout=30)
            assert answer.status_code == 200
            assert answer.headers["x-lepton-model"] == "digits:1"
            assert document["local"] is True
            process.send_signal(signal.SIGINT)
            _, errors = process.communicate(timeout=40)
        finally:
            process.kill()
    assert process.returncode == 130
    assert errors.splitlines()[-1] == "interrupted"
    assert "Traceback" not in errors
    with pytest.raises(httpx.ConnectError):
        httpx.get(document["url"], trust_env=False)


def test_a_port_in_use_starts_nothing(ray: None, store: Store) -> None:
    with socket.create_server(("127.0.0.1", 0)) as owner:
        port = owner.getsockname()[1]
        with pytest.raises(UsageError, match=f"port {port} of 127.0.0.1 is in use"):
            deploy("digits", "digits", store, SETTINGS, port=port)
    assert control.details() is None
    assert endpoints() == []


def test_more_cpus_than_there_are_is_told_at_once(ray: None, store: Store) -> None:
    with pytest.raises(UsageError, match="cpus_per_replica is 64"):
        deploy("digits", "digits", store, ServingSettings(cpus_per_replica=64.0), port=0)
    assert control.details() is None


def test_served_answers_equal_the_offline_ones(endpoint: Endpoint) -> None:
    """Label for label, probabilities within 1e-5, one at a time and in batches; each names its version."""
    model = predictor()
    images = [image(seed) for seed in range(24)]
    offline = model.predict([model.task.Request(image=each) for each in images])
    expected = [answer.model_dump() for answer in offline]
    served = []
    with httpx.Client(base_url=endpoint.url, trust_env=False, timeout=30) as client:
        for each in images[:8]:
            answer = client.post("/predict", json={"image": each})
            assert answer.headers["x-lepton-model"] == "digits:1"
            served.append(answer.json())
        for start in (8, 16):
            items = [{"image": each} for each in images[start : start + 8]]
            served += client.post("/predict/batch", json={"items": items}).json()["answers"]
        metadata = client.get("/metadata").json()
    assert [answer["label"] for answer in served] == [answer["label"] for answer in expected]
    for found, wanted in zip(served, expected, strict=True):
        assert found["probabilities"] == pytest.approx(wanted["probabilities"], abs=1e-5)
    assert (metadata["model"], metadata["version"], metadata["digest"]) == ("digits", 1, endpoint.digest)


@pytest.mark.parametrize(("method", "path", "body", "headers", "code"), REFUSED)
def test_bad_requests_over_http_are_refused(
    endpoint: Endpoint,
    method: str,
    path: str,
    body: bytes | tuple[bytes, ...] | None,
    headers: dict[str, str],
    code: int,
) -> None:
    """Each with its own status and a problem document, never with 500; and the replica goes on."""
    url = urlsplit(endpoint.url)
    connection = http.client.HTTPConnection(str(url.hostname), url.port, timeout=30)
    try:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # refused before all of it was sent
            connection.request(method, path, body, headers, encode_chunked=not isinstance(body, bytes | None))
        answer = connection.getresponse()
        text = answer.read()
    finally:
        connection.close()
    assert answer.status == code, text
    if code != 200:
        assert answer.headers["content-type"] == "application/problem+json"
        assert json.loads(text)["status"] == code


@pytest.mark.parametrize(("message", "code"), MALFORMED.values(), ids=MALFORMED)
def test_malformed_messages_are_refused(endpoint: Endpoint, message: bytes, code: int) -> None:
    """B67 and B68: nothing that a proxy and a server could take for two different requests."""
    url = urlsplit(endpoint.url)
    with socket.create_connection((str(url.hostname), url.port or 0), timeout=20) as connection:
        connection.sendall(message)
        assert connection.makefile("rb").readline().split()[1] == str(code).encode()


@pytest.mark.parametrize(("given", "kept"), [("abc-1", True), ("x" * 10_000, False), ("a b", False), ("\xff", False)])
def test_request_ids_are_echoed_once_and_only_when_harmless(endpoint: Endpoint, given: str, kept: bool) -> None:
    """Serve's proxy echoes anything, and fails on what is not UTF-8; the edge in front of it does not let it."""
    sent = {"x-request-id": given.encode("latin-1")}
    answer = httpx.get(f"{endpoint.url}/nowhere", headers=sent, trust_env=False, timeout=30)
    (found,) = answer.headers.get_list("x-request-id")
    assert answer.json()["request_id"] == found
    assert (found == given) is kept
    assert re.fullmatch(r"[A-Za-z0-9_-]{1,64}", found)


def test_one_serve_has_one_port_and_one_endpoint_a_path(endpoint: Endpoint, store: Store) -> None:
    with pytest.raises(UsageError, match="leave host and port out"):
        deploy("second", "digits", store, SETTINGS, port=1, route_prefix="/second")
    with pytest.raises(ConflictError, match="route prefix /: application 'digits'"):
        deploy("second", "digits", store, SETTINGS)
    assert [each.name for each in endpoints()] == ["digits"]


def test_a_damaged_version_is_never_served(endpoint: Endpoint, store: Store) -> None:
    """One flipped bit: the error names the file, and the endpoint goes on with the version it has."""
    damaged = publish(store, seed=5)
    key = f"models/digits/versions/{damaged.number}/model.safetensors"
    data = bytearray(store.get(key))
    data[-3] ^= 4
    store.put(key, bytes(data))
    with pytest.raises(IntegrityError, match=r"model\.safetensors of model version"):
        deploy("digits", damaged.ref, store, SETTINGS)
    assert (status("digits").version, status("digits").state) == (1, "RUNNING")


@pytest.fixture(scope="module")
def unfit(store: Store) -> str:
    """A model version whose files are sound but do not fit together."""
    fitting = Registry(store).load(Registry(store).resolve("digits:1"))
    card = {"task": {"name": "image_classification", "options": {**OPTIONS, "width": 5}}, "metrics": {}}
    return Registry(store).publish("unfit", weights=fitting.weights, card=card, transforms=TRANSFORMS).ref


def test_a_model_that_cannot_load_leaves_nothing(endpoint: Endpoint, store: Store, unfit: str) -> None:
    """The replica's own words come back within bounded time."""
    began = time.monotonic()
    with pytest.raises(IntegrityError, match="endpoint unfit not deployed: weights: tensor"):
        deploy("unfit", unfit, store, SETTINGS, route_prefix="/unfit")
    assert time.monotonic() - began < 60
    assert [each.name for each in endpoints()] == ["digits"]
    with pytest.raises(NotFoundError, match="deployed: digits"):
        status("unfit")


def test_a_failed_update_leaves_the_old_version(endpoint: Endpoint, store: Store, unfit: str) -> None:
    """It serves all the while, from the same process, and is what Serve keeps up afterwards."""
    before = pids()
    with load(endpoint.url, clients=1) as codes:
        with pytest.raises(IntegrityError, match="endpoint digits not deployed: weights: tensor"):
            deploy("digits", unfit, store, SETTINGS)
        wait_for(lambda: status("digits").state == "RUNNING", "the old version as target")
    assert set(codes) == {200}
    assert pids() == before
    assert (status("digits").model, status("digits").version) == ("digits", 1)


def test_a_new_version_takes_over_without_a_gap(endpoint: Endpoint, store: Store) -> None:
    """Every request during the change is answered, by the old version or the new one."""
    newer = publish(store, seed=7)
    with load(endpoint.url, clients=1) as codes:
        updated = deploy("digits", newer.ref, store, SETTINGS)
    assert updated.url == endpoint.url
    assert set(codes) == {200}
    assert len(codes) > 10
    metadata = httpx.get(f"{endpoint.url}/metadata", trust_env=False, timeout=30).json()
    assert metadata["version"] == newer.number == status("digits").version


def test_replicas_follow_the_load(endpoint: Endpoint) -> None:
    """One replica becomes two within seconds of more requests than it should have at a time; none fails."""
    assert len(pids()) == 1
    with load(endpoint.url, clients=10) as codes:
        wait_for(lambda: status("digits").replicas.get("RUNNING") == 2, "two running replicas")
    assert set(codes) == {200}


def test_a_killed_replica_comes_back(endpoint: Endpoint) -> None:
    """After SIGKILL of all replicas the endpoint answers again by itself, from new processes."""
    killed = pids()
    for pid in killed:
        os.kill(pid, signal.SIGKILL)

    def answers() -> bool:
        try:
            answer = httpx.post(f"{endpoint.url}/predict", json={"image": image(0)}, trust_env=False, timeout=10)
        except httpx.TransportError:
            return False
        return answer.status_code == 200

    wait_for(answers, "an answer after the kill")
    wait_for(lambda: status("digits").state == "RUNNING", "all replicas back")
    assert not set(pids()) & set(killed)


def test_replicas_write_their_figures_to_the_store(endpoint: Endpoint, store: Store) -> None:
    def requests(code: str) -> float:
        total = 0.0
        for entry in store.list("endpoints/digits/metrics"):
            snapshot = json.loads(store.get(entry.key))
            assert snapshot["labels"].items() >= {"endpoint": "digits", "model": "digits"}.items()
            for family in snapshot["families"]:
                if family["name"] == "lepton_serving_requests_total":
                    samples = family["samples"]
                    total += sum(sample["value"] for sample in samples if sample["labels"]["code"] == code)
        return total

    wait_for(lambda: requests("200") > 20 and requests("422") >= 2, "counted requests in the snapshots", 15)
    assert requests("500") == 0


def test_status_and_delete_commands_know_the_cluster(endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last test with the endpoint: afterwards it is gone, and asking for it is exit code 5."""
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    listed = CliRunner().invoke(serve, ["status", "--json"])
    assert [each["name"] for each in json.loads(listed.stdout)["endpoints"]] == ["digits"]
    shown = json.loads(CliRunner().invoke(serve, ["status", "digits", "--json"]).stdout)
    assert shown == status("digits").to_dict()
    assert shown["state"] == "RUNNING"
    assert shown["url"] == endpoint.url
    assert "digits" in CliRunner().invoke(serve, ["status"]).stdout
    assert CliRunner().invoke(serve, ["delete", "digits", "--json"]).stdout.strip() == '{\n  "deleted": "digits"\n}'
    assert "no endpoint" in CliRunner().invoke(serve, ["status"]).stdout
    missing = CliRunner().invoke(serve, ["status", "digits"]).exception
    assert isinstance(missing, NotFoundError)
    assert missing.exit_code == 5


def test_a_deleted_endpoint_is_gone(endpoint: Endpoint) -> None:
    assert endpoints() == []
    assert httpx.get(f"{endpoint.url}/ready", trust_env=False, timeout=30).status_code in (404, 503)
    with pytest.raises(NotFoundError, match="endpoint 'digits': not deployed"):
        delete("digits")
