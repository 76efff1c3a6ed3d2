"""The real disk and the double behave the same; the real lock is held by a process."""

import os
from pathlib import Path

import pytest

from wal import LockedError, Log, OsStorage, Storage, StorageError
from wal.testing import CrashError, FaultyStorage


@pytest.fixture(params=["real", "double"])
def disk(request: pytest.FixtureRequest) -> Storage:
    return OsStorage() if request.param == "real" else FaultyStorage()


@pytest.fixture
def directory(disk: Storage, tmp_path: Path) -> Path:
    disk.make_directory(tmp_path / "a" / "b")
    return tmp_path / "a" / "b"


def test_a_directory_can_be_made_again(disk: Storage, directory: Path) -> None:
    disk.make_directory(directory)
    assert disk.names(directory) == []


def test_a_file_grows_at_its_end_and_is_cut_and_mended(disk: Storage, directory: Path) -> None:
    path = directory / "file"
    file = disk.create(path)
    assert file.write(b"hello") == 5
    file.close()
    file = disk.open(path)
    assert file.write(b" world!") == 7
    file.truncate(11)
    file.sync()
    file.close()
    file = disk.open(path, 0)
    assert file.write(b"J") == 1
    assert file.write(b"u") == 1
    file.close()
    file.close()
    assert disk.read(path) == b"Jullo world"
    disk.create(path).close()
    assert disk.read(path) == b""


def test_space_can_be_reserved_ahead_of_the_writes(disk: Storage, directory: Path) -> None:
    file = disk.create(directory / "file")
    file.allocate(10)
    file.write(b"abc")
    file.allocate(5)
    assert disk.read(directory / "file") == b"abc" + bytes(7)
    file.close()


def test_a_file_is_read_in_pieces(disk: Storage, directory: Path) -> None:
    path = directory / "file"
    file = disk.create(path)
    file.write(b"0123456789")
    file.close()
    piece = bytearray(4)
    assert disk.read_into(path, 3, memoryview(piece)) == 4
    assert piece == b"3456"
    assert disk.read_into(path, 8, memoryview(piece)) == 2
    assert piece == b"8956"
    assert disk.read_into(path, 10, memoryview(piece)) == 0


def test_a_lock_tells_when_its_file_was_removed(disk: Storage, directory: Path) -> None:
    path = directory / "1.lock"
    lock = disk.lock(path)
    assert lock.is_current()
    disk.remove(path)
    assert not lock.is_current()
    other = disk.lock(path)
    assert not lock.is_current()
    lock.close()
    with pytest.raises(BlockingIOError):
        disk.lock(path)
    other.close()


def test_names_are_sorted_and_follow_rename_and_remove(disk: Storage, directory: Path) -> None:
    for name in ("c", "a", "b"):
        disk.create(directory / name).close()
    disk.rename(directory / "a", directory / "d")
    disk.remove(directory / "b")
    disk.sync_directory(directory)
    assert disk.names(directory) == ["c", "d"]


def test_missing_files_and_directories_are_named(disk: Storage, directory: Path) -> None:
    for use in (disk.read, disk.open, disk.names):
        with pytest.raises(FileNotFoundError, match="none"):
            use(directory / "none")


def test_a_lock_is_exclusive_until_released(disk: Storage, directory: Path) -> None:
    lock = disk.lock(directory / "0.lock")
    with pytest.raises(BlockingIOError):
        disk.lock(directory / "0.lock")
    lock.close()
    disk.lock(directory / "0.lock").close()


def test_a_log_creates_its_directory_with_parents(tmp_path: Path) -> None:
    with Log.open(tmp_path / "x" / "y" / "z") as log:
        assert log.append(1, b"") == 1


def test_a_second_writer_on_a_real_disk_is_told_who_holds_the_directory(tmp_path: Path) -> None:
    with Log.open(tmp_path), pytest.raises(LockedError, match=rf"{tmp_path} is locked by process \d+"):
        Log.open(tmp_path)


def test_a_directory_that_is_a_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("")
    with pytest.raises(StorageError, match=f"cannot create {path}"):
        Log.open(path)


def test_a_machine_that_crashed_stays_down() -> None:
    disk = FaultyStorage({2: "crash"})
    disk.make_directory(Path("/d"))
    with pytest.raises(CrashError, match="crash at call 2"):
        disk.create(Path("/d/file"))
    with pytest.raises(CrashError, match="down"):
        disk.names(Path("/d"))


def test_the_double_loses_what_was_not_synced() -> None:
    disk = FaultyStorage()
    disk.make_directory(Path("/d"))
    file = disk.create(Path("/d/file"))
    file.write(b"synced ")
    file.sync()
    assert disk.restart("synced").names(Path("/d")) == []
    disk.sync_directory(Path("/d"))
    file.write(b"written")
    assert disk.restart("synced").read(Path("/d/file")) == b"synced "
    assert disk.restart("written").read(Path("/d/file")) == b"synced written"
    mixed = {disk.restart("mixed", seed).read(Path("/d/file")) for seed in range(50)}
    assert len(mixed) > 2
    assert [content for content in mixed if not content.startswith(b"synced ")] == []


def test_a_segment_that_is_a_pipe_is_an_error_and_no_wait(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "0000000000000001-00000000.wal")
    with pytest.raises(StorageError, match=r"cannot read .*0000000000000001-00000000\.wal: Illegal seek"):
        Log.open(tmp_path)
