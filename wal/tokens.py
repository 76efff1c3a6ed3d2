"""Sampled tokens as records: the schema of kind 1.

Binary columns, because a token costs 8 bytes here and twenty and more as text, and there is one
record for every chunk that an engine returns.  Logprobs are stored as f32, the precision in which
engines compute them; decoding gives exactly the stored f32 as Python floats.

     0  1  schema version (1)
     1  1  zero
     2  2  size r of the request id, 1 .. 65535
     4  4  tokens count k, >= 1
     8  8  start: index of the first token in the request's stream
    16  8  policy version
    24  r  request id, UTF-8, then zeros up to a multiple of 4
     .. 4k token ids, u32
     .. 4k logprobs, f32, finite

See: docs/formats/wal.md, "Kind 1: tokens".
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from typing import Any

from wal.errors import RecordInvalidError

TOKENS = 1
SCHEMA_VERSION = 1
REQUEST_BYTES_MAX = (1 << 16) - 1
U32_MAX = (1 << 32) - 1
U64_MAX = (1 << 64) - 1

_HEAD = struct.Struct("<BBHIQQ")


@dataclass(frozen=True, slots=True)
class TokensAppended:
    """`token_ids` were sampled for `request`, the first of them at index `start` of its stream.

    `logprobs` has one entry a token, under the processed distribution; `policy_version` is the
    version of the weights that sampled them.  `decode` gives the logprobs as f32 holds them.
    """

    request: str
    start: int
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    policy_version: int


def encode(record: TokensAppended) -> bytes:
    """The payload of a kind 1 record.  RecordInvalidError names the field that breaks its rule."""
    try:
        request = record.request.encode()
    except UnicodeEncodeError as error:
        raise _invalid("request", "must be encodable as UTF-8") from error
    count = len(record.token_ids)
    if not 0 < len(request) <= REQUEST_BYTES_MAX:
        raise _invalid("request", f"must have 1..{REQUEST_BYTES_MAX} bytes of UTF-8, has {len(request)}")
    if not 0 < count <= U32_MAX:
        raise _invalid("token_ids", "must hold at least one token")
    if len(record.logprobs) != count:
        raise _invalid("logprobs", f"must be as many as the {count} token_ids, are {len(record.logprobs)}")
    for field, value in (("start", record.start), ("policy_version", record.policy_version)):
        if not 0 <= value <= U64_MAX:
            raise _invalid(field, f"must be in 0..2**64-1, is {value}")
    if not all(map(math.isfinite, record.logprobs)):
        raise _invalid("logprobs", "must be finite")
    head = _HEAD.pack(SCHEMA_VERSION, 0, len(request), count, record.start, record.policy_version)
    try:
        ids = struct.pack(f"<{count}I", *record.token_ids)
    except struct.error as error:
        raise _invalid("token_ids", "must be integers in 0..2**32-1") from error
    try:
        logprobs = struct.pack(f"<{count}f", *record.logprobs)
    except (OverflowError, struct.error) as error:
        raise _invalid("logprobs", "must fit f32") from error
    return b"".join((head, request, bytes(-len(request) & 3), ids, logprobs))


def decode(payload: bytes) -> TokensAppended:
    """The record in a kind 1 payload.  RecordInvalidError if it is not one of this schema."""
    if len(payload) < _HEAD.size:
        raise _invalid("payload", f"has {len(payload)} bytes, fewer than the {_HEAD.size} of its head")
    version, zero, request_bytes, count, start, policy_version = _HEAD.unpack_from(payload)
    if version != SCHEMA_VERSION or zero:
        raise _invalid("schema version", f"is {version}, this program reads {SCHEMA_VERSION}")
    request_end = _HEAD.size + request_bytes
    ids_at = request_end + (-request_bytes & 3)
    if not request_bytes or not count or len(payload) != ids_at + 8 * count:
        need = ids_at + 8 * count
        raise _invalid("payload", f"has {len(payload)} bytes where its head tells {need} ({count} tokens)")
    if any(payload[request_end:ids_at]):
        raise _invalid("padding", "must be zeros")
    try:
        request = payload[_HEAD.size : request_end].decode()
    except UnicodeDecodeError as error:
        raise _invalid("request", "must be UTF-8") from error
    ids = struct.unpack_from(f"<{count}I", payload, ids_at)
    logprobs = struct.unpack_from(f"<{count}f", payload, ids_at + 4 * count)
    if not all(map(math.isfinite, logprobs)):
        raise _invalid("logprobs", "must be finite")
    return TokensAppended(request, start, ids, logprobs, policy_version)


def as_json(payload: bytes) -> dict[str, Any]:
    """A kind 1 payload as a JSON-able object, for printing.  RecordInvalidError as `decode`."""
    record = decode(payload)
    return {
        "request": record.request,
        "start": record.start,
        "token_ids": list(record.token_ids),
        "logprobs": list(record.logprobs),
        "policy_version": record.policy_version,
    }


def _invalid(field: str, rule: str) -> RecordInvalidError:
    return RecordInvalidError(f"tokens record: {field} {rule}")
