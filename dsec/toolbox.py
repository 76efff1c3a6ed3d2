"""What the toolbox of a sandbox answers (dsec/native/toolbox.h): entries, events, and why an operation failed.

All of it was written inside: it is parsed without trust, and quoted.
"""

from __future__ import annotations

import errno
import os
import re
from typing import Literal

import msgspec

from dsec.errors import (
    DsecError,
    InvalidArgumentError,
    NotFoundError,
    OutcomeUnknownError,
    ResourceExhaustedError,
    StateError,
)
from dsec.terminal import visible_line
from dsec.types import ExecResult

_MISSING = {errno.ENOENT, errno.ENOTDIR}
_EXHAUSTED = {errno.ENOSPC, errno.EDQUOT, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EAGAIN}
_SAID = re.compile(rb"(\d{1,3}) (.*)", re.DOTALL)
_FULL = re.compile(rb"No space left|Wrote only \d")  # as tar says it, the second where a part still fitted
_FIELDS_COUNT = 8

EntryKind = Literal["file", "directory", "link", "fifo", "socket", "block", "character"]
EventKind = Literal["ready", "created", "written", "changed", "removed", "moved_from", "moved_to", "lost"]
_ENTRY_KINDS: dict[bytes, EntryKind] = {
    b"f": "file", b"d": "directory", b"l": "link", b"p": "fifo", b"s": "socket", b"b": "block", b"c": "character",
}  # fmt: skip
_EVENT_KINDS: dict[bytes, EventKind] = {
    b"!": "ready", b"c": "created", b"w": "written", b"a": "changed", b"r": "removed", b"f": "moved_from",
    b"t": "moved_to", b"o": "lost",
}  # fmt: skip


class Entry(msgspec.Struct, frozen=True, kw_only=True):
    """A file, directory or other thing: `path` below what was listed, `target` of a link, links not followed.

    Names are bytes inside; those that are not UTF-8 are decoded as `os.fsdecode` does.
    """

    path: str
    kind: EntryKind
    mode: int
    size_bytes: int
    changed_at_s: float
    uid: int
    gid: int
    target: str = ""


class Event(msgspec.Struct, frozen=True):
    """Something that happened to a path; `ready` comes first, `lost` says that more happened than was seen."""

    kind: EventKind
    path: str


def parse_event(kind: bytes, path: bytes) -> Event:
    """An event from its two fields; one of a kind that is not known is a loss."""
    return Event(_EVENT_KINDS.get(kind, "lost"), os.fsdecode(path))


def parse_entries(path: str, data: bytes) -> list[Entry]:
    """Entries from their records.  StateError if they make no sense."""
    fields = data.split(b"\0")[:-1]
    try:
        return [_entry(*fields[at : at + _FIELDS_COUNT]) for at in range(0, len(fields), _FIELDS_COUNT)]
    except (TypeError, ValueError, KeyError) as error:
        raise StateError(f"the sandbox's answer about {path!r} makes no sense: {error}") from error


def _entry(
    path: bytes, kind: bytes, mode: bytes, size: bytes, changed: bytes, uid: bytes, gid: bytes, target: bytes
) -> Entry:
    return Entry(
        path=os.fsdecode(path),
        kind=_ENTRY_KINDS[kind],
        mode=int(mode, 8),
        size_bytes=int(size),
        changed_at_s=float(changed),
        uid=int(uid),
        gid=int(gid),
        target=os.fsdecode(target),
    )


def require_success(path: str, result: ExecResult) -> ExecResult:
    """The result of an operation that did what it was asked for; else the error that says why not."""
    if result.exit_code != 0 or result.timed_out:
        raise _failure(path, result)
    return result


def _failure(path: str, result: ExecResult) -> DsecError:
    """What a failed operation means; what it says was written inside, and is quoted."""
    said = result.stderr.data[-1000:]
    found = _SAID.fullmatch(said)
    number = int(found[1]) if found else 0
    text = (found[2] if found else said).decode(errors="replace").strip().removesuffix(f": {path}")
    why = f"{path!r}: {'; '.join(map(visible_line, text.splitlines()))}"
    if result.timed_out:
        return OutcomeUnknownError(f"{path!r}: not done within its time")
    if number in _MISSING or (result.exit_code == 127 and found is None):
        return NotFoundError(why)
    if number in _EXHAUSTED or result.oom_killed or result.exit_code == 126 or _FULL.search(said):
        return ResourceExhaustedError(f"{path!r}: out of the sandbox's memory" if result.oom_killed else why)
    if result.exit_code in (137, 143):
        return StateError(f"{path!r}: the operation was killed inside the sandbox")
    return InvalidArgumentError(why if found else f"{why} (exit code {result.exit_code})")
