"""A write-ahead log: ordered, checksummed, durable records in segment files.

`Log` appends, `GroupCommit` lets many asyncio callers share a sync, `read` gives the records back.
What a record means is up to its kind: `wal.tokens` defines kind 1, other packages define theirs.

See: docs/formats/wal.md.
"""

from wal.errors import (
    ClosedError,
    CorruptError,
    DroppedError,
    FencedError,
    FullError,
    LockedError,
    PoisonedError,
    RecordInvalidError,
    RecordTooLargeError,
    StorageError,
    StreamError,
    VersionError,
    WalError,
)
from wal.group_commit import GroupCommit, GroupStats, SyncPolicy, settled
from wal.log import Log, Recovery
from wal.reader import Outcome, Reader, Record, read
from wal.segments import Tear, is_log_file
from wal.storage import OsStorage, Storage

__all__ = [
    "ClosedError",
    "CorruptError",
    "DroppedError",
    "FencedError",
    "FullError",
    "GroupCommit",
    "GroupStats",
    "LockedError",
    "Log",
    "OsStorage",
    "Outcome",
    "PoisonedError",
    "Reader",
    "Record",
    "RecordInvalidError",
    "RecordTooLargeError",
    "Recovery",
    "Storage",
    "StorageError",
    "StreamError",
    "SyncPolicy",
    "Tear",
    "VersionError",
    "WalError",
    "is_log_file",
    "read",
    "settled",
]
