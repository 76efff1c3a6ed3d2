"""What `python -m wal` knows of a log while it reads it: whose each record is, what is wrong, what there is of what.

One pass, no tokens kept: a few hundred bytes a request.  Kind 1 is folded, so a step is shown with the
requests behind its slots, and a log whose streams contradict themselves is found out although every
frame of it is valid.

See: docs/formats/wal.md, "Looking at a log"; docs/formats/wal_tokens.md, "Folding".
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from wal import tokens
from wal.errors import CorruptError, RecordInvalidError, StreamError, WalError
from wal.floor import floor_of
from wal.fold import TokenFold
from wal.format import frame_bytes
from wal.pins import pins_of
from wal.reader import Reader, Record
from wal.token_stream import Stream

Decoders = Mapping[int, Callable[[bytes], object]]
WHY_CHARS_MAX = 400


class Seen(NamedTuple):
    """A record as people see it: its decoded value (None without a decoder) and whose it is."""

    record: Record
    value: object
    streams: Sequence[Stream | None]
    """Of a step one entry a row, None if the row's request was opened before the log begins."""

    @property
    def requests(self) -> Sequence[str | None]:
        """The requests that the record names, else those of `streams`, in the same order."""
        named: list[object] = []
        if isinstance(self.value, dict):
            many = self.value.get("requests")
            named = [self.value.get("request"), *(many if isinstance(many, list | tuple) else ())]
        ids = [one for one in named if isinstance(one, str)]
        return ids or [stream.request if stream else None for stream in self.streams]


class Summary:
    """Counts over the records that were looked at; `problems_count` of them are not what their schema says.

    Kind 1 is the log's own and needs no decoder.
    """

    def __init__(self, decoders: Decoders) -> None:
        self._decoders: Decoders = {**decoders, tokens.TOKENS: tokens.as_json}
        self._fold = TokenFold(keeps_columns=False)
        self._records: Counter[int] = Counter()
        self._bytes: Counter[int] = Counter()
        self._segments: set[str] = set()
        self._requests: set[str | None] = set()
        self._tokens_count = 0
        """Tokens in the records that were counted, whosesoever."""
        self._unnamed_count = 0
        """Those of them whose request was opened before the log begins."""
        self.problem = ""
        """The first record that its schema or the records before it do not allow."""
        self.problems_count = 0

    def look(self, record: Record) -> Seen:
        """Decode a record and find out whose it is.  Never raises for what a record holds."""
        value: Any = None
        streams: Sequence[Stream | None] = ()
        decoder = self._decoders.get(record.kind)
        try:
            value = decoder(record.payload) if decoder else None
            streams = self._fold.add(record)
            if record.kind == tokens.TOKENS and len(streams) < len(value.get("slots", ())):
                # The log was cut: the fold leaves out rows whose request it cannot name.
                rows = [self._fold.slots[slot] for slot in value["slots"]]
                streams = [stream if stream.request else None for stream in rows]
        except (RecordInvalidError, StreamError, ValueError) as error:
            why = _shown(str(error))
            self.problems_count += 1
            self.problem = self.problem or f"lsn {record.lsn} ({record.segment} at {record.offset}): {why}"
            value = {"undecodable": why} if value is None else value
        return Seen(record, value, streams)

    def count(self, seen: Seen) -> None:
        """Count a record that `look` has seen."""
        record, value = seen.record, seen.value
        self._records[record.kind] += 1
        self._bytes[record.kind] += frame_bytes(len(record.payload))
        self._segments.add(record.segment)
        self._requests.update(seen.requests)
        if record.kind == tokens.TOKENS and isinstance(value, dict) and "token_ids" in value:
            self._tokens_count += len(value["token_ids"])
            if None in seen.streams:
                counts = value["counts"] or [1] * len(seen.streams)
                rows = zip(seen.streams, counts, strict=True)
                self._unnamed_count += sum(count for stream, count in rows if stream is None)

    def outcome(self, reader: Reader, error: WalError | None) -> dict[str, Any]:
        """How the log ended and whether all of it is sound; after the last record, or the error that came instead."""
        told = {
            "outcome": reader.outcome.value if reader.outcome else "unreadable",
            "records": reader.records_count,
            "next_lsn": reader.next_lsn,
            "torn_bytes": reader.tear.size_bytes if reader.tear else 0,
            "problems": self.problems_count,
            "problem": self.problem or None,
        }
        if isinstance(error, CorruptError):
            return told | {"outcome": "corrupt", "segment": error.segment, "offset": error.offset, "why": error.why}
        return told | {"segment": None, "offset": None, "why": str(error)} if error else told

    def counts(self, reader: Reader, names: Sequence[str]) -> dict[str, Any]:
        """What was counted; `bytes` are frames with header and padding, `names` the files of the directory."""
        kinds = {str(k): {"records": self._records[k], "bytes": self._bytes[k]} for k in sorted(self._records)}
        return {
            "records": self._records.total(),
            "bytes": self._bytes.total(),
            "segments": len(self._segments),
            "epochs": sorted({segment.epoch for segment in reader.segments}),
            "floor_lsn": floor_of(names),
            "pins": [{"name": pin.name, "lsn": pin.lsn} for pin in pins_of(names)],
            "kinds": kinds,
            "tokens": self._tokens(),
        }

    def _tokens(self) -> dict[str, Any]:
        streams = [stream for name, stream in self._fold.streams.items() if name in self._requests]
        statuses = Counter(stream.status for stream in streams)
        size_bytes, count = self._bytes[tokens.TOKENS], self._tokens_count
        return {
            "requests": len(streams),
            **{status: statuses[status] for status in ("open", "closed", "acknowledged")},
            "tokens": sum(stream.length for stream in streams),
            "tokens_unnamed": self._unnamed_count,
            "bytes_per_token": round(size_bytes / count, 2) if count else None,
        }


def _shown(text: str) -> str:
    """What an error says, which may quote a record: bounded, and nothing in it moves a cursor."""
    more = "..." if len(text) > WHY_CHARS_MAX else ""
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text[:WHY_CHARS_MAX]) + more
