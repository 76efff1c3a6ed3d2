"""Checks of the port itself: arguments, ends, and what must hold whatever runs inside."""

# ruff: noqa: D103  (a check is described by its name)

from __future__ import annotations

from dsec.conformance.check import Check, check, fresh, refusal_of, require
from dsec.errors import InvalidArgumentError, SandboxLostError
from dsec.sandbox import Substrate
from dsec.types import STDIN_BYTES_MAX, Command, SandboxSpec


@check(kind="port")
async def ids_are_unique(substrate: Substrate) -> None:
    async with fresh(substrate) as first, fresh(substrate) as second:
        require(first.id != second.id, first.id)


@check(kind="port")
async def destroy_is_safe_to_call_twice(substrate: Substrate) -> None:
    sandbox = await substrate.create(SandboxSpec())
    await sandbox.destroy()
    await sandbox.destroy()


@check(kind="port")
async def a_destroyed_sandbox_is_lost(substrate: Substrate) -> None:
    sandbox = await substrate.create(SandboxSpec())
    await sandbox.destroy()
    error = await refusal_of(sandbox.exec(Command(argv=("true",))))
    require(isinstance(error, SandboxLostError), error)


@check(kind="port")
async def a_command_that_cannot_be_run_is_refused_with_its_reason(substrate: Substrate) -> None:
    bad = {
        "argv is empty": Command(argv=()),
        "zero byte": Command(argv=("echo", "a\0b")),
        "environment variable": Command(argv=("true",), env={"A=B": "c"}),
        "timeout_s": Command(argv=("true",), timeout_s=0.0),
        "timeout_s nan": Command(argv=("true",), timeout_s=float("nan")),
        "absolute": Command(argv=("true",), cwd="tmp"),
        "stdin": Command(argv=("true",), stdin=bytes(STDIN_BYTES_MAX + 1)),
        "output_bytes_max": Command(argv=("true",), output_bytes_max=-1),
    }
    async with fresh(substrate) as sandbox:
        for words, command in bad.items():
            error = await refusal_of(sandbox.exec(command))
            require(isinstance(error, InvalidArgumentError) and words.split()[0] in str(error), (words, error))
        require((await sandbox.exec(Command(argv=("/bin/true",)))).exit_code == 0)


@check(kind="port")
async def an_argument_above_the_kernels_limit_is_refused_and_the_sandbox_lives(substrate: Substrate) -> None:
    async with fresh(substrate) as sandbox:
        error = await refusal_of(sandbox.exec(Command(argv=("/bin/true", "a" * 131_072))))
        require(isinstance(error, InvalidArgumentError) and "argv[1]" in str(error), error)
        require((await sandbox.exec(Command(argv=("/bin/true", "a" * 131_071)))).exit_code == 0)


@check(kind="port")
async def limits_that_cannot_be_are_refused(substrate: Substrate) -> None:
    bad = [
        SandboxSpec(memory_bytes=1),
        SandboxSpec(memory_bytes=64 << 20, disk_bytes=64 << 20),
        SandboxSpec(pids_count_max=0),
        SandboxSpec(cpu_cores=0.0),
        SandboxSpec(hostname="no such/name"),
    ]
    for spec in bad:
        try:
            sandbox = await substrate.create(spec)
        except InvalidArgumentError:
            continue
        await sandbox.destroy()
        require(False, f"not refused: {spec}")


CHECKS: tuple[Check, ...] = (
    ids_are_unique,
    destroy_is_safe_to_call_twice,
    a_destroyed_sandbox_is_lost,
    a_command_that_cannot_be_run_is_refused_with_its_reason,
    an_argument_above_the_kernels_limit_is_refused_and_the_sandbox_lives,
    limits_that_cannot_be_are_refused,
)
