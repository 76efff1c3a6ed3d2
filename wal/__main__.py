"""`python -m wal DIR`: print a log record by record.

Kinds that have a decoder are shown decoded, others by size and a short preview; other packages call
`main` with decoders for their kinds.  Reading takes no lock and changes nothing, so it works beside
a running writer and on a damaged log.  Exit codes: 0 the log was read to its end (a torn tail is
told on stderr), 1 it is corrupt or cannot be read, or `--verify` found a record that is not what its
schema says, or the output cannot be written, 2 bad usage.

See: docs/formats/wal.md, "Looking at a log".
"""

from __future__ import annotations

import argparse
import codecs
import json
import os
import stat
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from wal.errors import CorruptError, WalError
from wal.floor import floor_of
from wal.format import parse_name
from wal.reader import Reader
from wal.storage import OsStorage
from wal.summary import Decoders, Seen, Summary

PREVIEW_BYTES = 32
TEXT_CHARS_MAX = 160
NAME_CHARS_MAX = 80
TOKENS_SHOWN_MAX = 8
ROWS_SHOWN_MAX = 4


class _RegularFiles(OsStorage):
    """The disk, where a name that stands for a pipe or a device is damage: reading one might never end."""

    def read_into(self, path: Path, offset: int, buffer: memoryview) -> int:
        """See Storage.  CorruptError if it is no file."""
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise CorruptError(path.parent, path.name, 0, "it is not a regular file")
        return super().read_into(path, offset, buffer)


def main(argv: Sequence[str] | None = None, decoders: Decoders | None = None) -> int:
    """Run the command and return its exit code.

    `decoders` maps a record kind other than 1 to a function from payload to a JSON-able object; it may raise
    ValueError or RecordInvalidError, and the record is then shown as undecodable.
    """
    try:
        code = _run(argv, decoders or {})
        _flush()
    except OSError as error:  # of the output: what reading meets is a WalError
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())  # stdout must not complain again at exit
        os.close(nowhere)
        if isinstance(error, BrokenPipeError):  # the reader of our output has seen enough (`| head`)
            return 0
        print(f"wal: cannot write the output: {error.strerror}", file=sys.stderr)
        return 1
    return code


def _run(argv: Sequence[str] | None, decoders: Decoders) -> int:
    try:
        options = _parser().parse_args(argv)
    except SystemExit as stop:  # argparse has told why; main returns codes
        return int(stop.code or 0)
    try:
        names = _names(options.directory)
    except ValueError as error:
        _note(str(error))
        return 2
    reader, summary = Reader(options.directory, storage=_RegularFiles()), Summary(decoders)
    try:
        found_count, failure = _print_records(reader, summary, options), None
    except WalError as error:
        found_count, failure = 0, error
    if options.verify or options.stats:
        _print_summary(reader, summary, options, failure, names)
    elif summary.problem:
        _note(f"note: {summary.problem}; {_count(summary.problems_count, 'such record')}")
    if failure:
        _note(str(failure))
        return 1
    if options.request and not found_count:
        _note(f"note: no record of request {options.request!r}; the log begins at lsn {floor_of(names)}")
    if reader.tear:
        tear = reader.tear
        told = f"torn tail in {tear.segment} at offset {tear.offset}: {tear.why}; {_count(tear.size_bytes, 'byte')}"
        _note(f"note: {told} of a write that was not finished; the next writer cuts them")
    return 1 if options.verify and summary.problem else 0


def _print_records(reader: Reader, summary: Summary, options: argparse.Namespace) -> int:
    """Count the records that are asked for, and print them unless a summary is; returns how many.  WalError."""
    found_count = 0
    for record in reader:
        seen = summary.look(record)
        if options.request and options.request not in seen.requests:
            continue
        found_count += 1
        summary.count(seen)
        if not options.verify and not options.stats:
            _print(_line(seen, options))
    return found_count


def _print(text: str) -> None:
    """One line, in ASCII: every terminal and every encoding takes it."""
    print(text.encode("ascii", "backslashreplace").decode())


def _note(text: str) -> None:
    _flush()
    print(f"wal: {text}", file=sys.stderr)


def _flush() -> None:
    print(end="", flush=True)


def _count(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


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
    parser.add_argument("--request", metavar="ID", type=_request, help="only records of this request")
    return parser


def _request(text: str) -> str:
    if not text:
        raise argparse.ArgumentTypeError("a request's id is not empty")
    return text


def _names(directory: Path) -> list[str]:
    """The files of a log directory.  ValueError, for people, if it is none."""
    try:
        names = os.listdir(directory)
    except FileNotFoundError:
        raise ValueError(f"{directory} does not exist") from None
    except NotADirectoryError:
        raise ValueError(f"{directory} is not a directory; give the directory that holds the .wal files") from None
    except OSError as error:
        raise ValueError(f"cannot list {directory}: {error.strerror}") from None
    if not any(map(parse_name, names)):
        raise ValueError(f"{directory} holds no log (no segment file such as 0000000000000001-00000000.wal)")
    return names


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
        if requests := seen.requests:
            shown["requests"] = requests
        shown |= _preview(record.payload) if value is None else {"record": value}
        return json.dumps(shown)
    if value is None:
        ((form, text),) = _preview(record.payload).items()
        text = ("hex " if form == "hex" else "") + text + ("..." if size > PREVIEW_BYTES else "")
    else:
        text = _short(seen, options.request)
    return f"{record.lsn:>8}  {record.segment}  @{record.offset:<10} kind {record.kind:<3} {size:>7} B  {text}"


def _preview(payload: bytes) -> dict[str, str]:
    """The first bytes as `text` if they are printable UTF-8 (whole characters of it), else as `hex`."""
    head = payload[:PREVIEW_BYTES]
    try:
        text = codecs.getincrementaldecoder("utf-8")().decode(head, final=len(payload) <= PREVIEW_BYTES)
    except UnicodeDecodeError:
        return {"hex": head.hex()}
    return {"text": text} if text.isprintable() else {"hex": head.hex()}


def _short(seen: Seen, request: str | None) -> str:
    value = seen.value
    if isinstance(value, dict) and "token_ids" in value and seen.streams:
        return _sampled(seen, value, request)
    return _cut(json.dumps(value), TEXT_CHARS_MAX)


def _cut(text: str, chars_max: int) -> str:
    return text if len(text) <= chars_max else text[:chars_max] + "..."


def _sampled(seen: Seen, value: dict[str, Any], request: str | None) -> str:
    """Tokens of a chunk or a step as `request [index of the first] vVERSION: id(logprob) ...`, a few of each.

    A row whose request is not known is `slot N`.
    """
    if "slots" in value:
        slots, counts = value["slots"], value["counts"] or [1] * len(value["slots"])
        versions = [version for rows, version in value["version_runs"] for _ in range(rows)]
    else:
        slots, counts, versions = [None], [len(value["token_ids"])], [value["policy_version"]]
    rows, at = [], 0
    for stream, slot, count, version in zip(seen.streams, slots, counts, versions, strict=True):
        if request is None or (stream and stream.request == request):
            pairs = zip(value["token_ids"][at : at + count], value["logprobs"][at : at + count], strict=True)
            told = " ".join(f"{i}({p:.3f})" for i, p in list(pairs)[:TOKENS_SHOWN_MAX])
            more = f" ... {count} tokens" if count > TOKENS_SHOWN_MAX else ""
            name = f"slot {slot}"
            if stream:
                name = f"{_cut(json.dumps(stream.request)[1:-1], NAME_CHARS_MAX)} [{stream.length - count}]"
            rows.append(f"{name} v{version}: {told}{more}")
        at += count
    more = f"  ... {len(rows)} requests" if len(rows) > ROWS_SHOWN_MAX else ""
    return "  ".join(rows[:ROWS_SHOWN_MAX]) + more


def _print_summary(
    reader: Reader, summary: Summary, options: argparse.Namespace, failure: WalError | None, names: Sequence[str]
) -> None:
    told = summary.outcome(reader, failure)
    if options.stats:
        told |= summary.counts(reader, names)
    if options.json:
        _print(json.dumps(told))
        return
    _print(_verdict(reader, told))
    if not options.stats:
        return
    pins = ", ".join(f"{pin['name']} at {pin['lsn']}" for pin in told["pins"]) or "none"
    epochs = ", ".join(map(str, told["epochs"])) or "none"
    _print(f"begins at lsn {told['floor_lsn']}, epochs {epochs}, pins: {pins}")
    for kind, counts in told["kinds"].items():
        _print(f"kind {kind:>3}: {_count(counts['records'], 'record')}, {_count(counts['bytes'], 'byte')}")
    of = told["tokens"]
    if of["requests"] or of["tokens_unnamed"]:
        statuses = ", ".join(f"{of[status]} {status}" for status in ("open", "closed", "acknowledged"))
        unnamed = f", {of['tokens_unnamed']} of requests opened before the log begins" if of["tokens_unnamed"] else ""
        per_token = f", {of['bytes_per_token']} bytes a token" if of["bytes_per_token"] else ""
        _print(f"tokens: {of['tokens']} of {_count(of['requests'], 'request')} ({statuses}){unnamed}{per_token}")


def _verdict(reader: Reader, told: dict[str, Any]) -> str:
    """One line: good or bad, how far the log was read, how that ended, and what is bad."""
    bad = ""
    if "why" in told:
        place = f"{told['segment']} at offset {told['offset']}: " if told["segment"] else ""
        bad += f"; {place}{told['why']}"
    if told["problems"]:
        bad += f"; not as they should be: {_count(told['problems'], 'record')}, the first {told['problem']}"
    records, segments = _count(reader.records_count, "record"), _count(len(reader.segments), "segment")
    head = f"{'bad' if bad else 'ok'}: {records} in {segments}"
    return f"{head}, next lsn {reader.next_lsn}, ended by: {told['outcome']}{bad}"


if __name__ == "__main__":
    sys.exit(main())
