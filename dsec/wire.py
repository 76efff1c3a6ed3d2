"""Errors on the wire: one table from our error codes to gRPC statuses, used by every server.

The status says what kind of thing happened, the details carry the stable code and the sentence for
people.  An error that is not in the table is a bug and becomes INTERNAL without its text.  A client makes
the same error of it again.
"""

from __future__ import annotations

from typing import ClassVar, Protocol

import grpc
from google.protobuf.message_factory import GetMessageClass

from dsec.errors import DsecError, HostUnfitError, InvalidArgumentError, ResourceExhaustedError, UnreachableError
from dsec.pb.v1.edge_pb2 import DESCRIPTOR

SERVICE = DESCRIPTOR.services_by_name["Edge"]
REQUEST_BYTES_MAX = 40 << 20
"""A command with the largest stdin and the longest arguments."""
REPLY_BYTES_MAX = 136 << 20
"""A result with two streams of the largest `output_bytes_max`."""
READ_BYTES_MAX = 4 << 20
"""Of output, in one answer."""
JOINED_COUNT_MAX = 64
"""Of requests in one message of a shared stream."""
SHORT_BYTES_MAX = 64 << 10
"""Of a request of our client that shares a stream."""
DETAILS_BYTES_MAX = 2000
"""Each may become three in the header, of which gRPC takes 8 KiB."""
Status = grpc.StatusCode
STATUSES = {status.value[0]: status for status in Status}
_UNARY = [method for method in SERVICE.methods if not (method.client_streaming or method.server_streaming)]
REQUESTS = {method.name: GetMessageClass(method.input_type) for method in _UNARY}
"""By the name of the method: those of the Edge that a shared stream carries."""
REPLIES = {method.name: GetMessageClass(method.output_type) for method in _UNARY}


class CodedError(Protocol):
    """What every error root of this project offers."""

    code: ClassVar[str]


STATUS: dict[str, grpc.StatusCode] = {
    "INVALID_ARGUMENT": grpc.StatusCode.INVALID_ARGUMENT,
    "BAD_TASK": grpc.StatusCode.INVALID_ARGUMENT,
    "BAD_REQUEST": grpc.StatusCode.INVALID_ARGUMENT,
    "NOT_FOUND": grpc.StatusCode.NOT_FOUND,
    "ALREADY_EXISTS": grpc.StatusCode.ALREADY_EXISTS,
    "OUT_OF_RANGE": grpc.StatusCode.OUT_OF_RANGE,
    "FAILED_PRECONDITION": grpc.StatusCode.FAILED_PRECONDITION,
    "HOST_UNFIT": grpc.StatusCode.FAILED_PRECONDITION,
    "RESOURCE_EXHAUSTED": grpc.StatusCode.RESOURCE_EXHAUSTED,
    "SANDBOX_LOST": grpc.StatusCode.ABORTED,
    "OUTCOME_UNKNOWN": grpc.StatusCode.UNKNOWN,
    "SPAWN_FAILED": grpc.StatusCode.UNAVAILABLE,
    "UNREACHABLE": grpc.StatusCode.UNAVAILABLE,
    "COMMAND_FAILED": grpc.StatusCode.FAILED_PRECONDITION,
    "DIVERGED": grpc.StatusCode.DATA_LOSS,
    "BAD_MESSAGES": grpc.StatusCode.INVALID_ARGUMENT,
    "BAD_TOKENIZER": grpc.StatusCode.FAILED_PRECONDITION,
    "NOT_APPENDABLE": grpc.StatusCode.FAILED_PRECONDITION,
    "BAD_FEED": grpc.StatusCode.INTERNAL,
    "BAD_SCHEMA": grpc.StatusCode.INVALID_ARGUMENT,
    "BAD_OPTION": grpc.StatusCode.INTERNAL,
    "RESULTS_UNWRITABLE": grpc.StatusCode.UNAVAILABLE,
    "SHARD_DAMAGED": grpc.StatusCode.DATA_LOSS,
    "ENGINE_ERROR": grpc.StatusCode.UNAVAILABLE,
    "FOREIGN_WEIGHTS": grpc.StatusCode.UNAVAILABLE,
    "PREEMPTED": grpc.StatusCode.UNAVAILABLE,
    "VERIFIER_ERROR": grpc.StatusCode.FAILED_PRECONDITION,
    "JOURNAL": grpc.StatusCode.DATA_LOSS,
    "MACHINE": grpc.StatusCode.INTERNAL,
    "WAL_CORRUPT": grpc.StatusCode.DATA_LOSS,
    "WAL_FENCED": grpc.StatusCode.UNAVAILABLE,
    "WAL_DROPPED": grpc.StatusCode.OUT_OF_RANGE,
    "WAL_STREAM": grpc.StatusCode.DATA_LOSS,
    "WAL_FULL": grpc.StatusCode.RESOURCE_EXHAUSTED,
    "WAL_LOCKED": grpc.StatusCode.UNAVAILABLE,
    "WAL_POISONED": grpc.StatusCode.UNAVAILABLE,
    "WAL_CLOSED": grpc.StatusCode.UNAVAILABLE,
    "WAL_STORAGE": grpc.StatusCode.UNAVAILABLE,
    "WAL_RECORD_TOO_LARGE": grpc.StatusCode.INVALID_ARGUMENT,
    "WAL_RECORD_INVALID": grpc.StatusCode.INTERNAL,
    "WAL_VERSION": grpc.StatusCode.FAILED_PRECONDITION,
}


def status_of(error: CodedError) -> tuple[grpc.StatusCode, str]:
    """The gRPC status and the details of one of our errors; a long one loses its middle, for it becomes a header."""
    details = f"{error.code}: {error}".encode(errors="backslashreplace")
    if len(details) > DETAILS_BYTES_MAX:
        half = DETAILS_BYTES_MAX // 2
        details = details[:half] + b" ... " + details[-half:]
    return STATUS.get(error.code, grpc.StatusCode.INTERNAL), details.decode(errors="ignore")


_ERRORS = {error.code: error for error in DsecError.__subclasses__()}
_ERRORS_WITHOUT_CODE = {
    grpc.StatusCode.INVALID_ARGUMENT: InvalidArgumentError,
    grpc.StatusCode.UNAUTHENTICATED: InvalidArgumentError,
    grpc.StatusCode.RESOURCE_EXHAUSTED: ResourceExhaustedError,
    grpc.StatusCode.UNIMPLEMENTED: HostUnfitError,
    grpc.StatusCode.UNAVAILABLE: UnreachableError,
    grpc.StatusCode.CANCELLED: UnreachableError,
    grpc.StatusCode.DEADLINE_EXCEEDED: UnreachableError,
}


def error_of(status: grpc.StatusCode, details: str) -> DsecError:
    """The error that a server answered with; without a code it is the connection's, or a bug of the server."""
    code, _, sentence = details.partition(": ")
    if code in _ERRORS:
        return _ERRORS[code](sentence)
    if "larger than max" in details:
        return InvalidArgumentError(f"the message is too large to be sent ({details})")
    return _ERRORS_WITHOUT_CODE.get(status, DsecError)(details)
