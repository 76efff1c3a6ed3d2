"""`python -m wal DIR`: print a log record by record.

Kinds that have a decoder are shown decoded, others by size and a short preview; other packages call
`main` with decoders for their kinds.  Reading takes no lock and changes nothing, so it works beside
a running writer and on a damaged log.  Exit codes: 0 the log was read to its end (a torn tail is
told on stderr), 1 it is corrupt or cannot be read, 2 bad usage.

See: docs/formats/wal.md, "Looking at a log".
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from wal import tokens
from wal.errors import RecordInvalidError, StreamError, WalError
from wal.fold import TokenFold
from wal.format import frame_bytes, parse_name
from wal.reader import Reader, Record

Decoders = Mapping[int, Callable[[bytes], object]]
DECODERS: Decoders = {tokens.TOKENS: tokens.as_json}
PREVIEW_BYTES = 32
TEXT_CHARS_MAX = 160


class Statistics:
    """Counts over the records that were read."""

    def __init__(self) -> None:
        self.records: Counter[int] = Counter()
        self.bytes: Counter[int] = Counter()
        self.segments: set[str] = set()
        self.requests: set[str] = set()
        self.tokens_count = 0
        self.token_bytes = 0

    def add(self, record: Record, value: object, requests: set[str]) -> None:
        """Count one record, what it decoded to and whose it is."""
        size = frame_bytes(len(record.payload))
        self.records[record.kind] += 1
        self.bytes[record.kind] += size
        self.segments.add(record.segment)
        if record.kind == tokens.TOKENS and isinstance(value, dict) and "token_ids" in value:
            self.requests |= requests
            self.tokens_count += len(value["token_ids"])
            self.token_bytes += size

    def as_json(self) -> dict[str, Any]:
        """The counts; `bytes` are frames with header and padding."""
        kinds = {str(k): {"records": self.records[k], "bytes": self.bytes[k]} for k in sorted(self.records)}
        per_token = round(self.token_bytes / self.tokens_count, 2) if self.tokens_count else None
        return {
            "records": self.records.total(),
            "bytes": self.bytes.total(),
            "segments": len(self.segments),
            "kinds": kinds,
            "tokens": {"requests": len(self.requests), "tokens": self.tokens_count, "bytes_per_token": per_token},
        }


def main(argv: Sequence[str] | None = None, decoders: Decoders = DECODERS) -> int:
    """Run the command and return its exit code.

    `decoders` maps a record kind to a function from payload to a JSON-able object; it may raise
    ValueError or RecordInvalidError, and the record is then shown as undecodable.
    """
    try:
        code = _run(argv, decoders)
        sys.stdout.flush()
    except BrokenPipeError:
        # The reader of our output has seen enough (`| head`); stdout must not complain again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    return code


def _run(argv: Sequence[str] | None, decoders: Decoders) -> int:
    try:
        options = _parser().parse_args(argv)
    except SystemExit as stop:  # argparse has told why; main returns codes
        return int(stop.code or 0)
    directory: Path = options.directory
    problem = _unusable(directory)
    if problem:
        print(f"wal: {problem}", file=sys.stderr)
        return 2
    reader, statistics = Reader(directory), Statistics()
    is_quiet = options.verify or options.stats
    fold = TokenFold(keeps_columns=False)
    try:
        for record in reader:
            value = _decode(record, decoders) if options.stats or options.request or not is_quiet else None
            requests = _requests(record, value, fold) if options.stats or options.request else set()
            if options.request and options.request not in requests:
                continue
            statistics.add(record, value, requests)
            if not is_quiet:
                print(_line(record, value, options.json))
    except WalError as error:
        sys.stdout.flush()
        print(f"wal: {error}", file=sys.stderr)
        return 1
    if is_quiet:
        _print_summary(reader, statistics, options)
    if reader.tear:
        tear = reader.tear
        sys.stdout.flush()
        note = f"torn tail in {tear.segment} at offset {tear.offset}: {tear.why}; {tear.size_bytes} bytes"
        print(f"wal: note: {note} of a write that was not finished; the next writer cuts them", file=sys.stderr)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m wal",
        description="Print a write-ahead log, record by record: lsn, segment, offset, kind, size, content.",
        epilog="example: python -m wal runs/wal --json --request r-17 | head",
    )
    parser.add_argument("directory", metavar="DIR", type=Path, help="the log directory")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    parser.add_argument("--verify", action="store_true", help="check every record, print only the verdict")
    parser.add_argument("--stats", action="store_true", help="print only counts by kind")
    parser.add_argument("--request", metavar="ID", help="only records of this request")
    return parser


def _unusable(directory: Path) -> str | None:
    if not directory.exists():
        return f"{directory} does not exist"
    if not directory.is_dir():
        return f"{directory} is not a directory; give the directory that holds the .wal files"
    try:
        if any(parse_name(name) for name in os.listdir(directory)):
            return None
    except OSError as error:
        return f"cannot list {directory}: {error.strerror}"
    return f"{directory} holds no log (no segment file such as 0000000000000001-00000000.wal)"


def _decode(record: Record, decoders: Decoders) -> object:
    """What the kind's decoder makes of the payload; None if the kind has none."""
    decoder = decoders.get(record.kind)
    if decoder is None:
        return None
    try:
        return decoder(record.payload)
    except (RecordInvalidError, ValueError) as error:
        return {"undecodable": str(error)}


def _requests(record: Record, value: object, fold: TokenFold) -> set[str]:
    """Whose record it is: as its own content says, or as the token records before it say of its slots."""
    named = {str(value["request"])} if isinstance(value, dict) and "request" in value else set()
    with contextlib.suppress(RecordInvalidError, StreamError):
        named.update(stream.request for stream in fold.add(record))
    return named


def _line(record: Record, value: object, as_json: bool) -> str:
    size = len(record.payload)
    if as_json:
        shown: dict[str, object] = {
            "lsn": record.lsn,
            "segment": record.segment,
            "offset": record.offset,
            "kind": record.kind,
            "size": size,
        }
        shown |= {"preview": _preview(record.payload)} if value is None else {"record": value}
        return json.dumps(shown, ensure_ascii=True)
    text = _preview(record.payload) if value is None else _short(value)
    return f"{record.lsn:>8}  {record.segment}  @{record.offset:<10} kind {record.kind:<3} {size:>7} B  {text}"


def _preview(payload: bytes) -> str:
    """The first bytes, as ASCII if they are printable, else in hex."""
    head = payload[:PREVIEW_BYTES]
    more = "..." if len(payload) > PREVIEW_BYTES else ""
    if all(32 <= byte < 127 for byte in head):
        return head.decode("ascii") + more
    return head.hex(" ", -4) + more


def _short(value: object) -> str:
    if isinstance(value, dict) and "token_ids" in value and "request" in value:
        ids, logprobs = value["token_ids"], value["logprobs"]
        pairs = " ".join(f"{i}({p:.3f})" for i, p in zip(ids[:8], logprobs[:8], strict=True))
        more = f" ... {len(ids)} tokens" if len(ids) > 8 else ""
        return f"{value['request']} [{value['start']}] v{value['policy_version']}: {pairs}{more}"
    text = json.dumps(value, ensure_ascii=True)
    return text if len(text) <= TEXT_CHARS_MAX else text[:TEXT_CHARS_MAX] + "..."


def _print_summary(reader: Reader, statistics: Statistics, options: argparse.Namespace) -> None:
    outcome = reader.outcome.value if reader.outcome else ""
    summary: dict[str, Any] = {"outcome": outcome, "next_lsn": reader.next_lsn, "records": reader.records_count}
    summary |= {"torn_bytes": reader.tear.size_bytes if reader.tear else 0}
    if options.stats:
        summary |= statistics.as_json()
    if options.json:
        print(json.dumps(summary))
        return
    segments = len(reader.segments)
    print(f"ok: {reader.records_count} records in {segments} segments, next lsn {reader.next_lsn}, ended by: {outcome}")
    for kind, counts in summary.get("kinds", {}).items():
        print(f"kind {kind:>3}: {counts['records']} records, {counts['bytes']} bytes")
    if summary.get("tokens", {}).get("tokens"):
        told = summary["tokens"]
        print(f"tokens: {told['tokens']} of {told['requests']} requests, {told['bytes_per_token']} bytes a token")


if __name__ == "__main__":
    sys.exit(main())
