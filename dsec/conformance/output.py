"""Checks of output: bytes, apart or merged, bounded, counted, and never in another command's way."""

# ruff: noqa: D103, S311  (a check is described by its name; test data)

from __future__ import annotations

import asyncio
import hashlib
import random
import time

from dsec.conformance.check import Check, check, fresh, require, script, shell
from dsec.errors import OutOfRangeError
from dsec.sandbox import Process, Substrate
from dsec.types import Stream


@check()
async def stdout_and_stderr_come_apart(substrate: Substrate) -> None:
    async with fresh(substrate) as sandbox:
        result = await shell(sandbox, "echo out; echo err >&2; exit 3")
        require((result.stdout.data, result.stderr.data, result.exit_code) == (b"out\n", b"err\n", 3), result)


@check()
async def merged_output_keeps_its_order(substrate: Substrate) -> None:
    async with fresh(substrate) as sandbox:
        both = "for i in 1 2 3 4 5; do echo o$i; echo e$i >&2; done"
        result = await shell(sandbox, both, merge_stderr=True)
        expected = b"".join(b"o%d\ne%d\n" % (i, i) for i in range(1, 6))
        require(result.stdout.data == expected and result.stderr.data == b"", result)


@check()
async def binary_output_is_exact(substrate: Substrate) -> None:
    program = "import random,sys;sys.stdout.buffer.write(random.Random(7).randbytes(5*1024*1024))"
    async with fresh(substrate) as sandbox:
        result = await shell(sandbox, f"python3 -c '{program}'", output_bytes_max=5 << 20)
        expected = hashlib.sha256(random.Random(7).randbytes(5 << 20)).digest()
        require(not result.stdout.is_truncated and not result.stdout.tail, result.stdout.dropped_bytes)
        require(hashlib.sha256(result.stdout.data).digest() == expected, "other bytes")


@check()
async def bytes_that_are_no_text_come_through(substrate: Substrate) -> None:
    async with fresh(substrate) as sandbox:
        result = await shell(sandbox, r"printf '\xff\xfe\x80ok\xc3\x28\xed\xa0\x80a\0b\0c'")
        require(result.stdout.data.hex() == "fffe806f6bc328eda0806100620063", result)


@check()
async def long_output_keeps_head_and_tail_and_counts_the_rest(substrate: Substrate) -> None:
    async with fresh(substrate) as sandbox:
        result = await shell(sandbox, "seq 100000; seq 200000 >&2", output_bytes_max=1000)
        for output, count in ((result.stdout, 100_000), (result.stderr, 200_000)):
            whole = "".join(f"{number}\n" for number in range(1, count + 1)).encode()
            require(output.head == whole[:500] and output.tail == whole[-500:], output)
            require(output.dropped_bytes == len(whole) - 1000 and output.is_truncated, output.dropped_bytes)


@check()
async def output_at_the_bound_is_whole_and_one_byte_more_is_not(substrate: Substrate) -> None:
    async with fresh(substrate) as sandbox:
        result = await shell(sandbox, "head -c 1000 /dev/zero", output_bytes_max=1000)
        require(result.stdout.head == bytes(1000) and not result.stdout.is_truncated, result)
        result = await shell(sandbox, "head -c 1001 /dev/zero", output_bytes_max=1000)
        require(result.stdout.dropped_bytes == 1 and len(result.stdout.data) == 1000, result)


@check()
async def a_flood_leaves_other_sandboxes_well(substrate: Substrate) -> None:
    async with fresh(substrate) as loud, fresh(substrate) as quiet:
        flood = asyncio.create_task(shell(loud, "yes 0123456789abcdef | head -c 500000000", timeout_s=60))
        slowest = 0.0
        while not flood.done():
            started = time.monotonic()
            result = await shell(quiet, "echo ok")
            slowest = max(slowest, time.monotonic() - started)
            require(result.stdout.data == b"ok\n", result)
        output = flood.result().stdout
        require(output.dropped_bytes + len(output.data) == 500_000_000 and len(output.data) == 1 << 20, "lost count")
        require(slowest < 2, f"the other sandbox took {slowest} s")
        require((await shell(loud, "echo ok-$((6*7))")).stdout.data == b"ok-42\n", "not well after the flood")


async def _whole(process: Process, stream: Stream, bytes_max: int) -> bytes:
    pieces: list[bytes] = []
    while piece := await process.read_output(stream, sum(map(len, pieces)), bytes_max):
        require(len(piece) <= bytes_max, len(piece))
        pieces.append(piece)
    return b"".join(pieces)


@check()
async def output_is_read_while_the_command_runs(substrate: Substrate) -> None:
    async with fresh(substrate) as sandbox:
        text = "echo one; echo fault >&2; until [ -e /tmp/go ]; do sleep 0.02; done; echo two"
        process = await sandbox.start(script(text))
        require(await process.read_output("stdout", 0, 100) == b"one\n", "the first line")
        require(await process.read_output("stderr", 2, 2) == b"ul", "a part of stderr")
        waiting = asyncio.create_task(process.read_output("stdout", 4, 100))
        await shell(sandbox, "true")
        require(not waiting.done(), "it did not wait for more")
        await shell(sandbox, "touch /tmp/go")
        require(await waiting == b"two\n" and await process.read_output("stdout", 8, 100) == b"", "the rest")
        result = await process.wait()
        require(result.stdout.data == b"one\ntwo\n" and result.stderr.data == b"fault\n", result)


@check()
async def output_is_read_again_after_the_end(substrate: Substrate) -> None:
    async with fresh(substrate) as sandbox:
        process = await sandbox.start(script("seq 20000; seq 100 >&2"))
        await process.wait()
        counts: dict[Stream, int] = {"stdout": 20_000, "stderr": 100}
        for stream, count in counts.items():
            expected = "".join(f"{number}\n" for number in range(1, count + 1)).encode()
            for bytes_max in (1 << 20, 7777):
                require(await _whole(process, stream, bytes_max) == expected, (stream, bytes_max))
            require(await process.read_output(stream, len(expected), 10) == b"", "beyond the end")
            require(await process.read_output(stream, 1 << 50, 10) == b"", "far beyond the end")


@check()
async def bytes_that_were_dropped_are_refused_and_all_others_are_exact(substrate: Substrate) -> None:
    async with fresh(substrate) as sandbox:
        whole = "".join(f"{number}\n" for number in range(1, 30_001)).encode()
        process = await sandbox.start(script("seq 30000", output_bytes_max=1000))
        result = await process.wait()
        require(result.stdout.dropped_bytes == len(whole) - 1000, result.stdout.dropped_bytes)
        for offset in (0, 400, 499, 500, 501, 5000, len(whole) - 501, len(whole) - 500, len(whole) - 10):
            try:
                piece = await process.read_output("stdout", offset, 100)
            except OutOfRangeError:
                require(500 <= offset < len(whole) - 500, f"{offset} was kept")
            else:
                require(piece and piece == whole[offset : offset + len(piece)], offset)


@check()
async def unread_output_stalls_nobody(substrate: Substrate) -> None:
    async with fresh(substrate) as sandbox:
        process = await sandbox.start(script("head -c 200000000 /dev/zero; echo x >&2", timeout_s=60))
        reading = asyncio.create_task(process.read_output("stderr", 0, 10))
        require((await shell(sandbox, "echo beside")).stdout.data == b"beside\n", "the next command")
        require(await reading == b"x\n", "stderr behind a flood of stdout")
        result = await process.wait()
        require(result.stdout.total_bytes == 200_000_000, result.stdout.total_bytes)


CHECKS: tuple[Check, ...] = (
    stdout_and_stderr_come_apart,
    merged_output_keeps_its_order,
    binary_output_is_exact,
    bytes_that_are_no_text_come_through,
    long_output_keeps_head_and_tail_and_counts_the_rest,
    output_at_the_bound_is_whole_and_one_byte_more_is_not,
    a_flood_leaves_other_sandboxes_well,
    output_is_read_while_the_command_runs,
    output_is_read_again_after_the_end,
    bytes_that_were_dropped_are_refused_and_all_others_are_exact,
    unread_output_stalls_nobody,
)
