"""`python -m wal DIR`: print a log record by record.

Kinds that have a decoder are shown decoded, others by size and a short preview; other packages call
`main` with decoders for their kinds.  Reading takes no lock and changes nothing, so it works beside
a running writer and on a damaged log.  Exit codes: 0 the log was read to its end (a torn tail is
told on stderr), 1 it is corrupt or cannot be read, or `--verify` found a record that is not what its
schema says, 2 bad usage.

See: docs/formats/wal.md, "Looking at a log".
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from wal import tokens
from wal.errors import WalError
from wal.format import parse_name
from wal.reader import Reader
from wal.summary import Decoders, Seen, Summary

DECODERS: Decoders = {tokens.TOKENS: tokens.as_json}
PREVIEW_BYTES = 32
TEXT_CHARS_MAX = 160
TOKENS_SHOWN_MAX = 8
ROWS_SHOWN_MAX = 4


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
    reader, summary = Reader(directory), Summary(decoders)
    try:
        for record in reader:
            seen = summary.look(record)
            if options.request and not seen.belongs_to(options.request):
                continue
            summary.count(seen)
            if not options.verify and not options.stats:
                print(_line(seen, options))
    except WalError as error:
        _note(str(error))
        return 1
    if options.verify or options.stats:
        _print_summary(reader, summary, options)
    if reader.tear:
        tear = reader.tear
        told = f"torn tail in {tear.segment} at offset {tear.offset}: {tear.why}; {tear.size_bytes} bytes"
        _note(f"note: {told} of a write that was not finished; the next writer cuts them")
    if summary.problem:
        _note(f"note: {summary.problem}; {summary.problems_count} such records")
    return 1 if options.verify and summary.problem else 0


def _note(text: str) -> None:
    sys.stdout.flush()
    print(f"wal: {text}", file=sys.stderr)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m wal",
        description="Print a write-ahead log, record by record: lsn, segment, offset, kind, size, content.",
        epilog="example: python -m wal runs/wal --json --request r-17 | head",
    )
    parser.add_argument("directory", metavar="DIR", type=Path, help="the log directory")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    parser.add_argument("--verify", action="store_true", help="check every record, print only the verdict")
    parser.add_argument("--stats", action="store_true", help="print only what there is of what")
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


def _line(seen: Seen, options: argparse.Namespace) -> str:
    record, value = seen.record, seen.value
    size = len(record.payload)
    if options.json:
        shown: dict[str, object] = {
            "lsn": record.lsn,
            "segment": record.segment,
            "offset": record.offset,
            "kind": record.kind,
            "size": size,
        }
        if seen.streams:
            shown["requests"] = [stream.request for stream in seen.streams]
        shown |= {"preview": _preview(record.payload)} if value is None else {"record": value}
        return json.dumps(shown, ensure_ascii=True)
    text = _preview(record.payload) if value is None else _short(seen, options.request)
    return f"{record.lsn:>8}  {record.segment}  @{record.offset:<10} kind {record.kind:<3} {size:>7} B  {text}"


def _preview(payload: bytes) -> str:
    """The first bytes, as ASCII if they are printable, else in hex."""
    head = payload[:PREVIEW_BYTES]
    more = "..." if len(payload) > PREVIEW_BYTES else ""
    if all(32 <= byte < 127 for byte in head):
        return head.decode("ascii") + more
    return head.hex(" ", -4) + more


def _short(seen: Seen, request: str | None) -> str:
    value = seen.value
    if isinstance(value, dict) and "token_ids" in value and seen.streams:
        return _sampled(seen, value, request)
    text = json.dumps(value, ensure_ascii=True)
    return text if len(text) <= TEXT_CHARS_MAX else text[:TEXT_CHARS_MAX] + "..."


def _sampled(seen: Seen, value: dict[str, Any], request: str | None) -> str:
    """Tokens of a chunk or a step as `request [index of the first] vVERSION: id(logprob) ...`, a few of each."""
    counts = value.get("counts") or [1] * len(seen.streams)
    versions = [version for rows, version in value.get("version_runs", ()) for _ in range(rows)]
    if "request" in value:
        counts, versions = [len(value["token_ids"])], [value["policy_version"]]
    rows, at = [], 0
    for stream, count, version in zip(seen.streams, counts, versions, strict=True):
        if request in (None, stream.request):
            pairs = zip(value["token_ids"][at : at + count], value["logprobs"][at : at + count], strict=True)
            told = " ".join(f"{i}({p:.3f})" for i, p in list(pairs)[:TOKENS_SHOWN_MAX])
            more = f" ... {count} tokens" if count > TOKENS_SHOWN_MAX else ""
            name = json.dumps(stream.request)[1:-1]
            rows.append(f"{name} [{stream.length - count}] v{version}: {told}{more}")
        at += count
    more = f"  ... {len(rows)} requests" if len(rows) > ROWS_SHOWN_MAX else ""
    return "  ".join(rows[:ROWS_SHOWN_MAX]) + more


def _print_summary(reader: Reader, summary: Summary, options: argparse.Namespace) -> None:
    told = summary.outcome(reader)
    if options.stats:
        told |= summary.counts(reader, options.directory)
    if options.json:
        print(json.dumps(told))
        return
    verdict = "bad" if summary.problem else "ok"
    segments = f"{len(reader.segments)} segments, next lsn {reader.next_lsn}"
    print(f"{verdict}: {reader.records_count} records in {segments}, ended by: {told['outcome']}")
    if not options.stats:
        return
    pins = ", ".join(f"{pin['name']} at {pin['lsn']}" for pin in told["pins"]) or "none"
    print(f"begins at lsn {told['floor_lsn']}, epochs {', '.join(map(str, told['epochs']))}, pins: {pins}")
    for kind, counts in told["kinds"].items():
        print(f"kind {kind:>3}: {counts['records']} records, {counts['bytes']} bytes")
    of = told["tokens"]
    if of["requests"]:
        statuses = ", ".join(f"{of[status]} {status}" for status in ("open", "closed", "acknowledged"))
        per_token = f", {of['bytes_per_token']} bytes a token" if of["tokens"] else ""
        print(f"tokens: {of['tokens']} of {of['requests']} requests ({statuses}){per_token}")


if __name__ == "__main__":
    sys.exit(main())
