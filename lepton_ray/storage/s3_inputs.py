"""Objects of S3 that are only read: found with their etag, streamed in ranges that must still have it."""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import Any

from lepton_ray.errors import UsageError, shown
from lepton_ray.storage.inputs import Found, Input, OnRead, changed, check_input_path, is_hidden_input
from lepton_ray.storage.s3_client import Patience, PreconditionError, S3Client
from lepton_ray.storage.store import bucket_and_prefix, redacted

RANGE_BYTES = 32 * 2**20
"""Bytes of one request at most."""


class S3Input(Input):
    """An object of a bucket."""

    __slots__ = ("_at", "_client", "_etag")

    def __init__(self, client: S3Client, at: dict[str, str], path: str, size: int, etag: str) -> None:
        super().__init__(f"s3://{at['Bucket']}/{at['Key']}", path, size)
        self._client, self._at, self._etag = client, at, etag

    def _raw(self, on_read: OnRead) -> io.RawIOBase:
        return _Ranges(self, on_read)

    def check_unchanged(self) -> None:
        """See Input. Every range was read under the etag already, so there is nothing left to look at."""

    def range(self, start: int, count: int) -> bytes:
        """Bytes `start` to `start + count`, of the object that was found and no other."""
        request = {**self._at, "Range": f"bytes={start}-{start + count - 1}", "IfMatch": self._etag}
        try:
            answer = self._client.call("get_object", request)
        except PreconditionError as error:
            gone = error.code in ("NoSuchKey", "404")
            raise changed(self, "is gone since it was found" if gone else "was changed while it was read") from error
        data: bytes = answer["Body"]
        # a server that knows no conditions must not slip another object in; nor one that knows no ranges
        if answer.get("ETag") != self._etag or len(data) != count:
            raise changed(self)
        return data


class _Ranges(io.RawIOBase):
    """An object as a seekable stream."""

    def __init__(self, source: S3Input, on_read: OnRead) -> None:
        self._source, self._on_read, self._place = source, on_read, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._place

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._place, io.SEEK_END: self._source.size}[whence]
        if start + offset < 0:
            raise ValueError(f"seek to {start + offset}: before the start")
        self._place = start + offset
        return self._place

    def readinto(self, buffer: Any, /) -> int:
        count = min(len(buffer), self._source.size - self._place, RANGE_BYTES)
        if count <= 0:
            return 0
        buffer[:count] = self._source.range(self._place, count)
        self._place += count
        self._on_read(count)
        return count


def find_objects(uri: str, most: int, patience: Patience | None = None) -> Found:
    """The object at a URI or, where there is none, those under it as in a folder. Errors as for `find_inputs`."""
    bucket, _, key = uri.removeprefix("s3://").partition("/")
    bucket_and_prefix(uri, bucket, "source")
    key = check_input_path(key.rstrip("/"), redacted(uri))
    client = S3Client(redacted(uri), patience or Patience())
    if key and not uri.endswith("/"):
        at = {"Bucket": bucket, "Key": key}
        try:
            head = client.call("head_object", at)
        except PreconditionError:
            pass  # no object: perhaps a folder
        else:
            return Found(False, [S3Input(client, at, key.rpartition("/")[2], int(head["ContentLength"]), head["ETag"])])
    found = list(_under(client, uri, bucket, f"{key}/" if key else "", most))
    if not found:
        raise UsageError(f"source {shown(uri)}: no such object, and none under it; check bucket and key")
    return Found(True, sorted(found, key=lambda entry: entry.path))


def _under(client: S3Client, uri: str, bucket: str, prefix: str, most: int) -> Iterator[Input]:
    """The objects under a prefix, page by page."""
    count = 0
    more: dict[str, str] = {}
    while True:
        request = {"Bucket": bucket, "Prefix": prefix, "MaxKeys": 1000, **more}
        try:
            page = client.call("list_objects_v2", request)
        except PreconditionError as error:
            raise UsageError(f"source {redacted(uri)}: cannot be listed, {error.code}") from error
        for entry in page.get("Contents", []):
            path = entry["Key"][len(prefix) :]
            if not path or path.endswith("/") or is_hidden_input(path):
                continue
            count += 1
            if count > most:
                raise UsageError(f"source {redacted(uri)}: more than {most} objects; raise max_files or split it")
            at = {"Bucket": bucket, "Key": entry["Key"]}
            yield S3Input(client, at, check_input_path(path, redacted(uri)), int(entry["Size"]), entry["ETag"])
        if not page.get("IsTruncated"):
            return
        more = {"ContinuationToken": page["NextContinuationToken"]}
