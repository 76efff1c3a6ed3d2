"""What a request goes through, as records: opened, tokens, its KV broken, closed, acknowledged.

The records of one request; `token_steps` has the record of a whole engine step, `token_routes` that of
expert routes.  The first byte of a payload is its type and never changes its meaning: type 1 is what
the first version of this schema wrote, and is read for ever.  A record names its request by id or by
the slot that stands for it (a number that costs 4 bytes); `Who` is either.  There is one way to write
a record, so `encode(decode(payload)) == payload` for every payload that decodes.

See: docs/formats/wal_tokens.md.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

from wal.token_columns import U32_MAX, check_u32, check_u64, f32_bytes, invalid, is_finite, u32_bytes

TOKENS_APPENDED, REQUEST_OPENED, STEP_APPENDED, REQUEST_CLOSED = 1, 2, 3, 4
ROUTES_RECORDED, KV_BROKEN, REQUESTS_ACKNOWLEDGED = 5, 6, 7
REQUEST_BYTES_MAX = (1 << 16) - 1
REASON_BYTES_MAX = 255

_TOKENS_HEAD = struct.Struct("<BBHIQQ")
WHO_HEAD = struct.Struct("<BBHI")
"""Type, a byte of the type's own, size of the request id (0: named by slot), slot (0: named by id)."""
_ACKNOWLEDGED_HEAD = struct.Struct("<BBHI")
_U16 = struct.Struct("<H")
_U64 = struct.Struct("<Q")

Who: TypeAlias = int | str
"""A request: its slot (int) or its id (str, 1 .. 65535 bytes of UTF-8)."""
Cause: TypeAlias = Literal["rebuilt", "restored", "kept"]
"""What became of the KV cache: computed again, loaded from a saved copy, kept across a change of weights."""
CAUSES: tuple[Cause, ...] = get_args(Cause)


@dataclass(frozen=True, slots=True)
class TokensAppended:
    """`token_ids` were sampled for `request`, the first of them at position `start` of its context.

    `logprobs` has one entry a token, under the processed distribution; `policy_version` is the
    version of the weights that sampled them.  `decode` gives the logprobs as f32 holds them.
    """

    request: str
    start: int
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    policy_version: int


@dataclass(frozen=True, slots=True)
class RequestOpened:
    """From here to its close, `slot` (0 .. 2**32-1) stands for `request`."""

    request: str
    slot: int


@dataclass(frozen=True, slots=True)
class RequestClosed:
    """No token follows; the slot is free.  `reason`: at most 255 bytes of UTF-8, may be empty."""

    who: Who
    reason: str


@dataclass(frozen=True, slots=True)
class KvBroken:
    """The KV cache of the tokens before index `position` of the stream is not the one they were sampled with."""

    who: Who
    position: int
    cause: Cause


@dataclass(frozen=True, slots=True)
class RequestsAcknowledged:
    """The consumer has what it needs of these closed requests (1 or more, distinct): the log may drop them."""

    requests: tuple[str, ...]


def encode_tokens(record: TokensAppended) -> bytes:
    """The payload of a TokensAppended.  RecordInvalidError."""
    request = _id_bytes(record.request, "request")
    count = len(record.token_ids)
    if not 0 < count <= U32_MAX:
        raise invalid("token_ids", "must hold at least one token")
    if len(record.logprobs) != count:
        raise invalid("logprobs", f"must be as many as the {count} token_ids, are {len(record.logprobs)}")
    check_u64(record.start, "start")
    check_u64(record.policy_version, "policy_version")
    ids, logprobs = u32_bytes(record.token_ids, "token_ids"), f32_bytes(record.logprobs, "logprobs")
    head = _TOKENS_HEAD.pack(TOKENS_APPENDED, 0, len(request), count, record.start, record.policy_version)
    return b"".join((head, request, bytes(-len(request) & 3), ids, logprobs))


def decode_tokens(payload: bytes) -> TokensAppended:
    """The TokensAppended in a payload of type 1.  RecordInvalidError."""
    need_head(payload, _TOKENS_HEAD.size)
    _, zero, request_bytes, count, start, policy_version = _TOKENS_HEAD.unpack_from(payload)
    need_zero(zero, "byte 1")
    request_end = _TOKENS_HEAD.size + request_bytes
    ids_at = request_end + (-request_bytes & 3)
    need_size(payload, ids_at + 8 * count)
    if not count:
        raise invalid("token_ids", "must hold at least one token")
    if any(payload[request_end:ids_at]):
        raise invalid("padding", "must be zeros")
    request = _id_text(payload[_TOKENS_HEAD.size : request_end], "request")
    if not is_finite(payload, ids_at + 4 * count):
        raise invalid("logprobs", "must be finite")
    ids = struct.unpack_from(f"<{count}I", payload, ids_at)
    logprobs = struct.unpack_from(f"<{count}f", payload, ids_at + 4 * count)
    return TokensAppended(request, start, ids, logprobs, policy_version)


def encode_opened(record: RequestOpened) -> bytes:
    """The payload of a RequestOpened.  RecordInvalidError."""
    check_u32(record.slot, "slot")
    request = _id_bytes(record.request, "request")
    return WHO_HEAD.pack(REQUEST_OPENED, 0, len(request), record.slot) + request


def decode_opened(payload: bytes) -> RequestOpened:
    """The RequestOpened in a payload of type 2.  RecordInvalidError."""
    need_head(payload, WHO_HEAD.size)
    _, zero, request_bytes, slot = WHO_HEAD.unpack_from(payload)
    need_zero(zero, "byte 1")
    need_size(payload, WHO_HEAD.size + request_bytes)
    return RequestOpened(_id_text(payload[WHO_HEAD.size :], "request"), slot)


def encode_closed(record: RequestClosed) -> bytes:
    """The payload of a RequestClosed.  RecordInvalidError."""
    reason = text_bytes(record.reason, "reason")
    if len(reason) > REASON_BYTES_MAX:
        raise invalid("reason", f"must have at most {REASON_BYTES_MAX} bytes of UTF-8, has {len(reason)}")
    head, request = encode_who(REQUEST_CLOSED, len(reason), record.who)
    return head + request + reason


def decode_closed(payload: bytes) -> RequestClosed:
    """The RequestClosed in a payload of type 4.  RecordInvalidError."""
    need_head(payload, WHO_HEAD.size)
    who, who_end, reason_bytes = decode_who(payload, WHO_HEAD.size)
    need_size(payload, who_end + reason_bytes)
    return RequestClosed(who, text(payload[who_end:], "reason"))


def encode_kv_broken(record: KvBroken) -> bytes:
    """The payload of a KvBroken.  RecordInvalidError."""
    if record.cause not in CAUSES:
        raise invalid("cause", f"must be one of {', '.join(CAUSES)}")
    check_u64(record.position, "position")
    head, request = encode_who(KV_BROKEN, 1 + CAUSES.index(record.cause), record.who)
    return head + _U64.pack(record.position) + request


def decode_kv_broken(payload: bytes) -> KvBroken:
    """The KvBroken in a payload of type 6.  RecordInvalidError."""
    fixed = WHO_HEAD.size + _U64.size
    need_head(payload, fixed)
    who, who_end, cause = decode_who(payload, fixed)
    need_size(payload, who_end)
    if not 1 <= cause <= len(CAUSES):
        raise invalid("cause", f"must be in 1..{len(CAUSES)}, is {cause}")
    return KvBroken(who, _U64.unpack_from(payload, WHO_HEAD.size)[0], CAUSES[cause - 1])


def encode_acknowledged(record: RequestsAcknowledged) -> bytes:
    """The payload of a RequestsAcknowledged.  RecordInvalidError."""
    _check_requests(record.requests)
    parts = [_ACKNOWLEDGED_HEAD.pack(REQUESTS_ACKNOWLEDGED, 0, 0, len(record.requests))]
    for request in record.requests:
        data = _id_bytes(request, "requests")
        parts += (_U16.pack(len(data)), data)
    return b"".join(parts)


def decode_acknowledged(payload: bytes) -> RequestsAcknowledged:
    """The RequestsAcknowledged in a payload of type 7.  RecordInvalidError."""
    need_head(payload, _ACKNOWLEDGED_HEAD.size)
    _, zero, zeros, count = _ACKNOWLEDGED_HEAD.unpack_from(payload)
    need_zero(zero | zeros, "bytes 1 to 3")
    requests: list[str] = []
    offset = _ACKNOWLEDGED_HEAD.size
    while offset < len(payload):
        if len(payload) - offset < _U16.size:
            raise invalid("payload", f"ends within the size of request {len(requests)}")
        start = offset + _U16.size
        offset = start + _U16.unpack_from(payload, offset)[0]
        if offset > len(payload):
            raise invalid("payload", f"ends within request {len(requests)}")
        requests.append(_id_text(payload[start:offset], "requests"))
    if len(requests) != count:
        raise invalid("payload", f"holds {len(requests)} requests where its head tells {count}")
    _check_requests(requests)
    return RequestsAcknowledged(tuple(requests))


def encode_who(type_: int, own: int, who: Who) -> tuple[bytes, bytes]:
    """(head of 8 bytes, bytes of the request id or none) of a record about `who`.  RecordInvalidError."""
    if isinstance(who, str):
        request = _id_bytes(who, "request")
        return WHO_HEAD.pack(type_, own, len(request), 0), request
    check_u32(who, "slot")
    return WHO_HEAD.pack(type_, own, 0, who), b""


def decode_who(payload: bytes, fixed: int) -> tuple[Who, int, int]:
    """(request, offset behind its id, byte 1) of a record whose id follows `fixed` bytes.  RecordInvalidError."""
    _, own, request_bytes, slot = WHO_HEAD.unpack_from(payload)
    end = fixed + request_bytes
    if not request_bytes:
        return slot, end, own
    need_zero(slot, "slot of a record that names its request")
    if len(payload) < end:
        raise invalid("payload", f"has {len(payload)} bytes, its request id ends at {end}")
    return _id_text(payload[fixed:end], "request"), end, own


def need_head(payload: bytes, size: int) -> None:
    """RecordInvalidError unless the payload is as long as its head."""
    if len(payload) < size:
        raise invalid("payload", f"has {len(payload)} bytes, fewer than the {size} of its head")


def need_size(payload: bytes, size: int) -> None:
    """RecordInvalidError unless the payload is exactly as long as its head tells."""
    if len(payload) != size:
        raise invalid("payload", f"has {len(payload)} bytes where its head tells {size}")


def need_zero(value: int, field: str) -> None:
    """RecordInvalidError unless a field that must be zero is."""
    if value:
        raise invalid(field, f"must be zero, is {value}")


def text_bytes(value: str, field: str) -> bytes:
    """UTF-8.  RecordInvalidError for a lone surrogate."""
    try:
        return value.encode()
    except UnicodeEncodeError as error:
        raise invalid(field, "must be encodable as UTF-8") from error


def text(data: bytes, field: str) -> str:
    """The text in UTF-8 bytes.  RecordInvalidError."""
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise invalid(field, "must be UTF-8") from error


def _id_bytes(request: str, field: str) -> bytes:
    data = text_bytes(request, field)
    if not 0 < len(data) <= REQUEST_BYTES_MAX:
        raise invalid(field, f"must have 1..{REQUEST_BYTES_MAX} bytes of UTF-8, has {len(data)}")
    return data


def _id_text(data: bytes, field: str) -> str:
    if not data:
        raise invalid(field, f"must have 1..{REQUEST_BYTES_MAX} bytes of UTF-8, has 0")
    return text(data, field)


def _check_requests(requests: Iterable[str]) -> None:
    listed = list(requests)
    if not listed:
        raise invalid("requests", "must name at least one")
    if len(set(listed)) != len(listed):
        raise invalid("requests", "must be distinct")
