"""What an error of the S3 libraries or an error code of the server means for the caller."""

from __future__ import annotations

import http.client
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import botocore.exceptions
from botocore.parsers import ResponseParserError

from lepton_ray.errors import LeptonError, UsageError, shown
from lepton_ray.storage.store import redacted

_TRY_AGAIN_CODES = frozenset(
    {"SlowDown", "RequestTimeout", "InternalError", "ServiceUnavailable", "BadDigest", "XAmzContentSHA256Mismatch"}
    | {"OperationAborted", "ConditionalRequestConflict", "Throttling", "ThrottlingException", "IncompleteBody"}
)
_TRY_AGAIN = (
    aiohttp.ClientError,
    botocore.exceptions.FlexibleChecksumError,
    botocore.exceptions.ConnectionError,
    botocore.exceptions.HTTPClientError,
    botocore.exceptions.IncompleteReadError,
    ResponseParserError,  # a proxy's HTML page in place of XML
    http.client.IncompleteRead,
    OSError,  # includes TimeoutError and connection errors
)
_ADVICE = {
    "RequestTimeTooSkewed": "the clock of this machine is wrong; set it",
    "PermanentRedirect": "the bucket lies in another region; set AWS_REGION",
    "AuthorizationHeaderMalformed": "the bucket lies in another region; set AWS_REGION",
    "ExpiredToken": "the credentials have expired; renew them",
    "InvalidToken": "the session token is not valid; check the AWS_* credentials",
    "NotImplemented": "the server lacks a call that a store needs; use another one",
}


def endpoint_url() -> str | None:
    """The S3 endpoint that the environment names, if any."""
    return os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or None


def endpoint() -> str:
    """Host and port of the endpoint for messages; never user or password."""
    parts = urlsplit(endpoint_url() or "https://s3.amazonaws.com")
    return shown(parts.netloc.rpartition("@")[2])


def region() -> str | None:
    """The region that the environment names, if any."""
    return os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or None


@dataclass(frozen=True)
class Fault:
    """What an error means."""

    reason: str
    code: str = ""
    again: bool = False
    """Trying again may help, and the call may have been carried out."""
    condition: bool = False
    """412, or 404 of an object or upload."""
    kind: type[LeptonError] = UsageError
    """What the user gets where neither of the two holds."""


def judge(error: BaseException) -> Fault:
    """Decide on an error. s3fs puts a built-in error around botocore's, which then is the cause."""
    for candidate in (error, error.__cause__):
        if isinstance(candidate, botocore.exceptions.ClientError):
            return _judge_answer(candidate.response)
    if isinstance(error, botocore.exceptions.NoCredentialsError | botocore.exceptions.PartialCredentialsError):
        return Fault("no credentials; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY or another AWS source of them")
    if isinstance(error, _TRY_AGAIN):
        return Fault(_words(error), again=True)
    if isinstance(error, botocore.exceptions.BotoCoreError | ValueError):
        return Fault(f"the AWS settings are not accepted, {redacted(str(error))}; check the AWS_* variables")
    return Fault(f"unexpected {type(error).__name__}: {shown(str(error), 200)}", kind=LeptonError)


def _judge_answer(response: Mapping[str, Any]) -> Fault:
    """Decide on an answer with an error code."""
    code = str(response.get("Error", {}).get("Code", ""))
    status = int(response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
    told = f"{shown(code)} (HTTP {status})"
    if code == "NoSuchBucket":
        fault = Fault("the bucket does not exist; make it, or correct the URI", code)
    elif status in (404, 412) or code in ("PreconditionFailed", "NoSuchKey", "NoSuchUpload"):
        fault = Fault(told, code, condition=True)
    elif code in _TRY_AGAIN_CODES or status in (408, 409, 429) or (status >= 500 and status != 501):
        fault = Fault(told, code, again=True)
    elif code in _ADVICE:
        fault = Fault(f"{told} from {endpoint()}: {_ADVICE[code]}", code)
    elif status in (401, 403):
        fault = Fault(f"access denied by {endpoint()}, {told}; check the AWS_* credentials and their rights", code)
    else:
        message = shown(str(response.get("Error", {}).get("Message", "")), 200)
        fault = Fault(f"refused by {endpoint()}, {told}: {message}", code, kind=LeptonError)
    return fault


def _words(error: BaseException) -> str:
    """An error of the connection in a few words."""
    if isinstance(error, TimeoutError | botocore.exceptions.ConnectTimeoutError | botocore.exceptions.ReadTimeoutError):
        return "timed out"
    if isinstance(error, botocore.exceptions.ConnectionError | ConnectionError):
        return "no connection"
    return type(error).__name__
