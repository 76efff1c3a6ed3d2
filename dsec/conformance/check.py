"""A check: one behaviour, a name that states it, and a coroutine that fails if it does not hold.

Checks of kind `port` need no program to run, so that the double passes them too; checks of kind
`linux` run commands of an ordinary Linux user land.

See: dsec/testing.py, which runs them.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Literal

import msgspec

from dsec.sandbox import Sandbox, Substrate
from dsec.types import OUTPUT_BYTES_MAX, Command, ExecResult, SandboxSpec

ENV = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME": "/root", "LANG": "C.UTF-8"}


class NotConformingError(AssertionError):
    """A substrate does not behave as every substrate must."""


class Check(msgspec.Struct, frozen=True):
    """One behaviour; `run` raises NotConformingError if the substrate lacks it."""

    name: str
    kind: Literal["port", "linux"]
    run: Callable[[Substrate], Awaitable[None]]


def check(*, kind: Literal["port", "linux"] = "linux") -> Callable[[Callable[[Substrate], Awaitable[None]]], Check]:
    """Turn a coroutine function into a check of the same name."""
    return lambda function: Check(function.__name__, kind, function)


def require(condition: object, message: object = "") -> None:
    """NotConformingError unless `condition` holds (an assert that python -O keeps)."""
    if not condition:
        raise NotConformingError(str(message))


@asynccontextmanager
async def fresh(substrate: Substrate, spec: SandboxSpec | None = None) -> AsyncIterator[Sandbox]:
    """A sandbox for the time of a block."""
    sandbox = await substrate.create(spec or SandboxSpec())
    try:
        yield sandbox
    finally:
        await sandbox.destroy()


async def shell(
    sandbox: Sandbox,
    script: str,
    *,
    timeout_s: float = 20.0,
    stdin: bytes = b"",
    output_bytes_max: int = OUTPUT_BYTES_MAX,
    merge_stderr: bool = False,
) -> ExecResult:
    """Run a bash script."""
    command = Command(
        argv=("bash", "-c", script),
        env=ENV,
        timeout_s=timeout_s,
        stdin=stdin,
        output_bytes_max=output_bytes_max,
        merge_stderr=merge_stderr,
    )
    return await sandbox.exec(command)


async def python(sandbox: Sandbox, program: str, *, timeout_s: float = 20.0) -> str:
    """Run a Python program and give its stdout; it must end well."""
    result = await sandbox.exec(Command(argv=("python3", "-c", program), env=ENV, timeout_s=timeout_s))
    require(result.exit_code == 0, result)
    return result.stdout.data.decode()


async def line(sandbox: Sandbox, script: str) -> str:
    """Stdout of a bash script that must end well, without the last line end."""
    result = await shell(sandbox, script)
    require(result.exit_code == 0, result)
    return result.stdout.data.decode().rstrip("\n")
