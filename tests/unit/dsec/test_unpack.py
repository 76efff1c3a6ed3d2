"""Files of a sandbox as they arrive on this machine."""

import io
import os
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from dsec.client.unpack import LEFT_OUT_NAMES_MAX, replace_file, unpack
from dsec.errors import InvalidArgumentError, ResourceExhaustedError


@pytest.fixture
def parent(tmp_path: Path) -> Iterator[int]:
    fd = os.open(tmp_path, os.O_PATH | os.O_DIRECTORY)
    yield fd
    os.close(fd)


def test_a_file_has_no_name_before_it_is_whole_so_a_kill_leaves_nothing(parent: int, tmp_path: Path) -> None:
    seen = []

    def pieces() -> Iterator[bytes]:
        yield b"new "
        seen.append(sorted(os.listdir(tmp_path)))
        yield b"content"

    (tmp_path / "file").write_bytes(b"old")
    replace_file(parent, b"file", 0o640, pieces())
    assert seen == [["file"]]
    assert (tmp_path / "file").read_bytes() == b"new content"
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o640
    assert os.listdir(tmp_path) == ["file"]


def test_a_file_that_does_not_arrive_whole_leaves_the_old_one_alone(parent: int, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"old")
    with pytest.raises(ResourceExhaustedError):
        replace_file(parent, b"file", 0o640, [b"x" * 11], bytes_max=10)
    (tmp_path / "directory").mkdir()
    with pytest.raises(InvalidArgumentError):
        replace_file(parent, b"directory", 0o640, [b"x"])
    assert (tmp_path / "file").read_bytes() == b"old"
    assert sorted(os.listdir(tmp_path)) == ["directory", "file"]


def test_what_is_left_out_is_counted_and_named_up_to_a_bound(tmp_path: Path) -> None:
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w") as tar:
        for index in range(count := LEFT_OUT_NAMES_MAX + 5):
            member = tarfile.TarInfo(f"fifo{index}")
            member.type = tarfile.FIFOTYPE
            tar.addfile(member)
    left_out = unpack([archive.getvalue()], tmp_path)
    assert left_out.count == count
    assert left_out.names == [f"fifo{index}" for index in range(LEFT_OUT_NAMES_MAX)]
    assert os.listdir(tmp_path) == []
