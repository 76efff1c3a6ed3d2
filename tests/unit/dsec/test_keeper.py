"""The keeper keeps descriptors whoever dies, and nothing for ever."""

import asyncio
import os
import signal
import socket
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from dsec.edge import keeper as keeper_module
from dsec.edge.config import NATIVE_BINARY
from dsec.edge.keeper import Keeper
from dsec.edge.native_wire import KEY_BYTES_MAX, PROTOCOL_VERSION, MessageType, encode_string, encode_u32
from dsec.errors import HostUnfitError


async def again(keeper: Keeper) -> Keeper:
    """What the next process sees."""
    await keeper.close()
    return await Keeper.open(NATIVE_BINARY, keeper._path, 600)


async def close_all(keeper: Keeper) -> None:
    for fd in keeper.kept.values():
        os.close(fd)
    await keeper.close()


async def ended(pidfd: int) -> None:
    loop, event = asyncio.get_running_loop(), asyncio.Event()
    loop.add_reader(pidfd, event.set)
    await event.wait()
    loop.remove_reader(pidfd)
    os.close(pidfd)


async def test_what_was_put_is_there_for_the_next_process(tmp_path: Path) -> None:
    keeper = await Keeper.open(NATIVE_BINARY, tmp_path / "keeper.sock", 600)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        await keeper.put("a/1", theirs.fileno())
        await keeper.put("b/2", theirs.fileno())
        await keeper.put("a/1", ours.fileno())  # replaces
        await keeper.drop("b/2")
        await keeper.drop("never there")
        pid = keeper.pid
        later = await again(keeper)
        assert later.pid == pid
        assert list(later.kept) == ["a/1"]
        with socket.socket(fileno=later.kept["a/1"]) as same:
            same.send(b"hello")
            assert theirs.recv(5) == b"hello"
            await later.drop("a/1")
    await later.close()  # it has nothing more to keep, and ends
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


async def test_a_peer_sees_no_end_while_a_socket_is_kept(tmp_path: Path) -> None:
    keeper = await Keeper.open(NATIVE_BINARY, tmp_path / "keeper.sock", 1)
    ours, theirs = socket.socketpair()
    theirs.setblocking(False)
    await keeper.put("key", ours.fileno())
    ours.close()
    with pytest.raises(BlockingIOError):
        theirs.recv(1)
    pidfd = os.pidfd_open(keeper.pid)
    await keeper.close()
    await ended(pidfd)  # nobody came within a second
    with theirs:
        assert theirs.recv(1) == b""


async def test_a_killed_keeper_is_replaced_and_given_everything_again(tmp_path: Path) -> None:
    keeper = await Keeper.open(NATIVE_BINARY, tmp_path / "keeper.sock", 600)
    read, write = os.pipe()
    await keeper.put("kept", read)
    await keeper.put("dropped", write)
    for _ in range(3):
        pid, pidfd = keeper.pid, os.pidfd_open(keeper.pid)
        os.kill(pid, signal.SIGKILL)
        await ended(pidfd)
        await keeper.drop("dropped")
        await keeper.put(f"while {pid} was dead", write)
        assert keeper.pid != pid
    later = await again(keeper)
    assert len(later.kept) == 4
    assert "dropped" not in later.kept
    os.write(write, b"x")
    assert os.read(later.kept["kept"], 1) == b"x"
    for key in list(later.kept):
        await later.drop(key)
    os.close(read)
    os.close(write)
    await close_all(later)


async def test_a_dead_keeper_is_noticed_without_being_asked(tmp_path: Path) -> None:
    keeper = await Keeper.open(NATIVE_BINARY, tmp_path / "keeper.sock", 600)
    read, write = os.pipe()
    await keeper.put("kept", read)
    pid = keeper.pid
    pidfd = os.pidfd_open(pid)
    os.kill(pid, signal.SIGKILL)
    await ended(pidfd)
    await asyncio.sleep(0)  # the event loop has seen it, too
    await asyncio.gather(*keeper._tasks)
    assert keeper.pid != pid
    later = await again(keeper)
    assert list(later.kept) == ["kept"]
    await later.drop("kept")
    os.close(read)
    os.close(write)
    await close_all(later)


async def test_thousands_are_kept(tmp_path: Path) -> None:
    keeper = await Keeper.open(NATIVE_BINARY, tmp_path / "keeper.sock", 600)
    file = os.memfd_create("file")
    for number in range(5000):
        await keeper.put(f"key/{number}", file)
    for number in range(0, 5000, 2):
        await keeper.drop(f"key/{number}")
    later = await again(keeper)
    assert sorted(later.kept) == sorted(f"key/{number}" for number in range(1, 5000, 2))
    await later.put("one more", file)
    assert len({token for token, _ in later._held.values()}) == 2501
    for key in list(later._held):
        await later.drop(key)
    os.close(file)
    await close_all(later)


async def test_several_are_put_and_released_at_once(tmp_path: Path) -> None:
    keeper = await Keeper.open(NATIVE_BINARY, tmp_path / "keeper.sock", 600)
    first, second = os.pipe(), os.pipe()
    await keeper.put_all({"first/read": first[0], "first/write": first[1], "second/write": second[1]})
    await keeper.put_all({"second/read": second[0]})
    keeper.release({"first/read": first[0], "first/write": first[1], "never put": os.dup(first[0])})
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(first[0])
    later = await again(keeper)
    assert sorted(later.kept) == ["second/read", "second/write"]
    os.close(second[1])
    os.write(later.kept["second/write"], b"x")
    assert os.read(second[0], 2) == b"x"
    later.release({"second/write": later.kept.pop("second/write")})
    assert os.read(second[0], 2) == b""  # nobody has the other end, the keeper neither
    later.release({"second/read": later.kept.pop("second/read")})
    os.close(second[0])
    await close_all(later)


async def test_what_is_released_stays_open_until_a_slow_keeper_was_told(tmp_path: Path) -> None:
    keeper = await Keeper.open(NATIVE_BINARY, tmp_path / "keeper.sock", 600)
    file = os.memfd_create("file")
    await keeper.put("released", released := os.dup(file))
    os.kill(keeper.pid, signal.SIGSTOP)
    behind = [asyncio.create_task(keeper.put(f"{number}", file)) for number in range(2000)]
    await asyncio.sleep(0)
    assert not behind[-1].done()
    keeper.release({"released": released})
    await asyncio.sleep(0)
    os.fstat(released)
    os.kill(keeper.pid, signal.SIGCONT)
    await asyncio.gather(*behind, *keeper._tasks)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(released)
    later = await again(keeper)
    assert len(later.kept) == 2000
    for key in list(later.kept):
        await later.drop(key)
    os.close(file)
    await close_all(later)


async def test_who_waits_for_a_keeper_that_is_killed_goes_on_with_the_next_one(tmp_path: Path) -> None:
    keeper = await Keeper.open(NATIVE_BINARY, tmp_path / "keeper.sock", 600)
    file = os.memfd_create("file")
    await keeper.put("released", released := os.dup(file))
    pid = keeper.pid
    os.kill(pid, signal.SIGSTOP)
    behind = [asyncio.create_task(keeper.put(f"{number}", file)) for number in range(1000)]
    await asyncio.sleep(0)
    assert not behind[-1].done()
    keeper.release({"released": released})
    os.kill(pid, signal.SIGKILL)
    async with asyncio.timeout(60):
        await asyncio.gather(*behind, *keeper._tasks)
    assert keeper.pid != pid
    later = await again(keeper)
    assert sorted(later.kept) == sorted(f"{number}" for number in range(1000))
    for key in list(later.kept):
        await later.drop(key)
    os.close(file)
    await close_all(later)


async def test_a_second_living_process_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keeper = await Keeper.open(NATIVE_BINARY, tmp_path / "keeper.sock", 600)
    monkeypatch.setattr(keeper_module, "ATTACH_TIMEOUT_S", 0.05)
    with pytest.raises(HostUnfitError, match="serves another process"):
        await Keeper.open(NATIVE_BINARY, tmp_path / "keeper.sock", 600)
    await keeper.close()


def serve_as(path: Path, *answers: bytes) -> threading.Thread:
    """A keeper that we are: it is asked once, and has one descriptor."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.bind(str(path))
    listener.listen()

    def serve() -> None:
        with listener, listener.accept()[0] as connection:
            connection.recv(100)
            socket.send_fds(connection, [encode_u32(MessageType.KEPT, 0) + encode_string("kept")], [0])
            for answer in answers:
                connection.send(answer)
            connection.recv(100)

    thread = threading.Thread(target=serve)
    thread.start()
    return thread


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        (encode_u32(MessageType.SYNCED), "its protocol is 0"),
        (encode_u32(MessageType.SYNCED, PROTOCOL_VERSION + 1), f"its protocol is {PROTOCOL_VERSION + 1}"),
        (b"\xff\xff\xff\xff", "do not understand"),
    ],
)
async def test_a_keeper_of_another_build_is_left_alone_and_named(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    descriptors: Callable[[], list[str]],
    answer: bytes,
    why: str,
) -> None:
    monkeypatch.setattr(keeper_module, "ATTACH_TIMEOUT_S", 0.05 if "understand" in why else 10)
    before = descriptors()
    path = tmp_path / "keeper.sock"
    stranger = serve_as(path, answer)
    with pytest.raises(HostUnfitError, match=rf"{why}.*kill {os.getpid()}"):
        await Keeper.open(NATIVE_BINARY, path, 600)
    stranger.join()
    assert path.exists()
    assert len(after := descriptors()) == len(before), (before, after)


def test_both_sides_know_one_version() -> None:
    header = NATIVE_BINARY.with_name("protocol.h").read_text()
    assert f"\n#define PROTOCOL_VERSION {PROTOCOL_VERSION}\n" in header


async def test_a_packet_without_sense_ends_the_connection_and_nothing_else(tmp_path: Path) -> None:
    keeper = await Keeper.open(NATIVE_BINARY, tmp_path / "keeper.sock", 600)
    read, write = os.pipe()
    await keeper.put("kept", read)
    pid = keeper.pid
    await keeper.close()
    put, drop, many, one = b"\x19\0\0\0", b"\x1a\0\0\0", b"\xff\xff\xff\xff", b"\1\0\0\0"
    packets = (b"", b"x", many, put, put + many, put + one + many + one + b"a\0", drop, drop + one + many, drop + many)
    for packet in packets:
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as hostile:
            hostile.connect(str(keeper._path))
            if packet:
                socket.send_fds(hostile, [packet], [write])
                assert hostile.recv(1) == b""
    later = await again(keeper)
    assert (later.pid, list(later.kept)) == (pid, ["kept"])
    with pytest.raises(ValueError, match="too long"):
        await later.put("x" * (KEY_BYTES_MAX + 1), write)
    await later.drop("kept")
    os.close(read)
    os.close(write)
    await close_all(later)


async def test_a_binary_that_is_not_there_makes_the_host_unfit(tmp_path: Path) -> None:
    with pytest.raises(HostUnfitError, match="cannot be started"):
        await Keeper.open(tmp_path / "missing", tmp_path / "keeper.sock", 600)
    (tmp_path / "file").touch()
    with pytest.raises(HostUnfitError):
        await Keeper.open(NATIVE_BINARY, tmp_path / "file" / "keeper.sock", 600)


async def test_a_deep_directory_is_no_hindrance(tmp_path: Path) -> None:
    deep = tmp_path.joinpath(*["directory"] * 30)
    deep.mkdir(parents=True)
    keeper = await Keeper.open(NATIVE_BINARY, deep / "keeper.sock", 600)
    await keeper.close()


async def test_who_reads_an_inherited_pipe_does_not_wait_for_the_keeper(tmp_path: Path) -> None:
    read, write = os.pipe()
    os.set_inheritable(write, True)
    keeper = await Keeper.open(NATIVE_BINARY, tmp_path / "keeper.sock", 600)
    os.close(write)
    assert os.read(read, 1) == b""
    os.close(read)
    await keeper.close()
