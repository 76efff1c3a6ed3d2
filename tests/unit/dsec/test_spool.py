"""Output on disk, against a model that keeps everything; what a full disk, a limit and a new process leave of it."""

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsec.edge.capture import READ_BYTES_MAX, OutputBuffer, PipeReader
from dsec.edge.spool import Spool, SpooledOutput, sweep
from dsec.errors import OutOfRangeError
from dsec.types import Output

SCRATCH = memoryview(bytearray(READ_BYTES_MAX))


def drain(output: SpooledOutput, data: bytes) -> None:
    ours, theirs = os.pipe()
    os.write(theirs, data)
    os.close(theirs)
    while output.drain(ours, SCRATCH):
        pass
    os.close(ours)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("spool")


@given(
    st.lists(st.binary(min_size=1, max_size=40), max_size=12),
    st.integers(0, 64),
    st.integers(0, 100),
    st.lists(st.booleans(), min_size=12, max_size=12),
)
def test_it_gives_what_a_buffer_in_memory_gives_and_keeps_more(
    directory: Path, chunks: list[bytes], bytes_max: int, file_bytes_max: int, spliced: list[bool]
) -> None:
    path = str(directory / "1.out")
    Path(path).unlink(missing_ok=True)
    output, model, whole = SpooledOutput(path, bytes_max, file_bytes_max), OutputBuffer(bytes_max), b"".join(chunks)
    for chunk, by_pipe in zip(chunks, spliced, strict=False):
        drain(output, chunk) if by_pipe else output.add(memoryview(chunk))
        model.add(chunk)
    output.close()
    got, wanted = output.output(), model.output()
    assert got.total_bytes == len(whole)
    if file_bytes_max >= bytes_max:
        assert got == wanted
    else:  # a smaller file than the bound: less is kept, nothing is wrong
        assert whole.startswith(got.head)
        assert whole.endswith(got.tail)
    for offset in range(len(whole) + 2):
        try:
            assert output.read(offset, 7) == whole[offset : offset + 7][: max(0, file_bytes_max - offset) or 7]
        except OutOfRangeError:
            assert offset >= file_bytes_max


def test_a_command_that_says_nothing_costs_no_file(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "box", 100, 1000)
    output = spool.open(1, "stdout", 100)
    drain(output, b"")
    spool.end(1, "stdout", output.disk_bytes)
    assert output.output() == Output()
    assert output.read(0, 9) == b""
    assert not (tmp_path / "box").exists()


def test_the_next_process_goes_on_where_the_file_ends(tmp_path: Path) -> None:
    first = Spool(tmp_path / "box", 1000, 10_000).open(7, "stderr", 100)
    drain(first, b"before ")
    first.close()
    second = Spool(tmp_path / "box", 1000, 10_000).open(7, "stderr", 100)
    drain(second, b"after")
    second.close()
    assert second.output() == Output(head=b"before after")


def test_a_full_disk_is_drained_all_the_same(tmp_path: Path) -> None:
    full = SpooledOutput("/dev/full", 10, 1 << 20)
    drain(full, b"0123456789" * 10)
    full.add(memoryview(b"end"))
    full.close()
    assert full.output() == Output(tail=b"89end", dropped_bytes=98)


def test_old_outputs_make_room_for_new_ones(tmp_path: Path) -> None:
    spool = Spool(tmp_path, 1 << 20, 20_000)
    outputs = [spool.open(number, "stdout", 100) for number in range(1, 5)]
    for number, output in enumerate(outputs, 1):
        drain(output, bytes(5000))
        output.close()
        spool.end(number, "stdout", output.disk_bytes)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["3.out", "4.out"]
    with pytest.raises(OutOfRangeError, match="made room"):
        outputs[0].read(0, 1)
    again = Spool(tmp_path, 1 << 20, 20_000)
    last = again.open(9, "stdout", 100)
    drain(last, bytes(5000))
    last.close()
    again.end(9, "stdout", 5000)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["4.out", "9.out"]
    again.remove()
    assert not tmp_path.exists()


def test_the_output_of_sandboxes_that_are_gone_is_swept(tmp_path: Path) -> None:
    for name in ("dead", "alive"):
        output = Spool(tmp_path / name, 100, 1000).open(1, "stdout", 100)
        drain(output, b"x")
        output.close()
    sweep(tmp_path, {"alive"})
    sweep(tmp_path / "nowhere", set())
    assert [path.name for path in tmp_path.iterdir()] == ["alive"]


async def test_a_pipe_is_spliced_into_its_file_while_the_loop_runs(tmp_path: Path) -> None:
    ours, theirs = os.pipe()
    output = SpooledOutput(str(tmp_path / "1.out"), 100, 1 << 20)
    reader = PipeReader(ours, output, bytearray(READ_BYTES_MAX))
    os.write(theirs, b"first")
    assert await reader.read(0, 100) == b"first"
    assert (tmp_path / "1.out").read_bytes() == b"first"
    os.write(theirs, b" second")
    assert await reader.read(5, 100) == b" second"
    os.write(theirs, b" late")
    assert reader.finish() == Output(head=b"first second late")
    assert await reader.read(17, 100) == b""
    os.close(theirs)
