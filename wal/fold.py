"""Token records to streams: what a log says of every request, one record after the other.

`fold(records)` reads a log; `TokenFold` takes records one by one and tells whom each touched, which is
what retention and a resuming writer need.  A record that contradicts those before it is refused with
a `StreamError` and the fold is as it was, so a lost, repeated or misplaced record is never folded
silently.  A log whose first segments were dropped may speak of requests that were closed and
acknowledged in the dropped part: in a fold that begins above lsn 1, what names such a request is
passed over.

Invariants:
1. Any prefix of a log folds.
2. Steps and chunks that hold the same tokens fold to the same streams.
3. A record is folded whole or not at all.

See: docs/formats/wal_tokens.md, "Folding".
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, TypeAlias

from wal import tokens
from wal.errors import RecordInvalidError, StreamError
from wal.reader import Record
from wal.token_columns import f32_array, invalid, is_finite, u32_array
from wal.token_records import STEP_APPENDED
from wal.token_steps import BASE, BASE_OFFSET, HEAD_BYTES, StepHead, StepLayout, decode_layout
from wal.token_stream import KvBreak, Pending, Run, Stream
from wal.tokens import (
    KvBroken,
    RequestClosed,
    RequestOpened,
    RequestsAcknowledged,
    RoutesRecorded,
    TokensAppended,
    Who,
)

Streams: TypeAlias = Mapping[str, Stream]
RAW_BYTES_MAX = 64 << 20


class TokenFold:
    """The streams of all requests of a log, as far as its records were added.

    With `keeps_columns` false only lengths, versions and states are kept, no tokens and routes: a few hundred
    bytes a request.  `raw_bytes_max` bounds the step records that wait for their transposition.
    """

    def __init__(self, *, keeps_columns: bool = True, raw_bytes_max: int = RAW_BYTES_MAX) -> None:
        self._pending = Pending(keeps_columns, raw_bytes_max)
        self._streams: dict[str, Stream] = {}
        self._slots: dict[int, Stream] = {}
        self._run: Run | None = None
        self._members: set[int] = set()
        """Slots whose streams take part in the newest run."""
        self._base = 0
        """The sum of the members' lengths."""
        self._untold: set[int] = set()
        """Slots of requests that were opened before this fold begins."""
        self._headless: set[str] = set()
        """Requests that may have had a slot before this fold begins: their close may name it."""
        self._first_lsn = 0
        self._is_partial = False
        self._has_forgotten = False
        self.lsn = 0
        """The newest record added; 0 before the first."""

    @property
    def streams(self) -> Streams:
        """By request id, in the order in which the log first names them."""
        return MappingProxyType(self._streams)

    @property
    def slots(self) -> Mapping[int, Stream]:
        """The open requests that a slot stands for."""
        return MappingProxyType(self._slots)

    def add(self, record: Record) -> Sequence[Stream]:
        """Fold the next record of the log; returns the streams that it belongs to (none for other kinds than 1).

        Records come in the order of their lsns.  Raises StreamError if the record contradicts the ones before
        it and RecordInvalidError if its payload is outside the schema; the fold is then as before.
        """
        payload, run = record.payload, self._run
        if not self._first_lsn:
            self._first_lsn, self._is_partial = record.lsn, record.lsn > 1
        if record.kind != tokens.TOKENS:
            touched: Sequence[Stream] = ()
        elif (
            run is not None
            and len(payload) == run.size_bytes
            and payload.startswith(run.front)
            and payload.startswith(run.layout, HEAD_BYTES)
        ):  # a step of the rows of the newest run: the hot path
            base: int = BASE.unpack_from(payload, BASE_OFFSET)[0]
            high = payload[run.logprobs_at + 3 :: 4]
            if base != self._base or run.vacant or 0x7F in high or 0xFF in high:
                self._fill(run, payload, base, record.lsn)
            self._base = base + run.rows_count
            self._pending.add(run, payload, record.lsn)
            touched = run.streams if not self._is_partial else self._told(run.streams)
        else:
            try:
                touched = self._add(payload, record.lsn)
            except RecordInvalidError as error:
                raise RecordInvalidError(f"lsn {record.lsn}: {error}") from error
        self.lsn = record.lsn
        return touched

    def base_of(self, head: StepHead, slots: Sequence[int]) -> int:
        """The `base` that a step of these rows has next.  StreamError if a slot is not open."""
        if self._run is not None and not self._run.vacant and self._run.has_head(head):
            return self._base
        return sum(stream.length for stream in self._rows(slots, 0))

    def forget(self, request: str) -> None:
        """Drop what is known of an acknowledged request, whose id never comes back.  StreamError if it is none."""
        stream = self._known(request, 0)
        if stream.status != "acknowledged":
            raise StreamError(0, request, f"it is {stream.status}: only acknowledged requests can be forgotten")
        del self._streams[request]
        self._has_forgotten = True

    def _add(self, payload: bytes, lsn: int) -> Sequence[Stream]:
        if payload and payload[0] == STEP_APPENDED:
            return self._step(payload, lsn)
        record = tokens.decode(payload)
        return _HANDLERS[type(record)](self, record, lsn)

    def _fill(self, run: Run, payload: bytes, base: int, lsn: int) -> None:
        """Check the step of a run that is not plain; slots that changed hands get their new streams."""
        if not is_finite(payload, run.logprobs_at):
            raise invalid("logprobs", f"must be finite (lsn {lsn})")
        rows = self._rows(run.vacant, lsn)
        self._check_base(base, self._base + sum(stream.length for stream in rows), lsn)
        for slot, stream in zip(tuple(run.vacant), rows, strict=True):
            stream.join(run.fill(slot, stream))
            self._members.add(slot)

    def _step(self, payload: bytes, lsn: int) -> Sequence[Stream]:
        layout = decode_layout(payload)
        streams = self._rows(layout.slots, lsn)
        if layout.counts is not None:
            return self._uneven_step(payload, layout, layout.counts, streams, lsn)
        members = layout.members
        left, joined = self._members - members, members - self._members
        expected = self._base + sum(self._slots[slot].length for slot in joined)
        expected -= sum(self._slots[slot].length for slot in left)
        self._check_base(layout.base, expected, lsn)
        for slot in left:
            self._slots[slot].leave()
        versions = _versions(layout)
        run = self._run
        if len(versions) == 1 and run is not None and run.versions == versions:
            for slot in joined:
                self._slots[slot].join(versions[0])
        else:
            per_row = versions if len(versions) > 1 else itertools.repeat(versions[0])
            for stream, version in zip(streams, per_row, strict=False):
                stream.join(version)
        self._run, self._members = Run(payload, layout, streams, versions), members
        self._base = layout.base + len(streams)
        self._pending.add(self._run, payload, lsn)
        return self._told(streams)

    def _uneven_step(
        self, payload: bytes, layout: StepLayout, counts: Sequence[int], streams: list[Stream], lsn: int
    ) -> Sequence[Stream]:
        """A step in which some request got more than one token."""
        self._check_base(layout.base, sum(stream.length for stream in streams), lsn)
        self._end_run()
        view = memoryview(payload)
        ids, logprobs = u32_array(view[layout.ids_at : layout.logprobs_at]), f32_array(view[layout.logprobs_at :])
        versions = _versions(layout)
        per_row = versions if len(versions) > 1 else itertools.repeat(versions[0])
        start = 0
        for stream, count, version in zip(streams, counts, per_row, strict=False):
            end = start + count
            stream.extend(ids[start:end], logprobs[start:end], version, lsn)
            start = end
        return self._told(streams)

    def _append_chunk(self, record: TokensAppended, lsn: int) -> Sequence[Stream]:
        request = record.request
        stream = self._streams.get(request)
        self._check_open(stream, request, lsn)
        position = stream.position if stream else 0
        if record.start < position:
            raise StreamError(lsn, request, f"its tokens start at {record.start}, the stream is at {position} already")
        if stream is None:
            stream = self._streams[request] = Stream(request, None, lsn, self._pending)
            if self._is_partial:
                self._headless.add(request)
        self._leave(stream)
        self._pending.absorb()
        stream.move_to(record.start)
        stream.extend(record.token_ids, record.logprobs, record.policy_version, lsn)
        return (stream,)

    def _open_request(self, record: RequestOpened, lsn: int) -> Sequence[Stream]:
        request, slot = record.request, record.slot
        holder, stream = self._slots.get(slot), self._streams.get(request)
        if holder is not None and slot not in self._untold:
            raise StreamError(lsn, request, f"slot {slot} is opened for it but stands for {holder.request!r}")
        self._check_open(stream, request, lsn)
        if stream is None:
            stream = self._streams[request] = Stream(request, slot, lsn, self._pending)
        elif stream.slot is not None:
            raise StreamError(lsn, request, f"it is opened as slot {slot} but is open as slot {stream.slot}")
        if holder is not None:  # its request was closed by an id that this fold never saw
            self._leave(holder)
            self._free(slot)
        stream.slot = slot
        stream.touch(lsn)
        self._slots[slot] = stream
        return (stream,)

    def _close_request(self, record: RequestClosed, lsn: int) -> Sequence[Stream]:
        stream = self._find(record.who, lsn)
        if stream is None:
            return ()
        self._check_open(stream, stream.request, lsn)
        self._leave(stream)
        stream.touch(lsn)
        if stream.slot is not None:
            self._free(stream.slot)
        stream.slot, stream.status, stream.reason = None, "closed", record.reason
        return self._told([stream])

    def _record_routes(self, record: RoutesRecorded, lsn: int) -> Sequence[Stream]:
        stream = self._find(record.who, lsn)
        if stream is None or not stream.request:
            return ()
        end, length = record.start + record.rows_count, stream.length
        if stream.status == "acknowledged":
            raise StreamError(lsn, stream.request, "routes come after its acknowledgement")
        if record.start < stream.routes_end or end > length:
            why = (
                f"routes of tokens {record.start} to {end - 1} do not fit: {stream.routes_end} are recorded of {length}"
            )
            raise StreamError(lsn, stream.request, why)
        stream.routes_end = end
        if self._pending.keeps_columns:
            stream.routes.append(record)
        stream.touch(lsn)
        return (stream,)

    def _break_kv(self, record: KvBroken, lsn: int) -> Sequence[Stream]:
        stream = self._find(record.who, lsn)
        if stream is None or not stream.request:
            return ()
        self._check_open(stream, stream.request, lsn)
        if record.position > stream.length:
            why = f"its KV breaks at {record.position}, the stream has {stream.length} tokens"
            raise StreamError(lsn, stream.request, why)
        stream.kv_breaks.append(KvBreak(record.position, record.cause))
        stream.touch(lsn)
        return (stream,)

    def _acknowledge_requests(self, record: RequestsAcknowledged, lsn: int) -> Sequence[Stream]:
        is_tolerant = self._is_partial or self._has_forgotten
        touched = [self._known(r, lsn) for r in record.requests if r in self._streams or not is_tolerant]
        for stream in touched:
            if stream.status == "open" and stream.request not in self._headless:
                raise StreamError(lsn, stream.request, "it is acknowledged before its close")
        for stream in touched:
            stream.status = "acknowledged"
            stream.touch(lsn)
        return touched

    def _rows(self, slots: Iterable[int], lsn: int) -> list[Stream]:
        """The streams that slots stand for."""
        try:
            return list(map(self._slots.__getitem__, slots))
        except KeyError as error:
            if not self._is_partial:
                raise StreamError(lsn, "", f"slot {error} stands for no open request") from None
        for slot in slots:
            if slot not in self._slots:
                self._slots[slot] = Stream("", slot, lsn, self._pending)
                self._untold.add(slot)
        return list(map(self._slots.__getitem__, slots))

    def _find(self, who: Who, lsn: int) -> Stream | None:
        """The stream of a slot or an id; None if it is one of the part that was dropped."""
        stream = self._streams.get(who) if isinstance(who, str) else self._slots.get(who)
        if stream is None and not self._is_partial:
            if isinstance(who, str):
                return self._known(who, lsn)
            raise StreamError(lsn, "", f"slot {who} stands for no open request")
        return stream

    def _known(self, request: str, lsn: int) -> Stream:
        try:
            return self._streams[request]
        except KeyError:
            raise StreamError(lsn, request, "the log knows no such request") from None

    def _leave(self, stream: Stream) -> None:
        """Take a stream out of the newest run, if it takes part."""
        slot = stream.slot
        if slot in self._members and self._run is not None:
            self._base -= stream.length
            stream.leave()
            self._members.discard(slot)
            self._run.vacate(slot)

    def _free(self, slot: int) -> None:
        """The slot stands for nobody; with the last untold one gone, lengths are known again."""
        del self._slots[slot]
        if slot in self._untold:
            self._untold.remove(slot)
            self._base = sum(self._slots[member].length for member in self._members)

    def _end_run(self) -> None:
        """No stream takes part in a run any more, and all columns are complete."""
        for slot in self._members:
            self._slots[slot].leave()
        self._run, self._members, self._base = None, set(), 0
        self._pending.absorb()

    def _told(self, streams: list[Stream]) -> Sequence[Stream]:
        """Without the requests that were opened before this fold begins."""
        return streams if not self._is_partial else [stream for stream in streams if stream.request]

    def _check_base(self, base: int, expected: int, lsn: int) -> None:
        if base != expected and not self._untold:
            why = f"its base is {base}, its rows have {expected} tokens: a step was lost or repeated"
            raise StreamError(lsn, "", why)

    def _check_open(self, stream: Stream | None, request: str, lsn: int) -> None:
        if stream is not None and stream.status != "open":
            raise StreamError(lsn, request, f"it is {stream.status}")


_HANDLERS: dict[type, Callable[[TokenFold, Any, int], Sequence[Stream]]] = {
    TokensAppended: TokenFold._append_chunk,  # noqa: SLF001  # the class's own table
    RequestOpened: TokenFold._open_request,  # noqa: SLF001
    RequestClosed: TokenFold._close_request,  # noqa: SLF001
    RoutesRecorded: TokenFold._record_routes,  # noqa: SLF001
    KvBroken: TokenFold._break_kv,  # noqa: SLF001
    RequestsAcknowledged: TokenFold._acknowledge_requests,  # noqa: SLF001
}


def fold(records: Iterable[Record]) -> Streams:
    """The streams of a log's records.  StreamError, RecordInvalidError, and what reading raises."""
    folded = TokenFold()
    for record in records:
        folded.add(record)
    return folded.streams


def _versions(layout: StepLayout) -> Sequence[int]:
    """One version for all rows, or one a row."""
    runs = layout.version_runs
    if len(runs) == 1:
        return (runs[0][1],)
    return tuple(itertools.chain.from_iterable(itertools.repeat(version, rows) for rows, version in runs))
