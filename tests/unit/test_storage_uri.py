"""Which URIs open a store, and what the others are told."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from lepton_ray.errors import UsageError
from lepton_ray.storage import open_store, sha256_hex
from lepton_ray.storage.s3 import S3Store


@pytest.mark.parametrize(
    ("uri", "canonical"),
    [
        ("file:///data/store", "file:///data/store"),
        ("file:///data//store/", "file:///data/store"),
        ("file://localhost/data", "file:///data"),
        ("file:///with%20space", "file:///with%20space"),
        ("file:///with space", "file:///with%20space"),
        ("/data/store", "file:///data/store"),
        ("s3://bucket", "s3://bucket"),
        ("s3://bucket/", "s3://bucket"),
        ("s3://bucket/a/b/", "s3://bucket/a/b"),
    ],
)
def test_uri_becomes_canonical(uri: str, canonical: str):
    """The canonical form opens the same store again."""
    assert open_store(uri).uri == canonical
    assert open_store(canonical).uri == canonical


@pytest.mark.parametrize(
    "uri",
    [
        *("ftp://host/x", "http://host/x", "", "a\nb", "\x1b[31mred", "/" + "x" * 5000),
        *("s3://", "s3:///x", "s3://b/../c", "s3://buck/../c", "s3://UPPER/x", "s3://a_b/x", "s3://bucket/\u202ex"),
        *("s3://bucket/a//b", "s3://bucket/x?versionId=1", "s3://bucket/x#y"),
        *("file://relative/x", "file:///", "file://", "file:///a/../b", "file:///a%2f..%2fb", "file:///a%00b"),
    ],
)
def test_wrong_uri_is_told_what_is_accepted(uri: str):
    with pytest.raises(UsageError) as caught:
        open_store(uri)
    message = str(caught.value)
    assert message.isprintable()
    assert "expected" in message
    assert len(message) < 600


@pytest.mark.parametrize("uri", ["s3://KEY:hunter2@bucket/x", "ftp://KEY:hunter2@host/x", "s3://KEY:hunter2@\n"])
def test_credentials_in_uri_are_not_shown(uri: str):
    with pytest.raises(UsageError) as caught:
        open_store(uri)
    assert "hunter2" not in str(caught.value)


def test_environment_names_the_default_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """`$LEPTON_STORE`, and where that is unset or empty `./lepton-store`."""
    monkeypatch.setenv("LEPTON_STORE", "s3://bucket/prefix")
    assert open_store().uri == "s3://bucket/prefix"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LEPTON_STORE", "")
    assert open_store().uri == (tmp_path / "lepton-store").as_uri()
    monkeypatch.delenv("LEPTON_STORE")
    assert open_store().uri == (tmp_path / "lepton-store").as_uri()
    assert not (tmp_path / "lepton-store").exists()


def test_file_store_does_not_import_s3fs(tmp_path: Path):
    """Opening a local store stays light: no s3fs, no asyncio machinery of it, no torch, no ray."""
    script = (
        "import sys; from lepton_ray.storage import open_store; s = open_store(sys.argv[1]); s.put('a', b'x')\n"
        "print([m for m in ('s3fs', 'botocore', 'aiohttp', 'torch', 'ray', 'pyarrow') if m in sys.modules])"
    )
    ran = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "s")], capture_output=True, text=True, timeout=60, check=True
    )
    assert ran.stdout.strip() == "[]"


def test_delta_options_name_the_endpoint(monkeypatch: pytest.MonkeyPatch):
    """Plain HTTP must be allowed expressly; credentials are never among the options."""
    for name in ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_REGION", "AWS_DEFAULT_REGION"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hunter2")
    store = S3Store("bucket", "p")
    assert store.delta_options() == {"AWS_REGION": "us-east-1", "AWS_CONDITIONAL_PUT": "etag"}
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    monkeypatch.setenv("AWS_REGION", "eu-west-1")
    assert store.delta_options() == {
        "AWS_REGION": "eu-west-1",
        "AWS_CONDITIONAL_PUT": "etag",
        "AWS_ENDPOINT_URL": "http://127.0.0.1:1",
        "AWS_ALLOW_HTTP": "true",
    }
    assert store.delta_uri("datasets/digits") == "s3://bucket/p/datasets/digits"


def test_sha256_is_the_standard_one():
    """The test vector "abc" of FIPS 180-2, appendix B.1."""
    assert sha256_hex(b"abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
