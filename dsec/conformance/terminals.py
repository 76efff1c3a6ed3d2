"""Checks of commands on a terminal: what programs see, what is typed, and how it ends."""

# ruff: noqa: D103  (a check is described by its name)

from __future__ import annotations

import asyncio

from dsec.conformance.check import Check, check, fresh, line, require, script
from dsec.conformance.processes import ready
from dsec.sandbox import Process, Substrate
from dsec.types import TtySize


async def _until(process: Process, words: bytes, offset: int = 0) -> int:
    """Wait until the terminal's output holds `words` at or after `offset`; gives where they end."""
    seen = b""
    async with asyncio.timeout(20):
        while words not in seen:
            more = await process.read_output("stdout", offset + len(seen), 1 << 16)
            require(more, f"no {words!r} in {seen!r}")
            seen += more
    return offset + seen.index(words) + len(words)


@check()
async def a_terminal_is_one_to_its_programs(substrate: Substrate) -> None:
    seen = "test -t 0 && test -t 1 && test -t 2 && echo tty; stty size; ps -o tty= -p $$; : > /dev/tty && echo own; tty"
    async with fresh(substrate) as sandbox:
        result = await sandbox.exec(script(seen, tty=TtySize(rows=33, columns=99)))
        lines = result.stdout.data.decode().split("\r\n")
        require(lines[:2] == ["tty", "33 99"] and lines[3] == "own", result)
        require(lines[2].strip().startswith("pts/") and lines[4] == f"/dev/{lines[2].strip()}", result)
        require(result.exit_code == 0 and result.stderr.total_bytes == 0, result)


@check()
async def errors_come_on_the_terminal_too(substrate: Substrate) -> None:
    async with fresh(substrate) as sandbox:
        result = await sandbox.exec(script("echo out; echo err >&2", tty=TtySize()))
        require(result.stdout.data == b"out\r\nerr\r\n" and result.stderr.data == b"", result)


@check()
async def a_resize_is_seen_and_signalled(substrate: Substrate) -> None:
    watch = "trap 'stty size; exit 4' WINCH; stty -onlcr; echo ready; while :; do sleep 0.02; done"
    async with fresh(substrate) as sandbox:
        process = await sandbox.start(script(watch, tty=TtySize()))
        await ready(process)
        await process.resize(51, 132)
        result = await process.wait()
        require(result.exit_code == 4 and result.stdout.data.endswith(b"51 132\n"), result)


@check()
async def what_is_typed_is_echoed_and_read_by_lines(substrate: Substrate) -> None:
    async with fresh(substrate) as sandbox:
        process = await sandbox.start(script("read a; echo got $a", tty=TtySize(), stdin=b"hel"))
        await _until(process, b"hel")
        await process.write_stdin(b"lo\n")
        result = await process.wait()
        require(result.stdout.data == b"hello\r\ngot hello\r\n", result)


@check()
async def the_interrupt_character_interrupts(substrate: Substrate) -> None:
    async with fresh(substrate) as sandbox:
        process = await sandbox.start(script("exec 3>&1; stty -onlcr; echo ready; exec cat", tty=TtySize()))
        await ready(process)
        await process.write_stdin(b"\x03")
        require((await process.wait()).exit_code == 128 + 2, await process.wait())


@check()
async def the_end_of_input_is_typed(substrate: Substrate) -> None:
    async with fresh(substrate) as sandbox:
        process = await sandbox.start(script("stty -onlcr; echo ready; cat; echo end", tty=TtySize()))
        await ready(process)
        await process.write_stdin(b"typed\n")
        await process.close_stdin()
        result = await process.wait()
        require(result.exit_code == 0 and result.stdout.data.endswith(b"typed\ntyped\nend\n"), result)


@check()
async def a_shell_on_a_terminal_controls_its_jobs(substrate: Substrate) -> None:
    async with fresh(substrate) as sandbox:
        bash = script("exec bash --norc --noprofile -i", tty=TtySize(), timeout_s=60)
        process = await sandbox.start(bash)
        await process.write_stdin(b"PS1=; stty -echo; echo at-$((6*7))\n")
        offset = await _until(process, b"at-42")
        await process.write_stdin(b"sleep 300\n")
        await line(sandbox, "until pgrep -x sleep > /dev/null; do sleep 0.02; done")  # before, the key would be bash's
        await process.write_stdin(b"\x1a")
        offset = await _until(process, b"Stopped", offset)
        await process.write_stdin(b"kill -9 %1; echo over\nexit 9\nexit 9\n")  # bash may ask twice
        await _until(process, b"over", offset)
        require((await process.wait()).exit_code == 9, await process.wait())


@check()
async def a_killed_terminal_ends_and_leaves_none_behind(substrate: Substrate) -> None:
    async with fresh(substrate) as sandbox:
        before = await line(sandbox, "ls /dev/pts")
        process = await sandbox.start(script("stty -onlcr; echo ready; sleep 300 & wait", tty=TtySize()))
        await ready(process)
        await process.kill()
        require((await process.wait()).exit_code == 137, await process.wait())
        require(await line(sandbox, "pgrep -c sleep || true") == "0", "part of its tree lives")
        async with asyncio.timeout(10):  # who else holds it is told to let go, and nobody waits for that
            while await line(sandbox, "ls /dev/pts") != before:
                continue


CHECKS: tuple[Check, ...] = (
    a_terminal_is_one_to_its_programs,
    errors_come_on_the_terminal_too,
    a_resize_is_seen_and_signalled,
    what_is_typed_is_echoed_and_read_by_lines,
    the_interrupt_character_interrupts,
    the_end_of_input_is_typed,
    a_shell_on_a_terminal_controls_its_jobs,
    a_killed_terminal_ends_and_leaves_none_behind,
)
