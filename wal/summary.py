"""What `python -m wal` knows of a log while it reads it: whose each record is, what is wrong, what there is of what.

One pass, no tokens kept: a few hundred bytes a request.  Kind 1 is folded, so a step is shown with the
requests behind its slots, and a log whose streams contradict themselves is found out although every
frame of it is valid.

See: docs/formats/wal.md, "Looking at a log"; docs/formats/wal_tokens.md, "Folding".
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from wal import tokens
from wal.errors import RecordInvalidError, StreamError
from wal.floor import floor_of
from wal.fold import TokenFold
from wal.format import frame_bytes
from wal.pins import pins_of
from wal.reader import Reader, Record
from wal.token_stream import Stream

Decoders = Mapping[int, Callable[[bytes], object]]


class Seen(NamedTuple):
    """A record as people see it: its decoded value (None without a decoder) and whose it is."""

    record: Record
    value: object
    streams: Sequence[Stream]

    def belongs_to(self, request: str) -> bool:
        """True if the record is one of this request's."""
        own = self.value.get("request") if isinstance(self.value, dict) else None
        return request == own or any(stream.request == request for stream in self.streams)


class Summary:
    """Counts over the records that were looked at; `problems_count` of them are not what their schema says."""

    def __init__(self, decoders: Decoders) -> None:
        self._decoders = decoders
        self._fold = TokenFold(keeps_columns=False)
        self._records: Counter[int] = Counter()
        self._bytes: Counter[int] = Counter()
        self._segments: set[str] = set()
        self._requests: set[str] = set()
        self._first_lsn = 0
        self.problem = ""
        """The first record that its schema or the records before it do not allow."""
        self.problems_count = 0

    def look(self, record: Record) -> Seen:
        """Decode a record and find out whose it is.  Never raises for what a record holds."""
        value: object = None
        streams: Sequence[Stream] = ()
        decoder = self._decoders.get(record.kind)
        try:
            value = decoder(record.payload) if decoder else None
            streams = self._fold.add(record)
        except (RecordInvalidError, StreamError, ValueError) as error:
            self.problems_count += 1
            self.problem = self.problem or f"lsn {record.lsn} ({record.segment} at {record.offset}): {error}"
            value = {"undecodable": str(error)} if value is None else value
        return Seen(record, value, streams)

    def count(self, seen: Seen) -> None:
        """Count a record that `look` has seen."""
        record = seen.record
        self._records[record.kind] += 1
        self._bytes[record.kind] += frame_bytes(len(record.payload))
        self._segments.add(record.segment)
        self._requests.update(stream.request for stream in seen.streams)
        self._first_lsn = self._first_lsn or record.lsn

    def outcome(self, reader: Reader) -> dict[str, Any]:
        """How the log ended and whether all of it is sound; after the last record."""
        return {
            "outcome": reader.outcome.value if reader.outcome else "",
            "records": reader.records_count,
            "next_lsn": reader.next_lsn,
            "torn_bytes": reader.tear.size_bytes if reader.tear else 0,
            "problems": self.problems_count,
        }

    def counts(self, reader: Reader, directory: Path) -> dict[str, Any]:
        """What was counted; `bytes` are frames with header and padding.  OSError if the directory cannot be listed."""
        kinds = {str(k): {"records": self._records[k], "bytes": self._bytes[k]} for k in sorted(self._records)}
        names = os.listdir(directory)
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
        streams = [self._fold.streams[name] for name in self._requests if name in self._fold.streams]
        count = sum(stream.length for stream in streams)
        statuses = Counter(stream.status for stream in streams)
        return {
            "requests": len(streams),
            **{status: statuses[status] for status in ("open", "closed", "acknowledged")},
            "tokens": count,
            "bytes_per_token": round(self._bytes[tokens.TOKENS] / count, 2) if count else None,
        }
