"""Checks of started commands: waiting, background, kill, signals, and input that comes in pieces."""

# ruff: noqa: D103  (a check is described by its name)

from __future__ import annotations

import asyncio

from dsec.conformance.check import Check, check, fresh, line, refusal_of, require, script, shell
from dsec.errors import InvalidArgumentError
from dsec.sandbox import Process, Substrate
from dsec.types import Command

READY = b"ready\n"


async def ready(process: Process) -> None:
    """Wait until the command has written its first line, `ready`."""
    seen = b""
    async with asyncio.timeout(20):
        while len(seen) < len(READY) and (more := await process.read_output("stdout", len(seen), len(READY))):
            seen += more
    require(seen == READY, seen)


@check(kind="port")
async def each_of_several_waiters_gets_the_result(substrate: Substrate) -> None:
    async with fresh(substrate) as sandbox:
        process = await sandbox.start(Command(argv=("/bin/true",)))
        results = await asyncio.gather(*(process.wait() for _ in range(5)))
        require([result.exit_code for result in results] == [0] * 5, results)
        require(await process.wait() == results[0], "a later waiter got another result")


@check(kind="port")
async def commands_are_numbered_by_the_sandbox_or_by_the_caller(substrate: Substrate) -> None:
    async with fresh(substrate) as sandbox:
        command = Command(argv=("/bin/true",))
        first, second = await sandbox.start(command), await sandbox.start(command)
        require((first.number, second.number) == (1, 2), (first.number, second.number))
    async with fresh(substrate) as sandbox:
        given = [await sandbox.start(command, number) for number in (7, 3)]
        require([process.number for process in given] == [7, 3], given)
        again = await sandbox.resume_process(7, command)
        require(again is not None and again.number == 7, again)
        require(again is not None and (await again.wait()).exit_code == 0, "the resumed command has no result")
        require(await sandbox.resume_process(9, command) is None, "a command that nobody started was resumed")


@check()
async def a_command_that_was_refused_after_its_start_is_not_known(substrate: Substrate) -> None:
    async with fresh(substrate) as sandbox:
        command = script("true", cwd="/no/such")
        error = await refusal_of((await sandbox.start(command, 7)).wait())
        require(error.command_started == "no", error)
        require(await sandbox.resume_process(7, command) is None, "a command that did not run was resumed")


@check(kind="port")
async def a_command_that_has_ended_takes_no_more(substrate: Substrate) -> None:
    async with fresh(substrate) as sandbox:
        process = await sandbox.start(Command(argv=("/bin/true",), keep_stdin_open=True))
        await process.close_stdin()
        result = await process.wait()
        await process.kill()
        await process.signal(15)
        await process.write_stdin(b"x")
        await process.close_stdin()
        require(await process.wait() == result and result.exit_code == 0, result)


@check(kind="port")
async def what_a_command_was_not_started_for_is_refused(substrate: Substrate) -> None:
    async with fresh(substrate) as sandbox:
        process = await sandbox.start(Command(argv=("/bin/sleep", "300")))
        attempts = [
            *(process.signal(number) for number in (0, -1, 65, 2**31)),
            process.write_stdin(b"x"),
            process.resize(10, 10),
        ]
        for outcome in await asyncio.gather(*attempts, return_exceptions=True):
            require(isinstance(outcome, InvalidArgumentError), outcome)
        await process.kill()
        await process.wait()


@check()
async def start_returns_while_the_command_runs(substrate: Substrate) -> None:
    async with fresh(substrate) as sandbox:
        process = await sandbox.start(script("until [ -e /tmp/go ]; do sleep 0.02; done; echo out; exit 5"))
        waiting = asyncio.create_task(process.wait())
        require(await line(sandbox, "echo beside") == "beside")
        require(not waiting.done(), "it ended before it could")
        await line(sandbox, "touch /tmp/go")
        result = await waiting
        require((result.exit_code, result.stdout.data) == (5, b"out\n"), result)


@check()
async def a_cancelled_waiter_does_not_touch_the_command(substrate: Substrate) -> None:
    async with fresh(substrate) as sandbox:
        process = await sandbox.start(script("until [ -e /tmp/go ]; do sleep 0.02; done; exit 6"))
        waiting = asyncio.create_task(process.wait())
        await line(sandbox, "true")
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        await line(sandbox, "touch /tmp/go")
        require((await process.wait()).exit_code == 6, await process.wait())


@check()
async def kill_ends_the_whole_tree(substrate: Substrate) -> None:
    tree = (
        "trap '' TERM; (setsid bash -c 'trap \"\" TERM; exec -a stubborn sleep 987654' &)\n"
        "(setsid setsid bash -c '(exec -a stubborn sleep 987654) & disown; exit' &)\n"
        "until [ $(pgrep -cf '^stubborn') = 2 ]; do :; done; echo ready; while :; do :; done"
    )
    async with fresh(substrate) as sandbox:
        process = await sandbox.start(script(tree))
        await ready(process)
        await process.kill()
        result = await process.wait()
        require(result.exit_code == 137 and not result.timed_out and not result.oom_killed, result)
        require(await line(sandbox, "pgrep -cf '^stubborn' || true") == "0", "part of the tree lives")


@check()
async def a_started_command_has_its_timeout(substrate: Substrate) -> None:
    async with fresh(substrate) as sandbox:
        process = await sandbox.start(script("sleep 300", timeout_s=0.3))
        result = await process.wait()
        require(result.timed_out and result.exit_code == 137, result)


@check()
async def a_signal_reaches_the_commands_process_group(substrate: Substrate) -> None:
    group = (
        "bash -c 'trap \"echo child; exit\" USR1; touch /tmp/set; while :; do sleep 0.02; done' & "
        "trap 'wait; echo parent; exit 7' USR1; until [ -e /tmp/set ]; do sleep 0.02; done; echo ready; "
        "while :; do sleep 0.02; done"
    )
    async with fresh(substrate) as sandbox:
        other = await sandbox.start(script("echo ready; while :; do sleep 0.1; done"))
        process = await sandbox.start(script(group))
        await asyncio.gather(ready(process), ready(other))
        await process.signal(10)
        result = await process.wait()
        require((result.exit_code, result.stdout.data) == (7, READY + b"child\nparent\n"), result)
        await other.signal(15)
        require((await other.wait()).exit_code == 128 + 15, await other.wait())


@check()
async def a_signal_right_after_the_start_is_not_lost(substrate: Substrate) -> None:
    async with fresh(substrate) as sandbox:
        for _ in range(20):
            process = await sandbox.start(Command(argv=("/bin/sleep", "300"), timeout_s=20))
            await process.signal(15)
            require((await process.wait()).exit_code == 128 + 15, await process.wait())


@check()
async def a_stopped_command_can_go_on_and_be_killed(substrate: Substrate) -> None:
    async with fresh(substrate) as sandbox:
        process = await sandbox.start(script("echo ready; until [ -e /tmp/go ]; do sleep 0.02; done; exit 8"))
        await ready(process)
        await process.signal(19)
        await line(sandbox, "touch /tmp/go")
        await process.signal(18)
        require((await process.wait()).exit_code == 8, await process.wait())
        stopped = await sandbox.start(script("echo ready; kill -STOP $$"))
        await ready(stopped)
        await stopped.kill()
        require((await stopped.wait()).exit_code == 137, await stopped.wait())


@check()
async def input_comes_in_pieces_and_ends_when_told(substrate: Substrate) -> None:
    async with fresh(substrate) as sandbox:
        talk = "read a; echo ready; read b; read c; rest=$(cat | wc -c); echo $a-$b-$c-$rest"
        process = await sandbox.start(script(talk, stdin=b"one\n", keep_stdin_open=True))
        await ready(process)
        await process.write_stdin(b"tw")
        await process.write_stdin(b"o\nthree\n" + bytes(70_000))
        await process.write_stdin(b"")
        await process.write_stdin(bytes(30_000))
        await process.close_stdin()
        require((await process.wait()).stdout.data == READY + b"one-two-three-100000\n", await process.wait())


@check()
async def a_writer_waits_for_a_reader_and_nobody_else_does(substrate: Substrate) -> None:
    async with fresh(substrate) as sandbox:
        reader = "echo ready; until [ -e /tmp/go ]; do sleep 0.02; done; sha256sum"
        process = await sandbox.start(script(reader, keep_stdin_open=True, timeout_s=60))
        await ready(process)
        data = bytes(range(256)) * (8 << 12)  # 8 MiB: more than any pipe holds
        writing = asyncio.create_task(process.write_stdin(data))
        for _ in range(3):
            require(await line(sandbox, "echo beside") == "beside")
        require(not writing.done(), "8 MiB went into a pipe that nobody reads")
        await line(sandbox, "touch /tmp/go")
        await writing
        await process.close_stdin()
        expected = await line(sandbox, "sha256sum", stdin=data)
        require((await process.wait()).stdout.data.decode() == f"{READY.decode()}{expected}\n", await process.wait())


@check()
async def a_writer_is_let_go_when_the_command_ends_or_reads_no_more(substrate: Substrate) -> None:
    async with fresh(substrate) as sandbox:
        for text in ("echo ready; exec sleep 300", "exec <&-; echo ready; exec sleep 300"):
            process = await sandbox.start(script(text, keep_stdin_open=True, timeout_s=60))
            await ready(process)
            writing = asyncio.create_task(process.write_stdin(bytes(8 << 20)))
            await shell(sandbox, "true")
            await process.kill()
            async with asyncio.timeout(10):
                await asyncio.gather(writing, process.wait())


@check()
async def a_hundred_commands_leave_room_for_the_next(substrate: Substrate) -> None:
    async with fresh(substrate) as sandbox:
        for _ in range(10):
            started = [await sandbox.start(script(f"exit {code}")) for code in range(10)]
            results = await asyncio.gather(*(process.wait() for process in started))
            require([result.exit_code for result in results] == list(range(10)), results)


CHECKS: tuple[Check, ...] = (
    each_of_several_waiters_gets_the_result,
    commands_are_numbered_by_the_sandbox_or_by_the_caller,
    a_command_that_was_refused_after_its_start_is_not_known,
    a_command_that_has_ended_takes_no_more,
    what_a_command_was_not_started_for_is_refused,
    start_returns_while_the_command_runs,
    a_cancelled_waiter_does_not_touch_the_command,
    kill_ends_the_whole_tree,
    a_started_command_has_its_timeout,
    a_signal_reaches_the_commands_process_group,
    a_signal_right_after_the_start_is_not_lost,
    a_stopped_command_can_go_on_and_be_killed,
    input_comes_in_pieces_and_ends_when_told,
    a_writer_waits_for_a_reader_and_nobody_else_does,
    a_writer_is_let_go_when_the_command_ends_or_reads_no_more,
    a_hundred_commands_leave_room_for_the_next,
)
