"""Checks of limits: a command that takes all it can gets a result, and its neighbours notice nothing."""

# ruff: noqa: D103, S108  (a check is described by its name; paths inside a sandbox)

from __future__ import annotations

import asyncio
import time
from collections.abc import Coroutine
from typing import TypeVar

from dsec.conformance.check import ENV, Check, check, fresh, line, python, require, shell
from dsec.sandbox import Sandbox, Substrate
from dsec.types import Command, SandboxSpec

T = TypeVar("T")
_SMALL = SandboxSpec(memory_bytes=128 << 20, disk_bytes=64 << 20, pids_count_max=64)
_EAT_MEMORY = "python3 -c 'a=[]\nwhile 1: a.append(bytearray(1<<24))'"


async def beside(quiet: Sandbox, loud: Coroutine[None, None, T]) -> T:
    """Run `loud`; meanwhile `quiet` must answer within two seconds, each time (at the 95th percentile)."""
    task = asyncio.create_task(loud)
    waits: list[float] = []
    while not task.done() or len(waits) < 20:
        started = time.monotonic()
        result = await shell(quiet, "echo ok")
        waits.append(time.monotonic() - started)
        require(result.stdout.data == b"ok\n", result)
    waits.sort()
    require(waits[int(len(waits) * 0.95)] < 2, f"the neighbour waited {waits[-1]:.1f} s")
    return await task


async def _require_well(sandbox: Sandbox) -> None:
    result = await shell(sandbox, "echo ok-$((6*7))", timeout_s=5)
    require(result.stdout.data == b"ok-42\n" and result.exit_code == 0, result)


@check()
async def a_fork_bomb_is_stopped_and_leaves_others_well(substrate: Substrate) -> None:
    async with fresh(substrate, _SMALL) as bomb, fresh(substrate) as quiet:
        result = await beside(quiet, shell(bomb, ":(){ :|:& };: ; sleep 60", timeout_s=3))
        require(result.timed_out, result)
        await _require_well(bomb)


@check()
async def an_orphaned_fork_bomb_keeps_within_its_limit(substrate: Substrate) -> None:
    async with fresh(substrate, _SMALL) as bomb:
        await shell(bomb, "bomb() { bomb | bomb & }; bomb", timeout_s=1)
        result = await shell(bomb, "echo $(ls -d /proc/[0-9]* | wc -l)", timeout_s=5)
        require(result.exit_code != 0 or int(result.stdout.data or b"0") <= 64 + 4, result)


@check()
async def a_sandbox_full_of_processes_answers_with_a_result_and_can_be_emptied(substrate: Substrate) -> None:
    fill = (
        "import os, time\n"
        "read, write = os.pipe()\n"
        "if os.fork(): print(int(os.read(read, 2))); raise SystemExit\n"
        "os.closerange(0, 3)\n"
        "children = 0\n"
        "while True:\n"
        "  try: pid = os.fork()\n"
        "  except OSError: os.write(write, b'%d' % children); time.sleep(0.01); continue\n"
        "  if pid == 0: time.sleep(1000)\n"
        "  children += 1\n"
    )
    async with fresh(substrate, _SMALL) as sandbox:
        require(60 <= int(await python(sandbox, fill)) <= 64, "the limit is another one")
        for _ in range(3):  # a substrate may let the command itself in, but none of its children
            result = await sandbox.exec(Command(argv=("python3", "-c", "import os; os.fork()"), env=ENV))
            require(result.exit_code in (1, 126) and b"Resource temporarily unavailable" in result.stderr.data, result)
        alone = await sandbox.exec(Command(argv=("bash", "-c", "true | echo room"), env=ENV, kill_others=True))
        require(alone.stdout.data == b"room\n" and alone.exit_code == 0, alone)


@check()
async def running_out_of_memory_is_a_flagged_result(substrate: Substrate) -> None:
    async with fresh(substrate, _SMALL) as sandbox, fresh(substrate) as quiet:
        result = await beside(quiet, shell(sandbox, f"exec {_EAT_MEMORY}"))
        require(result.exit_code == 137 and result.oom_killed and not result.timed_out, result)
        await _require_well(sandbox)
        require(not (await shell(sandbox, "true")).oom_killed, "the flag outlived its command")


@check()
async def no_command_can_hide_from_the_oom_killer(substrate: Substrate) -> None:
    async with fresh(substrate, _SMALL) as sandbox:
        script = f"for a in -1000 -1; do echo $a > /proc/self/oom_score_adj && exit 3; done; exec {_EAT_MEMORY}"
        result = await shell(sandbox, script)
        require(result.oom_killed and result.exit_code == 137, result)
        await _require_well(sandbox)


@check("disk_quota")
async def a_full_disk_is_an_error_inside_and_the_sandbox_lives(substrate: Substrate) -> None:
    async with fresh(substrate, _SMALL) as sandbox:
        for place in ("/tmp", "/usr/lib", "/dev/shm"):  # one quota for all that is written
            result = await shell(sandbox, f"dd if=/dev/zero of={place}/fill bs=1M count=200000 2>&1")
            require(b"No space left on device" in result.stdout.data and not result.oom_killed, result)
            await _require_well(sandbox)
            size = int(await line(sandbox, f"stat -c %s {place}/fill; rm {place}/fill"))
            require((60 << 20) <= size <= (64 << 20), size)


@check("disk_quota")
async def endless_small_files_are_bounded_too(substrate: Substrate) -> None:
    async with fresh(substrate, _SMALL) as sandbox:
        program = "import itertools\nfor i in itertools.count(): open(f'/tmp/f{i}', 'w').close()"
        result = await shell(sandbox, f'python3 -c "{program}"', timeout_s=60)
        require(b"No space left on device" in result.stderr.data and result.exit_code == 1, result)
        await _require_well(sandbox)


@check()
async def a_busy_sandbox_keeps_to_its_share_of_the_processor(substrate: Substrate) -> None:
    spec = SandboxSpec(cpu_cores=0.2)
    async with fresh(substrate, spec) as sandbox:
        script = "timeout 2 bash -c 'while :; do :; done' & timeout 2 bash -c 'while :; do :; done'; wait; times"
        result = await shell(sandbox, script)
        last = result.stdout.data.decode().split("\n")[1].split()
        used_s = sum(float(part.rstrip("s").split("m")[1]) for part in last)
        require(used_s < 1.0, f"{used_s} s of processor time in 2 s")


CHECKS: tuple[Check, ...] = (
    a_fork_bomb_is_stopped_and_leaves_others_well,
    an_orphaned_fork_bomb_keeps_within_its_limit,
    a_sandbox_full_of_processes_answers_with_a_result_and_can_be_emptied,
    running_out_of_memory_is_a_flagged_result,
    no_command_can_hide_from_the_oom_killer,
    a_full_disk_is_an_error_inside_and_the_sandbox_lives,
    endless_small_files_are_bounded_too,
    a_busy_sandbox_keeps_to_its_share_of_the_processor,
)
