"""Sampled tokens as records: the schema of kind 1.

Binary columns, because a token costs 8 bytes here and twenty and more as text.  The first byte of a
payload is its type: a chunk of one request (1) or a step of all requests (3), and what happens to a
request around them.  Logprobs are stored as f32, the precision in which engines compute them;
decoding gives exactly the stored f32 as Python floats.  `wal.fold` makes streams of these records,
`wal.token_log` writes them.

Invariants:
1. `decode(encode(record)) == record`, logprobs as f32 and columns as tuples.
2. `encode(decode(payload)) == payload`: a record has one form.

See: docs/formats/wal_tokens.md.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias, get_args

from wal.errors import RecordInvalidError
from wal.token_columns import invalid
from wal.token_records import (
    KV_BROKEN,
    REQUEST_CLOSED,
    REQUEST_OPENED,
    REQUESTS_ACKNOWLEDGED,
    ROUTES_RECORDED,
    STEP_APPENDED,
    TOKENS_APPENDED,
    Cause,
    KvBroken,
    RequestClosed,
    RequestOpened,
    RequestsAcknowledged,
    TokensAppended,
    Who,
    decode_acknowledged,
    decode_closed,
    decode_kv_broken,
    decode_opened,
    decode_tokens,
    encode_acknowledged,
    encode_closed,
    encode_kv_broken,
    encode_opened,
    encode_tokens,
)
from wal.token_routes import RoutesRecorded, decode_routes, encode_routes
from wal.token_steps import StepAppended, decode_step, encode_step

__all__ = [
    "TOKENS",
    "Cause",
    "KvBroken",
    "RecordInvalidError",
    "RequestClosed",
    "RequestOpened",
    "RequestsAcknowledged",
    "RoutesRecorded",
    "StepAppended",
    "TokenRecord",
    "TokensAppended",
    "Who",
    "as_json",
    "decode",
    "encode",
]

TOKENS = 1
"""The record kind of everything here."""

TokenRecord: TypeAlias = (
    TokensAppended | RequestOpened | StepAppended | RequestClosed | RoutesRecorded | KvBroken | RequestsAcknowledged
)
_ENCODERS: dict[type, Callable[[Any], bytes]] = {
    TokensAppended: encode_tokens,
    RequestOpened: encode_opened,
    StepAppended: encode_step,
    RequestClosed: encode_closed,
    RoutesRecorded: encode_routes,
    KvBroken: encode_kv_broken,
    RequestsAcknowledged: encode_acknowledged,
}
_DECODERS: dict[int, Callable[[bytes], TokenRecord]] = {
    TOKENS_APPENDED: decode_tokens,
    REQUEST_OPENED: decode_opened,
    STEP_APPENDED: decode_step,
    REQUEST_CLOSED: decode_closed,
    ROUTES_RECORDED: decode_routes,
    KV_BROKEN: decode_kv_broken,
    REQUESTS_ACKNOWLEDGED: decode_acknowledged,
}


def encode(record: TokenRecord) -> bytes:
    """The payload of a kind 1 record.  RecordInvalidError names the field that breaks its rule."""
    encoder = _ENCODERS.get(type(record))
    if encoder is None:
        known = ", ".join(type_.__name__ for type_ in get_args(TokenRecord))
        raise invalid("record", f"is a {type(record).__name__}, not one of {known}")
    return encoder(record)


def decode(payload: bytes) -> TokenRecord:
    """The record in a kind 1 payload.  RecordInvalidError if it is not one of this schema."""
    if not payload:
        raise invalid("payload", "is empty")
    decoder = _DECODERS.get(payload[0])
    if decoder is None:
        raise invalid("type", f"is {payload[0]}, this program reads {min(_DECODERS)} to {max(_DECODERS)}")
    return decoder(payload)


def as_json(payload: bytes) -> dict[str, Any]:
    """A kind 1 payload as a JSON-able object, for printing.  RecordInvalidError as `decode`."""
    record = decode(payload)
    match record:
        case TokensAppended():
            name = "tokens"
        case RequestOpened():
            name = "opened"
        case StepAppended():
            name = "step"
        case RequestClosed():
            name = "closed"
        case RoutesRecorded():
            name = "routes"
        case KvBroken():
            name = "kv_broken"
        case _:
            name = "acknowledged"
    shown: dict[str, Any] = {"type": name}
    for field in record.__slots__:
        value = getattr(record, field)
        if field == "who":
            shown["request" if isinstance(value, str) else "slot"] = value
        elif isinstance(value, bytes):
            shown[field] = value.hex()
        elif isinstance(value, tuple):
            shown[field] = [list(part) if isinstance(part, tuple) else part for part in value]
        else:
            shown[field] = value
    return shown
