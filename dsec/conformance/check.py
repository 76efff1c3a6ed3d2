"""A check: one behaviour, a name that states it, and a coroutine that fails if it does not hold.

Checks of kind `port` need no program to run, so that the double passes them too; checks of kind
`linux` run commands of an ordinary Linux user land.  What a substrate may lack is a feature: it says
so (`DOCKER_LACKS`, for one), and the checks that need it are left out by name, never passed over.

See: dsec/testing.py, which runs them.
"""

from __future__ import annotations

import asyncio
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Literal

import msgspec

from dsec.errors import DsecError
from dsec.sandbox import Sandbox, Substrate
from dsec.types import Command, ExecResult, Feature, SandboxSpec

LEAVING_S_MAX = 10.0
"""How long a check that has run out of time may take to close what it opened."""
ENV = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME": "/root", "LANG": "C.UTF-8"}


Kind = Literal["port", "linux"]


class NotConformingError(AssertionError):
    """A substrate, or an engine, does not behave as each of them must."""


class Check(msgspec.Struct, frozen=True):
    """One behaviour; `run` raises NotConformingError if the substrate lacks it."""

    name: str
    kind: Kind
    needs: frozenset[Feature]
    run: Callable[[Substrate], Coroutine[Any, Any, None]]


class Outcome(msgspec.Struct, frozen=True):
    """What came of one check; `problem` is empty if it passed."""

    name: str
    problem: str = ""


async def outcome_of(name: str, run: Coroutine[Any, Any, None], patience_s: float) -> Outcome:
    """Of the check of that name: whatever it raises is its problem, and so is that it has not ended after `patience_s`.

    What does not end by then is cancelled, and left alone if it does not even obey that: the next check is to run.
    """
    task = asyncio.create_task(run)
    problem = ""
    try:
        await asyncio.wait([task], timeout=patience_s)
        if not task.done():
            where = task.get_stack()[-1]
            line = f"{Path(where.f_code.co_filename).name}, line {where.f_lineno}"
            problem = f"TimeoutError: it still waits after {patience_s:g} s ({line})"
    finally:
        task.cancel()
    await asyncio.wait([task], timeout=min(patience_s, LEAVING_S_MAX))
    error = asyncio.CancelledError() if task.cancelled() else task.exception() if task.done() else None
    if not problem and error is not None:
        problem = f"{type(error).__name__}: {error}"
    return Outcome(name, problem)


def check(*needs: Feature, kind: Kind = "linux") -> Callable[[Callable[[Substrate], Coroutine[Any, Any, None]]], Check]:
    """Turn a coroutine function into a check of the same name."""
    return lambda function: Check(function.__name__, kind, frozenset(needs), function)


def require(condition: object, message: object = "") -> None:
    """NotConformingError unless `condition` holds, with the message or this line (an assert that python -O keeps)."""
    if not condition:
        where = traceback.extract_stack(limit=2)[0]
        raise NotConformingError(
            str(message) or f"not so: {where.line} ({Path(where.filename).name}, line {where.lineno})"
        )


@asynccontextmanager
async def fresh(substrate: Substrate, spec: SandboxSpec | None = None) -> AsyncIterator[Sandbox]:
    """A sandbox for the time of a block."""
    sandbox = await substrate.create(spec or SandboxSpec())
    try:
        yield sandbox
    finally:
        await sandbox.destroy()


def script(text: str, **more: Any) -> Command:
    """The command that runs a bash script; `more` are fields of Command."""
    fields: dict[str, Any] = {"argv": ("bash", "-c", text), "env": ENV, "timeout_s": 20.0}
    return Command(**fields | more)


async def shell(sandbox: Sandbox, text: str, **more: Any) -> ExecResult:
    """Run a bash script; `more` are fields of Command."""
    return await sandbox.exec(script(text, **more))


async def refusal_of(attempt: Awaitable[object]) -> DsecError:
    """The error that `attempt` must end with."""
    try:
        result = await attempt
    except DsecError as error:
        return error
    raise NotConformingError(f"not refused: {result}")


async def python(sandbox: Sandbox, program: str, *, timeout_s: float = 20.0) -> str:
    """Run a Python program and give its stdout; it must end well."""
    result = await sandbox.exec(Command(argv=("python3", "-c", program), env=ENV, timeout_s=timeout_s))
    require(result.exit_code == 0, result)
    return result.stdout.data.decode()


async def line(sandbox: Sandbox, text: str, **more: Any) -> str:
    """Stdout of a bash script that must end well, without the last line end."""
    result = await shell(sandbox, text, **more)
    require(result.exit_code == 0, result)
    return result.stdout.data.decode().rstrip("\n")
