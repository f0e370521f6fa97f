"""A store under a prefix of an S3 bucket."""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Iterator
from typing import Any

from lepton_ray.errors import ConflictError, LeptonError, NotFoundError, UnavailableError, UsageError, shown
from lepton_ray.storage.s3_client import Patience, PreconditionError, S3Client
from lepton_ray.storage.s3_faults import endpoint, endpoint_url, region
from lepton_ray.storage.store import (
    HIDDEN,
    Entries,
    Entry,
    Names,
    Store,
    Stored,
    check_key,
    check_prefix,
    is_hidden,
)

PART_BYTES = 64 * 1024 * 1024
"""Larger objects go up in parts of at least this size."""
MAX_PARTS = 10_000
PARTS_AT_ONCE = 4
WRITE_TOKEN = "lepton-write"  # noqa: S105 - the name of a metadata entry
"""Names the metadata entry by which a write recognises its own object when an answer was lost."""
KEYS_AT_ONCE = 1000
"""S3's limit of one listing and of one deletion."""
CHECK_S = 15.0
"""How long `check_writable` waits for a remote: somebody is watching."""
DEFAULT_PATIENCE = Patience()


class S3Store(Store):
    """Objects of a bucket; etags are the server's.

    Small objects go up in one PUT, larger ones in parts that are dropped on any failure: a half object is never seen.
    Each request carries a CRC32 that the server checks.
    """

    def __init__(self, bucket: str, prefix: str, patience: Patience = DEFAULT_PATIENCE) -> None:
        self._bucket = bucket
        self._prefix = f"{prefix}/" if prefix else ""
        self.uri = f"s3://{bucket}/{prefix}".rstrip("/")
        self._client = S3Client(self.uri, patience)

    def fetch(self, key: str) -> Stored:
        """See Store."""
        try:
            answer = self._client.call("get_object", {**self._at(key), "ChecksumMode": "ENABLED"})
        except PreconditionError as error:
            raise NotFoundError(f"key {shown(key)}: no such object in store {self.uri}") from error
        return Stored(answer["Body"], answer["ETag"])

    def put(self, key: str, data: bytes) -> str:
        """See Store."""
        return self._write(key, data, {})

    def put_if_absent(self, key: str, data: bytes) -> str:
        """See Store."""
        if len(data) > PART_BYTES and self.exists(key):  # told before the upload rather than after it
            raise ConflictError(f"key {shown(key)}: exists already in store {self.uri}")
        return self._write(key, data, {"IfNoneMatch": "*"})

    def replace(self, key: str, data: bytes, etag: str) -> str:
        """See Store."""
        return self._write(key, data, {"IfMatch": etag})

    def exists(self, key: str) -> bool:
        """See Store."""
        try:
            self._client.call("head_object", self._at(key))
        except PreconditionError:
            return False
        return True

    def list(self, prefix: str) -> Entries:
        """See Store."""
        skip = len(self._prefix)
        entries = [
            Entry(found["Key"][skip:], int(found["Size"]))
            for page in self._pages(check_prefix(prefix), "")
            for found in page.get("Contents", [])
            if not found["Key"].endswith("/") and not is_hidden(found["Key"][skip:])
        ]
        return sorted(entries, key=lambda entry: entry.key)

    def list_names(self, prefix: str) -> Names:
        """See Store."""
        folder = check_prefix(prefix)
        skip = len(self._under(folder))
        names: set[str] = set()
        for page in self._pages(folder, "/"):
            names.update(found["Key"][skip:] for found in page.get("Contents", []))
            names.update(found["Prefix"][skip:].removesuffix("/") for found in page.get("CommonPrefixes", []))
        return sorted(name for name in names if name and not name.endswith("/") and not is_hidden(name))

    def delete(self, key: str) -> None:
        """See Store."""
        with contextlib.suppress(PreconditionError):
            self._client.call("delete_object", self._at(key))

    def delete_prefix(self, prefix: str) -> int:
        """See Store."""
        folder = check_key(check_prefix(prefix))
        keys = [entry.key for entry in self.list(folder)]
        # some servers keep a folder that lost its objects until its name with a slash is deleted, the deepest first
        folders = {"/".join(key.split("/")[:depth]) + "/" for key in keys for depth in range(1, key.count("/") + 1)}
        folders = {name for name in folders if name.startswith(f"{folder}/")}
        doomed = [*keys, *sorted(folders, key=len, reverse=True)]
        for start in range(0, len(doomed), KEYS_AT_ONCE):
            objects = [{"Key": self._prefix + key} for key in doomed[start : start + KEYS_AT_ONCE]]
            request = {"Bucket": self._bucket, "Delete": {"Objects": objects, "Quiet": True}}
            for fault in self._client.call("delete_objects", request).get("Errors", []):
                code = shown(fault.get("Code", ""))
                raise LeptonError(f"store {self.uri}: {shown(fault.get('Key', ''))} could not be deleted, {code}")
        return len(keys)

    def check_writable(self) -> None:
        """See Store. Finds out, too, whether the server honours the conditions of conditional writes."""
        probe = {"Bucket": self._bucket, "Key": f"{self._prefix}{HIDDEN}/probe", "Body": b"probe"}
        self._client.call("put_object", probe, CHECK_S)
        try:
            self._client.call("put_object", {**probe, "IfNoneMatch": "*"}, CHECK_S)
        except PreconditionError:
            return
        raise UsageError(
            f"store {self.uri}: the server at {endpoint()} ignores If-None-Match, so two writers could both win; "
            "use an S3 server with conditional writes"
        )

    def delta_uri(self, key: str) -> str:
        """See Store."""
        return f"{self.uri}/{check_key(key)}"

    def delta_options(self) -> dict[str, str]:
        """See Store."""
        options = {"AWS_REGION": region() or "us-east-1", "AWS_CONDITIONAL_PUT": "etag"}
        url = endpoint_url()
        if url:
            options["AWS_ENDPOINT_URL"] = url
            if url.startswith("http://"):
                options["AWS_ALLOW_HTTP"] = "true"
        return options

    def _under(self, folder: str) -> str:
        """The S3 prefix of a folder."""
        return self._prefix + (f"{folder}/" if folder else "")

    def _at(self, key: str) -> dict[str, str]:
        """Bucket and full key for a call."""
        return {"Bucket": self._bucket, "Key": self._prefix + check_key(key)}

    def _pages(self, folder: str, delimiter: str) -> Iterator[dict[str, Any]]:
        """All pages of a listing."""
        more: dict[str, str] = {}
        while True:
            request = {"Bucket": self._bucket, "Prefix": self._under(folder), "Delimiter": delimiter}
            try:
                page = self._client.call("list_objects_v2", {**request, "MaxKeys": KEYS_AT_ONCE, **more})
            except PreconditionError as error:
                raise LeptonError(f"store {self.uri}: cannot be listed, {error.code}") from error
            yield page
            if not page.get("IsTruncated"):
                return
            more = {"ContinuationToken": page["NextContinuationToken"]}

    def _write(self, key: str, data: bytes, condition: dict[str, str]) -> str:
        """Write under a condition; returns the etag."""
        at = self._at(key)
        token = secrets.token_hex(16)
        new = {**at, "Metadata": {WRITE_TOKEN: token}, "ChecksumAlgorithm": "CRC32"}
        try:
            if len(data) > PART_BYTES:
                return self._write_parts(new, data, condition)
            return str(self._client.call("put_object", {**new, "Body": data, **condition})["ETag"])
        except PreconditionError as error:
            etag = self._etag_of_write(at, token)
            if etag is not None:
                return etag
            if not condition:
                raise UnavailableError(f"key {shown(key)}: not written to store {self.uri}, {error.code}") from error
            what = "exists already" if "IfNoneMatch" in condition else "was changed or removed by somebody else"
            raise ConflictError(f"key {shown(key)}: {what} in store {self.uri}; read it again") from error

    def _etag_of_write(self, at: dict[str, str], token: str) -> str | None:
        """The etag of the object, if it is the write with this token that made it."""
        try:
            answer = self._client.call("head_object", at)
        except PreconditionError:
            return None
        found = {name.lower(): value for name, value in answer.get("Metadata", {}).items()}
        return str(answer["ETag"]) if found.get(WRITE_TOKEN) == token else None

    def _write_parts(self, new: dict[str, Any], data: bytes, condition: dict[str, str]) -> str:
        """Write a large object in parts; on any exception, Ctrl-C included, nothing of it stays on the server."""
        size = max(PART_BYTES, -(-len(data) // MAX_PARTS))
        view = memoryview(data)
        begun = self._client.call("create_multipart_upload", new)
        upload = {"Bucket": new["Bucket"], "Key": new["Key"], "UploadId": begun["UploadId"]}

        def part(index: int) -> dict[str, Any]:
            # copied only now, so that a few parts and not the whole object stand in memory twice
            body = bytes(view[index * size : (index + 1) * size])
            return {**upload, "PartNumber": index + 1, "Body": body, "ChecksumAlgorithm": "CRC32"}

        try:
            answers = self._client.call_each("upload_part", part, -(-len(data) // size), PARTS_AT_ONCE)
            parts = [
                {"PartNumber": number} | {name: answer[name] for name in ("ETag", "ChecksumCRC32") if name in answer}
                for number, answer in enumerate(answers, start=1)
            ]
            finish = {**upload, "MultipartUpload": {"Parts": parts}, **condition}
            return str(self._client.call("complete_multipart_upload", finish)["ETag"])
        except BaseException:
            with contextlib.suppress(LeptonError, PreconditionError):
                self._client.call("abort_multipart_upload", upload)
            raise
