"""The output contract, against a model that keeps everything."""

import asyncio
import os

from hypothesis import given
from hypothesis import strategies as st

from dsec.edge.capture import READ_BYTES_MAX, OutputBuffer, PipeReader, PipeWriter
from dsec.types import Output


@given(st.lists(st.binary(max_size=40), max_size=20), st.integers(0, 64))
def test_head_and_tail_are_the_ends_of_what_was_written(chunks: list[bytes], bytes_max: int) -> None:
    buffer = OutputBuffer(bytes_max)
    for chunk in chunks:
        buffer.add(memoryview(chunk))
    whole = b"".join(chunks)
    if len(whole) <= bytes_max:
        assert buffer.output() == Output(head=whole)
    else:
        tail_bytes = bytes_max // 2
        head_bytes = bytes_max - tail_bytes
        expected = Output(
            head=whole[:head_bytes],
            tail=whole[len(whole) - tail_bytes :],
            dropped_bytes=len(whole) - bytes_max,
        )
        assert buffer.output() == expected


async def until_closed(end: PipeReader | PipeWriter) -> None:
    async with asyncio.timeout(60):
        while end.is_open:
            await turn()


async def turn() -> None:
    await asyncio.sleep(0)


async def test_what_lies_in_the_pipe_is_taken_even_if_a_writer_still_holds_it() -> None:
    ours, theirs = os.pipe()
    reader = PipeReader(ours, OutputBuffer(100), bytearray(READ_BYTES_MAX))
    os.write(theirs, b"late")
    assert reader.finish() == Output(head=b"late")
    os.close(theirs)


async def test_a_writer_ends_when_nobody_reads_any_more() -> None:
    theirs, ours = os.pipe()
    writer = PipeWriter(ours, bytes(1 << 20))
    os.close(theirs)
    await until_closed(writer)


async def test_a_writer_feeds_more_than_a_pipe_holds_while_the_loop_runs() -> None:
    data = os.urandom(3 << 20)
    theirs, ours = os.pipe()
    PipeWriter(ours, data)
    buffer = OutputBuffer(len(data))
    reader = PipeReader(theirs, buffer, bytearray(READ_BYTES_MAX))
    await until_closed(reader)
    assert buffer.output().data == data
