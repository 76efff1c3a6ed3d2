"""A log on a disk in memory, and the retention that its owner keeps of it."""

from pathlib import Path

import pytest

from wal import Log, Reader
from wal.retention import Retention, RetentionPolicy, RetentionReport
from wal.testing import FaultyStorage, TextRequests

DIRECTORY = Path("/log")


class Owner:
    """A log whose every record gets a segment of its own, and its retention."""

    def __init__(self, policy: RetentionPolicy | None = None, disk: FaultyStorage | None = None) -> None:
        self.disk = disk or FaultyStorage()
        self.log = Log.open(DIRECTORY, storage=self.disk, segment_bytes_max=1)
        self.requests = TextRequests()
        self.retention = Retention(DIRECTORY, self.requests, policy, storage=self.disk, clock=lambda: self.disk.now_s)
        for record in Reader(DIRECTORY, storage=self.disk):
            self.retention.add(record)

    def write(self, *texts: str) -> None:
        """Append, make durable, and tell the retention."""
        before = self.log.next_lsn - 1
        for text in texts:
            self.log.append(9, text.encode())
        self.log.sync()
        for record in Reader(DIRECTORY, after_lsn=before, storage=self.disk):
            self.retention.add(record)

    def run_pass(self) -> RetentionReport:
        return self.retention.run_pass()

    def lsns(self) -> list[int]:
        return [record.lsn for record in Reader(DIRECTORY, storage=self.disk)]

    def files(self, suffix: str) -> list[str]:
        return [name for name in self.disk.names(DIRECTORY) if name.endswith(suffix)]


@pytest.fixture
def owning() -> type[Owner]:
    """Makes owners: `owning(policy=None, disk=None)`."""
    return Owner
