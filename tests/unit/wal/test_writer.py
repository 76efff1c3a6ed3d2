"""The errors of the writing side that no planned fault of the double reaches."""

import errno
from pathlib import Path

import pytest

from wal import Log, StorageError
from wal.storage import File
from wal.testing import FaultyStorage
from wal.writer import SegmentWriter, write_all

DIRECTORY = Path("/log")


def test_a_write_that_takes_nothing_is_an_error_and_no_endless_loop() -> None:
    taken: list[bytes] = []

    def write(data: bytes) -> int:
        taken.append(data)
        return 3 if len(taken) == 1 else 0

    with pytest.raises(OSError, match="took no bytes") as failure:
        write_all(write, b"abcdef")
    assert failure.value.errno == errno.EIO
    assert taken == [b"abcdef", b"def"]


def test_a_segment_that_cannot_be_opened_is_named() -> None:
    with pytest.raises(StorageError, match=r"cannot open /log/none\.wal: No such file"):
        SegmentWriter.resume(FaultyStorage(), DIRECTORY / "none.wal", 48)


def test_a_leftover_that_cannot_be_removed_is_told() -> None:
    disk = FaultyStorage()
    Log.open(DIRECTORY, storage=disk).close()
    file: File = disk.create(DIRECTORY / "0000000000000002-00000000.wal.tmp")
    file.close()
    disk.faults[len(disk.calls) + 2] = "EIO"
    with pytest.raises(StorageError, match="cannot clean /log"):
        Log.open(DIRECTORY, storage=disk)
