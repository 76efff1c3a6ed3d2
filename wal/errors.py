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


class StorageError(WalError):
    """The operating system refused a call; `errno` and `path` say which.

    What was acknowledged before is still readable.  A log that met this while writing is poisoned.
    """

    code = "WAL_STORAGE"

    def __init__(self, path: Path, operation: str, errno_: int) -> None:
        name = errno.errorcode.get(errno_, str(errno_))
        super().__init__(f"cannot {operation} {path}: {os.strerror(errno_)} ({name}); {self.way_out}")
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


def storage_error(path: Path, operation: str, error: OSError) -> StorageError:
    """The typed form of an OSError."""
    number = error.errno or errno.EIO
    kind = FullError if number in (errno.ENOSPC, errno.EDQUOT) else StorageError
    return kind(path, operation, number)
