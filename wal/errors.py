"""Errors of the log: one root, few leaves, each naming the file, the reason and the way out.

The class says what policy needs (`code` never changes its meaning, `retryable`, `fault`); the
instance carries the facts of the one case as attributes.  An `OSError` never leaves this package:
it becomes a `StorageError`, so that a caller can tell the log's disk from any other.

See: docs/formats/wal.md, "Errors".
"""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import ClassVar, Literal

Fault = Literal["caller", "host", "peer", "storage"]


class WalError(Exception):
    """Root of every error that `wal` raises on purpose."""

    code: ClassVar[str] = "WAL"
    retryable: ClassVar[bool] = False
    fault: ClassVar[Fault] = "storage"


class CorruptError(WalError):
    """Bytes that were once durable are damaged or missing; nothing was changed on disk.

    `segment` is a file name, `offset` a byte offset in it, `why` one clause.
    """

    code = "WAL_CORRUPT"

    def __init__(self, directory: Path, segment: str, offset: int, why: str) -> None:
        super().__init__(
            f"{directory / segment} is corrupt at offset {offset}: {why}; nothing was changed. "
            f"Way out: restore this segment from a copy, or read what comes before it with "
            f"`python -m wal {directory}` and start a new log directory"
        )
        self.directory, self.segment, self.offset, self.why = directory, segment, offset, why


class VersionError(WalError):
    """A whole segment of a format version that this program does not read."""

    code = "WAL_VERSION"

    def __init__(self, path: Path, version: int, version_known: int) -> None:
        super().__init__(
            f"{path} has format version {version}, this program reads version {version_known}: use a newer program"
        )
        self.path, self.version = path, version


class LockedError(WalError):
    """Another writer holds the directory."""

    code = "WAL_LOCKED"
    retryable = True
    fault = "caller"

    def __init__(self, directory: Path, holder: str = "") -> None:
        by = f" by process {holder}" if holder else ""
        super().__init__(
            f"log directory {directory} is locked{by}: a log has one writer; stop it or use another directory"
        )
        self.directory, self.holder = directory, holder


class FencedError(WalError):
    """A writer of a higher epoch took over, or somebody removed this writer's lock file.

    Raised by an append that was not acknowledged: the log no longer belongs to this writer.
    """

    code = "WAL_FENCED"
    fault = "peer"

    def __init__(self, directory: Path, epoch: int, newest_epoch: int) -> None:
        super().__init__(
            f"log {directory} is no longer written by epoch {epoch} (the newest is {newest_epoch}): "
            "nothing more may be appended; stop this writer, or take over with a new, higher epoch"
        )
        self.directory, self.epoch, self.newest_epoch = directory, epoch, newest_epoch


class StorageError(WalError):
    """The operating system refused a call; `errno` and `path` say which.

    What was acknowledged before is still readable.  A log that met this while writing is poisoned.
    """

    code = "WAL_STORAGE"

    def __init__(self, path: Path, operation: str, errno_: int) -> None:
        name = errno.errorcode.get(errno_, str(errno_))
        way_out = "check the path" if errno_ in (errno.ENOENT, errno.ENOTDIR) else self.way_out
        super().__init__(f"cannot {operation} {path}: {os.strerror(errno_)} ({name}); {way_out}")
        self.path, self.operation, self.errno = path, operation, errno_

    way_out: ClassVar[str] = "acknowledged records are safe; mend the cause, then open the log again"


class FullError(StorageError):
    """The disk or the quota is full."""

    code = "WAL_FULL"
    retryable = True
    way_out = "acknowledged records are safe; free some space, then open the log again"


class PoisonedError(WalError):
    """An earlier write or sync failed, so what the file holds is not known: this log takes no more.

    `cause` is the first failure.  Retrying a failed fsync on the same file can report success for
    bytes that the kernel has already dropped; only a reopen, which reads back, is honest.
    """

    code = "WAL_POISONED"

    def __init__(self, directory: Path, cause: WalError) -> None:
        super().__init__(f"log {directory} is poisoned: {cause}")
        self.directory, self.cause = directory, cause


class ClosedError(WalError):
    """The log was closed by its owner and used afterwards."""

    code = "WAL_CLOSED"
    fault = "caller"

    def __init__(self, directory: Path) -> None:
        super().__init__(f"log {directory} is closed")
        self.directory = directory


class DroppedError(WalError):
    """Records below the floor were asked for: retention dropped them, before or during the call."""

    code = "WAL_DROPPED"
    fault = "caller"

    def __init__(self, directory: Path, lsn: int, floor_lsn: int) -> None:
        super().__init__(
            f"log {directory} was asked for records from lsn {lsn} on, and begins at lsn {floor_lsn}: retention "
            f"dropped the earlier ones; begin at lsn {floor_lsn} or later, and pin it to keep it while you read"
        )
        self.directory, self.lsn, self.floor_lsn = directory, lsn, floor_lsn


class RecordTooLargeError(WalError):
    """A payload above `record_bytes_max`; it was not appended and the log is as before."""

    code = "WAL_RECORD_TOO_LARGE"
    fault = "caller"

    def __init__(self, size_bytes: int, record_bytes_max: int) -> None:
        super().__init__(f"a record of {size_bytes} bytes is above the bound record_bytes_max = {record_bytes_max}")
        self.size_bytes, self.record_bytes_max = size_bytes, record_bytes_max


class RecordInvalidError(WalError):
    """A kind or a payload that its schema does not allow; the message names the field and the rule."""

    code = "WAL_RECORD_INVALID"
    fault = "caller"


class StreamError(WalError):
    """A token record that contradicts the records before it; everything before it was folded.

    `lsn` is the record's (0 if it was refused before it was written), `request` the stream's id or "" if the record
    names no known one, `why` one clause.
    """

    code = "WAL_STREAM"

    def __init__(self, lsn: int, request: str, why: str) -> None:
        where = f"the token record of lsn {lsn}" if lsn else "a token record"
        whose = f" of request {request!r}" if request else ""
        super().__init__(f"{where} contradicts the stream{whose}: {why}")
        self.lsn, self.request, self.why = lsn, request, why


def storage_error(path: Path, operation: str, error: OSError) -> StorageError:
    """The typed form of an OSError."""
    number = error.errno or errno.EIO
    kind = FullError if number in (errno.ENOSPC, errno.EDQUOT) else StorageError
    return kind(path, operation, number)
