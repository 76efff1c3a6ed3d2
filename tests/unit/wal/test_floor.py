"""Where a log begins, and what it means that files before or behind that place are missing."""

import errno
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from wal import CorruptError, StorageError
from wal.floor import floor_of, read_error
from wal.testing import FaultyStorage

DIRECTORY = Path("/log")


def test_segments_below_the_floor_are_not_part_of_the_log_even_if_their_files_are(owning: Callable[..., Any]) -> None:
    owner = owning()
    owner.write("note", "note", "note")
    owner.disk.create(DIRECTORY / "0000000000000003.floor").close()
    assert owner.lsns() == [3]
    assert owner.run_pass().dropped == ("0000000000000001-00000000.wal", "0000000000000002-00000000.wal")


def test_a_log_without_a_floor_must_start_at_lsn_one(owning: Callable[..., Any]) -> None:
    owner = owning()
    owner.write("note", "note")
    owner.disk.remove(DIRECTORY / "0000000000000001-00000000.wal")
    with pytest.raises(CorruptError, match="starts at lsn 2: earlier segments are missing"):
        owner.lsns()


def test_a_floor_above_which_a_segment_is_missing_is_corruption(owning: Callable[..., Any]) -> None:
    owner = owning()
    owner.write("note", "note", "note")
    owner.disk.create(DIRECTORY / "0000000000000002.floor").close()
    owner.disk.remove(DIRECTORY / "0000000000000002-00000000.wal")
    with pytest.raises(CorruptError, match="starts at lsn 3 and the floor is 2: earlier segments are missing"):
        owner.lsns()
    with pytest.raises(CorruptError):
        owner.run_pass()
    assert "0000000000000001-00000000.wal" in owner.files(".wal"), "nothing was changed"


def test_a_floor_without_any_segment_is_corruption(owning: Callable[..., Any]) -> None:
    owner = owning()
    owner.write("note", "note")
    owner.disk.create(DIRECTORY / "0000000000000009.floor").close()
    with pytest.raises(CorruptError, match=r"0000000000000009\.floor is corrupt.*no segment starts there or later"):
        owner.lsns()


def test_the_highest_floor_wins() -> None:
    assert floor_of([]) == 1
    assert floor_of(["0000000000000003.floor", "000000000000000a.floor", "b.floor", "x"]) == 10


class TornListing(FaultyStorage):
    """The first listing was overtaken by a pass: it shows neither the floor nor what it dropped."""

    stale: list[str] | None = None

    def names(self, directory: Path) -> list[str]:
        names, self.stale = self.stale or super().names(directory), None
        return names


def test_a_listing_that_a_pass_overtook_is_made_again(owning: Callable[..., Any]) -> None:
    disk = TornListing()
    owner = owning(disk=disk)
    owner.write("note", "note", "note")
    owner.run_pass()
    disk.stale = owner.files(".wal")
    assert owner.lsns() == [3]


class Unreadable(FaultyStorage):
    """Reads fail with `failure`."""

    failure: OSError | None = None

    def read_into(self, path: Path, offset: int, buffer: memoryview) -> int:
        if self.failure:
            raise self.failure
        return super().read_into(path, offset, buffer)


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOENT])
def test_a_segment_that_cannot_be_read_and_was_not_dropped_is_a_storage_error(
    owning: Callable[..., Any], number: int
) -> None:
    disk = Unreadable()
    owner = owning(disk=disk)
    owner.write("note", "note")
    disk.failure = OSError(number, "no")
    with pytest.raises(StorageError, match=f"cannot read .*{errno.errorcode[number]}"):
        owner.lsns()


def test_a_segment_that_vanished_with_its_directory_is_a_storage_error() -> None:
    error = read_error(FaultyStorage(), DIRECTORY / "0000000000000001-00000000.wal", 1, FileNotFoundError(2, "no"))
    assert isinstance(error, StorageError)
