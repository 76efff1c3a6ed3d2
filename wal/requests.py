"""Whom a record belongs to, and who is done: what retention has to know of a schema.

Retention drops records that nobody needs any more, and only their schema says who needs them.  So the
owner of a log hands it a `Requests`; a "request" is whatever is opened, closed and acknowledged as
one, and a record may belong to several.  `TokenRequests` is that of kind 1.

See: docs/formats/wal_retention.md, "Whom a record belongs to".
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Sequence
from typing import Final, Protocol

from wal.floor import FIRST_LSN
from wal.reader import Record
from wal.token_records import (
    REQUEST_CLOSED,
    REQUEST_OPENED,
    REQUESTS_ACKNOWLEDGED,
    TOKENS_APPENDED,
    decode_acknowledged,
    decode_closed,
    decode_opened,
    decode_tokens,
)
from wal.tokens import TOKENS


class Hold(enum.Enum):
    """The type of HOLD."""

    HOLD = "hold"


HOLD: Final = Hold.HOLD
"""Answer of `requests_of` for a record that must never be dropped, nor anything behind it."""


class Requests(Protocol):
    """What the caller knows of the requests in the log: usually the fold that it has anyway."""

    def requests_of(self, record: Record) -> Iterable[str] | Hold:
        """The requests that a record belongs to; called once a record, in log order, before `is_released`.

        It must name a request in its first record and in the one that releases it; between these a
        request may be left out.  A record of no request is no reason to keep anything; HOLD keeps it
        and all behind it for good.
        """
        ...

    def is_released(self, request: str) -> bool:
        """True once it is closed and acknowledged, and for ever after; True if its beginning was dropped."""
        ...


class TokenRequests:
    """The requests of kind 1: live from their first record until they are closed and acknowledged.

    It reads openings, closes and acknowledgements only, so a step costs it next to nothing, and it
    keeps an entry a live request.  Contradictions are for `wal.fold.TokenFold` to refuse; here a
    request stays live in doubt.  Records of other kinds belong to nobody.
    """

    def __init__(self) -> None:
        self._is_closed: dict[str, bool] = {}
        self._slots: dict[int, str] = {}
        self._is_begun = self._is_cut = False

    def requests_of(self, record: Record) -> Sequence[str]:
        """See Requests.  RecordInvalidError if a payload is outside the schema."""
        if not self._is_begun:
            self._is_begun, self._is_cut = True, record.lsn > FIRST_LSN
        payload = record.payload
        type_ = payload[0] if record.kind == TOKENS and payload else 0
        if type_ == TOKENS_APPENDED:
            chunk = decode_tokens(payload)
            # In a cut log it may have a slot that was opened in the dropped part, and its close may name that.
            self._is_closed.setdefault(chunk.request, self._is_cut)
            return (chunk.request,)
        if type_ == REQUEST_OPENED:
            opened = decode_opened(payload)
            self._slots[opened.slot] = opened.request
            self._is_closed.setdefault(opened.request, False)
            return (opened.request,)
        if type_ == REQUEST_CLOSED:
            who = decode_closed(payload).who
            closed = who if isinstance(who, str) else self._slots.pop(who, None)
            if closed in self._is_closed:
                self._is_closed[closed] = True
        if type_ == REQUESTS_ACKNOWLEDGED:
            requests = decode_acknowledged(payload).requests
            for request in requests:
                if self._is_closed.get(request):
                    del self._is_closed[request]
            return requests
        return ()

    def is_released(self, request: str) -> bool:
        """See Requests."""
        return request not in self._is_closed
