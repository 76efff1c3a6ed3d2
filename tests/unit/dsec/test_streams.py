"""What earlier processes left of a command's streams, and which of it counts."""

import os
from collections.abc import Mapping

import pytest

from dsec.edge.substrates.streams import Keeping, Streams
from dsec.types import Command, SandboxId

MERGED = Command(argv=("x",), merge_stderr=True)


class MemoryKeeper:
    """Keeps names; `kept` is what a next process would be given."""

    def __init__(self) -> None:
        self.kept: dict[str, int] = {}

    async def put_all(self, files: Mapping[str, int]) -> None:
        self.kept |= files

    def release(self, files: Mapping[str, int]) -> None:
        for key, fd in files.items():
            self.kept.pop(key, None)
            os.close(fd)

    def reserve(self) -> None:
        raise AssertionError("no terminals here")

    def give_back(self) -> None:
        raise AssertionError("no terminals here")


def full_pipe(data: bytes) -> int:
    reader, writer = os.pipe()
    os.write(writer, data)
    os.close(writer)
    return reader


def left(keeper: MemoryKeeper, **put: bytes) -> Keeping:
    """What stdout held of command 7 that was put at these times, in the order in which a keeper tells of it."""
    files = {f"7/stdout/{put_ms.removeprefix('at')}": full_pipe(data) for put_ms, data in put.items()}
    keeper.kept |= {f"exec/box/{key}": fd for key, fd in files.items()}
    keeping = Keeping(SandboxId("box"), bytearray(1 << 16), keeper)
    keeping.adopt(files)
    return keeping


@pytest.mark.parametrize("order", [("at100", "at200"), ("at200", "at100")])
async def test_of_two_that_were_put_for_one_command_the_newer_is_read(order: tuple[str, str]) -> None:
    keeper, content = MemoryKeeper(), {"at100": b"", "at200": b"the output"}
    streams = Streams(7, MERGED, left(keeper, **{at: content[at] for at in order}))
    assert list(keeper.kept) == ["exec/box/7/stdout/200"]
    streams.resume()
    assert streams.finish()[0].data == b"the output"
    streams.close()
    assert keeper.kept == {}


async def test_a_start_drops_what_was_put_for_one_that_never_came() -> None:
    keeper = MemoryKeeper()
    keeping = left(keeper, at100=b"")
    streams = Streams(7, MERGED, keeping)
    await streams.open()
    assert len(keeper.kept) == 1
    assert "exec/box/7/stdout/100" not in keeper.kept
    assert keeping.left_since(7, "stdout") is None
    streams.close()
    assert keeper.kept == {}
