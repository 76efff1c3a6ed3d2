"""`dsec cp` out of a hostile sandbox: the links it sent before, the special files it meets, the bytes it sends."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Any

import pytest

PLANT = "mkdir -p /w && cd /w && ln -s {0}/victim report.txt && ln -s {0}/vdir sub && echo evil > plain"
SWAP = "cd /w && rm report.txt sub && echo evil > report.txt && chmod 751 report.txt && mkdir sub && echo evil > sub/in"


@pytest.fixture
def copied(edge: Any, sandbox: str, tmp_path: Path) -> Path:
    """A copy that brought links to what is the host's; inside, files and directories have since taken their names."""
    (tmp_path / "vdir").mkdir()
    (tmp_path / "victim").write_text("mine")
    edge.done("exec", sandbox, "--", "sh", "-c", PLANT.format(tmp_path))
    edge.done("cp", f"{sandbox}:/w", tmp_path / "copy")
    edge.done("exec", sandbox, "--", "sh", "-c", SWAP)
    assert (tmp_path / "copy" / "report.txt").is_symlink()
    return tmp_path / "copy"


def is_untouched(directory: Path) -> bool:
    return (directory / "victim").read_text() == "mine" and not list((directory / "vdir").iterdir())


@pytest.mark.parametrize("target", ["", "report.txt"])
def test_a_file_replaces_a_link_that_an_earlier_copy_brought(
    edge: Any, sandbox: str, copied: Path, target: str
) -> None:
    edge.done("cp", f"{sandbox}:/w/report.txt", f"{copied}/{target}")
    assert is_untouched(copied.parent)
    status = (copied / "report.txt").lstat()
    assert stat.S_ISREG(status.st_mode)
    assert stat.S_IMODE(status.st_mode) == 0o751
    assert (copied / "report.txt").read_text() == "evil\n"
    assert sorted(os.listdir(copied)) == ["plain", "report.txt", "sub"]  # and nothing temporary


@pytest.mark.parametrize("target", ["", "sub"])
def test_a_tree_does_not_pass_through_a_link_that_an_earlier_copy_brought(
    edge: Any, sandbox: str, copied: Path, target: str
) -> None:
    ran = edge("cp", f"{sandbox}:/w/sub", copied / target)
    assert ran.code == 2
    assert ("is a link to a directory" if target else "Not a directory") in ran.err
    assert is_untouched(copied.parent)


def test_a_file_does_not_go_into_what_a_link_calls_a_directory(edge: Any, sandbox: str, copied: Path) -> None:
    ran = edge("cp", f"{sandbox}:/w/report.txt", copied / "sub")
    assert (ran.code, is_untouched(copied.parent)) == (2, True)
    edge.done("cp", f"{sandbox}:/w/report.txt", f"{copied}/sub/")  # the user's word that it is one
    assert (copied.parent / "vdir" / "report.txt").read_text() == "evil\n"


def test_a_directory_that_is_there_is_copied_into_and_files_are_replaced(
    edge: Any, sandbox: str, copied: Path, tmp_path: Path
) -> None:
    (tmp_path / "old").write_text("old")
    (tmp_path / "same").hardlink_to(tmp_path / "old")
    edge.done("cp", f"{sandbox}:/w/plain", tmp_path / "old")
    assert ((tmp_path / "old").read_text(), (tmp_path / "same").read_text()) == ("evil\n", "old")
    for target in ("", ".", "./", "new"):
        (tmp_path / f"in{target}").mkdir(exist_ok=True)
        cwd = tmp_path / f"in{target}"
        edge.done("cp", f"{sandbox}:/w/sub", target, cwd=cwd)
        edge.done("cp", f"{sandbox}:/w/plain", target, cwd=cwd)
        below = cwd / target if target == "new" else cwd
        inner = below / "in" if target == "new" else below / "sub" / "in"
        assert (inner.read_text(), (below / "plain").read_text()) == ("evil\n", "evil\n")
    assert is_untouched(copied.parent)


def test_devices_fifos_and_our_own_streams_are_not_replaced(
    edge: Any, sandbox: str, copied: Path, tmp_path: Path
) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "stdout").symlink_to("/proc/self/fd/1")  # as /dev/stdout
    os.mknod(tmp_path / "null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
    before = {name: (tmp_path / name).lstat() for name in ("fifo", "stdout", "null")}
    for name, status in before.items():
        ran = edge("cp", f"{sandbox}:/w/plain", tmp_path / name)
        assert (ran.code, ran.out) == (2, "")
        assert "neither a file nor a link that may be replaced" in ran.err
        after = (tmp_path / name).lstat()
        assert (after.st_ino, after.st_mode) == (status.st_ino, status.st_mode)
    assert is_untouched(copied.parent)


def test_a_sandbox_cannot_send_more_than_the_bound(edge: Any, sandbox: str, copied: Path, tmp_path: Path) -> None:
    edge.done("exec", sandbox, "--", "sh", "-c", "mkdir /big && truncate -s 900G /big/hole")
    (tmp_path / "into").mkdir()
    for path in ("/big", "/big/hole"):
        ran = edge("cp", f"{sandbox}:{path}", tmp_path / "into", "--bytes-max", 3_000_000)
        assert ran.code != 0
        assert "more than 3000000 bytes" in ran.err
        assert "Traceback" not in ran.err, ran.err
    assert os.listdir(tmp_path / "into") == ["big"]  # of the file, nothing stays
    edge.done("cp", f"{sandbox}:/w/plain", tmp_path / "exact", "--bytes-max", 5)
    assert edge("cp", f"{sandbox}:/w/plain", tmp_path / "over", "--bytes-max", 4).code != 0
    assert not (tmp_path / "over").exists()
    assert "68719476736" in edge.done("cp", "--help")
    assert is_untouched(copied.parent)


def test_a_file_that_does_not_fit_says_so_and_leaves_nothing(edge: Any, tmp_path: Path) -> None:
    sandbox = edge.done("create", "--memory-mib", 64, "--disk-mib", 1).strip()
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree" / "big").write_bytes(bytes(3 << 20))
    ran = edge("cp", tmp_path / "tree" / "big", f"{sandbox}:/root/")
    assert (ran.code, ran.err) == (3, "dsec: '/root/big': No space left on device\n")
    assert edge.done("exec", sandbox, "ls", "/root") == ""
    ran = edge("cp", tmp_path / "tree", f"{sandbox}:/root/t")
    assert ran.code == 3
    assert "; tar: Exiting with failure" in ran.err
    assert "\\n" not in ran.err
    edge.done("rm", sandbox)
