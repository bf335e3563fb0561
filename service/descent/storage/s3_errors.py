"""An error of boto3 as one line: the bucket, the key, the request and what to do. Never a secret.

The server's own message is left out: it may repeat parts of a signed request.
"""

from typing import Any

import botocore.exceptions as aws
from boto3.exceptions import RetriesExceededError as Boto3RetriesExceeded
from s3transfer.exceptions import RetriesExceededError

from descent.config.secrets import redact
from descent.errors import StoreError
from descent.storage.local import explain as explain_local

try:
    from awscrt.exceptions import AwsCrtError
except ImportError:  # the native client is not installed

    class AwsCrtError(Exception):  # type: ignore[no-redef]
        """Never raised: it stands in for the native client's error."""

        name = ""


FAILURES = (
    aws.BotoCoreError,
    aws.ClientError,
    RetriesExceededError,
    Boto3RetriesExceeded,
    AwsCrtError,
    OSError,
    ValueError,
)
"""What a call into boto3 or its transfer manager may end with."""

_HOW = "check AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
_RENEW = "the credentials have expired; log in again (aws sso login) or renew AWS_SESSION_TOKEN"
_UNKNOWN_HEADER = (
    "the server doesn't know a header of the request; if it is an older or smaller one than AWS's, "
    "set AWS_REQUEST_CHECKSUM_CALCULATION=when_required"
)
_BY_CODE = {
    "NoSuchBucket": ("address", "there is no such bucket; create it, or mend the address"),
    "NoSuchKey": ("missing", "there is no such object"),
    "NotFound": ("missing", "there is no such object"),
    "404": ("missing", "there is no such object"),
    "AccessDenied": ("denied", "the credentials don't allow it; ask for that right on this bucket"),
    "AllAccessDisabled": ("denied", "the bucket is closed"),
    "Forbidden": ("denied", "the credentials don't allow it, or aren't accepted; " + _HOW),
    "403": ("denied", "the credentials don't allow it, or aren't accepted; " + _HOW),
    "ExpiredToken": ("credentials", _RENEW),
    "ExpiredTokenException": ("credentials", _RENEW),
    "TokenRefreshRequired": ("credentials", _RENEW),
    "RequestExpired": ("credentials", _RENEW),
    "InvalidAccessKeyId": ("credentials", "the server doesn't know this access key; " + _HOW),
    "InvalidToken": ("credentials", "the session token isn't accepted; renew AWS_SESSION_TOKEN"),
    "SignatureDoesNotMatch": ("credentials", "the secret key doesn't fit the access key; " + _HOW),
    "AuthorizationHeaderMalformed": ("address", "the bucket is in another region; set AWS_REGION"),
    "PermanentRedirect": ("address", "the bucket is in another region; set AWS_REGION"),
    "301": ("address", "the bucket is in another region; set AWS_REGION"),
    "RequestTimeTooSkewed": ("credentials", "this machine's clock is wrong"),
    "QuotaExceeded": ("full", "the bucket's quota is used up"),
    "XMinioStorageFull": ("full", "the server's disks are full"),
    "InsufficientStorage": ("full", "the server's disks are full"),
    "EntityTooLarge": ("full", "the object is larger than the server takes"),
    "NotImplemented": ("unavailable", _UNKNOWN_HEADER),
    "XAmzContentSHA256Mismatch": ("unavailable", _UNKNOWN_HEADER),
    "InvalidRange": ("damaged", "the object is shorter than expected"),
    "PreconditionFailed": ("unavailable", "the object was replaced meanwhile"),
    "400": ("credentials", "the request isn't accepted, as with expired credentials; " + _HOW),
}


def explain(error: BaseException, what: str, address: str, endpoint: str) -> StoreError:
    """`what` failed at `address` (bucket and key) on the server at `endpoint`."""
    if isinstance(error, StoreError):
        return error
    last = getattr(error, "last_exception", None)
    if isinstance(error, RetriesExceededError | Boto3RetriesExceeded) and last is not None:
        return explain(last, what, address, endpoint)
    kind, reason = _reason(error, redact(endpoint))
    return StoreError(f"{address}: can't {what}: {reason}", kind=kind)


def code_of(error: BaseException) -> str:
    """S3's error code, or the HTTP status where the answer had no body; "" for anything else."""
    if not isinstance(error, aws.ClientError):
        return ""
    return str(error.response.get("Error", {}).get("Code", ""))


def _reason(error: BaseException, endpoint: str) -> tuple[str, str]:
    if isinstance(error, aws.ClientError):
        return _answered(error, endpoint)
    if isinstance(error, AwsCrtError):
        return _native(error.name, endpoint)
    if isinstance(error, aws.NoCredentialsError | aws.PartialCredentialsError):
        return "credentials", f"there are no (whole) credentials; {_HOW}, or use a role"
    if isinstance(error, aws.CredentialRetrievalError | aws.TokenRetrievalError | aws.SSOError | aws.NoAuthTokenError):
        return (
            "credentials",
            f"the credentials can't be fetched ({type(error).__name__}); " + _RENEW,
        )
    if isinstance(error, aws.ProfileNotFound):
        return "credentials", "AWS_PROFILE names a profile that isn't in ~/.aws/config"
    if isinstance(error, aws.ChecksumError | aws.FlexibleChecksumError):
        return "damaged", "the bytes that came don't have the checksum that the server sent along"
    if isinstance(error, aws.HTTPClientError | aws.ConnectionError | aws.IncompleteReadError):
        return (
            "unavailable",
            f"{endpoint} doesn't answer, or not to the end ({type(error).__name__}); check AWS_ENDPOINT_URL_S3 and the network",
        )
    if isinstance(error, aws.ParamValidationError | aws.InvalidEndpointDiscoveryConfigurationError):
        return "address", "S3 doesn't take this bucket or key"
    if isinstance(error, OSError) and error.filename is not None:
        return explain_local(error, error.filename).kind, f"{error.filename}: {error.strerror}"
    if isinstance(error, OSError):
        return "unavailable", f"{endpoint} doesn't answer to the end ({type(error).__name__})"
    return (
        "address",
        f"the S3 settings are wrong ({type(error).__name__}); check AWS_ENDPOINT_URL_S3 and ~/.aws/config",
    )


def _native(name: str, endpoint: str) -> tuple[str, str]:
    """Of the native client's errors, which keep no status: AWS_ERROR_S3_SLOW_DOWN, AWS_IO_SOCKET_CLOSED …"""
    if "CREDENTIALS" in name:
        return "credentials", f"the credentials can't be fetched ({name}); " + _RENEW
    if "CHECKSUM" in name:
        return "damaged", "the bytes that came don't have the checksum that the server sent along"
    for mark, status in (("SLOW_DOWN", "503 SlowDown"), ("INTERNAL_ERROR", "500 InternalError")):
        if mark in name:
            return "unavailable", f"{endpoint} still answers {status}; try again later"
    return "unavailable", (
        f"{endpoint} doesn't answer, or not to the end ({name}); check AWS_ENDPOINT_URL_S3 and the network"
    )


def _answered(error: aws.ClientError, endpoint: str) -> tuple[str, str]:
    code, answer = code_of(error), error.response
    if code in _BY_CODE:
        return _BY_CODE[code]
    metadata: Any = answer.get("ResponseMetadata", {})
    status, retries = metadata.get("HTTPStatusCode", 0), metadata.get("RetryAttempts", 0)
    if status >= 500 or code in ("SlowDown", "RequestTimeout", "Throttling", "503", "500"):
        return (
            "unavailable",
            f"{endpoint} still answers {status} {code} after {retries + 1} tries; try again later",
        )
    return "unavailable", f"{endpoint} answers {status} {code}"
