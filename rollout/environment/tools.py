"""The agent's tools: a call from the model becomes keyed commands, their results one observation.

`bash` and `edit` behave as the embedded checkpoint was taught (its README, "What it was taught,
exactly").  A tool never touches a sandbox but through `run(step, command)`, which is durable and
keyed, so a tool may take several steps and still be resumed between any two of them.

Invariants:
1. An observation is a function of the call and the results of its commands: no clock, no host path.
2. What the model gets wrong is an observation; only the service's own failures raise.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from dsec.errors import InvalidArgumentError
from dsec.types import Command, ExecResult
from toolcall_dsl import ToolCall

OBSERVATION_CHARACTERS_MAX = 1500
COMMAND_BYTES_MAX = 100_000
"""Longest shell line: below the kernel's MAX_ARG_STRLEN of 128 KiB (execve(2))."""
FILE_BYTES_MAX = 1 << 20
"""Largest file that `edit` will change."""

Run = Callable[[str, Command], Awaitable[ExecResult]]
"""`run(step, command)`: one durable command of this call; `step` names it within the call."""

_WRITE = 'cat > "$1"'
_READ = 'if [ -f "$1" ]; then exec cat -- "$1"; else exit 3; fi'


@dataclass(frozen=True, slots=True)
class Place:
    """Where an agent's commands run: working directory, whole environment, seconds for one command."""

    cwd: str
    env: dict[str, str]
    timeout_s: float


@dataclass(frozen=True, slots=True)
class Observation:
    """What the model reads, and the facts that the record keeps."""

    text: str
    exit_code: int | None = None
    timed_out: bool = False
    truncated_bytes: int = 0


async def use_tool(call: ToolCall, place: Place, run: Run) -> Observation:
    """Answer one call.  Raises what `run` raises, but a command that was refused is an observation."""
    try:
        return await _use(call, place, run)
    except InvalidArgumentError as error:
        return Observation(f"error: {error}")


async def _use(call: ToolCall, place: Place, run: Run) -> Observation:
    wanted = {"bash": ("command",), "edit": ("path", "old", "new")}.get(call.name)
    if wanted is None:
        return Observation(f"error: unknown tool {call.name}")
    arguments: dict[str, str] = {}
    for name in wanted:
        if name not in call.arguments:
            return Observation(f"error: missing parameter '{name}'")
        value = call.arguments[name]
        if not isinstance(value, str) or "\0" in value:
            return Observation(f"error: parameter '{name}' must be a string without NUL characters")
        arguments[name] = value
    if call.name == "bash":
        return await _bash(arguments["command"], place, run)
    return await _edit(arguments["path"], arguments["old"], arguments["new"], place, run)


async def _bash(command: str, place: Place, run: Run) -> Observation:
    if len(command.encode()) > COMMAND_BYTES_MAX:
        return Observation(f"error: command longer than {COMMAND_BYTES_MAX} bytes")
    result = await run(
        "bash",
        Command(
            argv=("bash", "-c", command),
            cwd=place.cwd,
            env=place.env,
            timeout_s=place.timeout_s,
            output_bytes_max=8 * OBSERVATION_CHARACTERS_MAX,
            merge_stderr=True,
        ),
    )
    if result.timed_out:
        return Observation("[timeout]", result.exit_code, timed_out=True)
    text = result.stdout.data.decode(errors="replace").rstrip("\n")
    kept = text[:OBSERVATION_CHARACTERS_MAX]
    lines = [kept] if kept else []
    if result.exit_code != 0:
        lines.append(f"[exit code {result.exit_code}]")
    cut_bytes = result.stdout.dropped_bytes + len(text[OBSERVATION_CHARACTERS_MAX:].encode())
    return Observation("\n".join(lines) or "(no output)", result.exit_code, truncated_bytes=cut_bytes)


async def _edit(path: str, old: str, new: str, place: Place, run: Run) -> Observation:
    if not path or not old:
        return Observation(f"error: parameter '{'path' if not path else 'old'}' is empty")
    before = await run("read", _file_command(_READ, path, place))
    if before.timed_out:
        return Observation("[timeout]", before.exit_code, timed_out=True)
    if before.stdout.is_truncated or len(before.stdout.data) > FILE_BYTES_MAX:
        return Observation(f"error: file larger than {FILE_BYTES_MAX} bytes")
    if before.exit_code != 0:
        return Observation("error: no such file", before.exit_code)
    found = before.stdout.head.count(old.encode())
    if found != 1:
        return Observation(f"error: old text found {found} times")
    after = before.stdout.head.replace(old.encode(), new.encode())
    written = await run("write", _file_command(_WRITE, path, place, stdin=after))
    if written.exit_code != 0:
        return Observation(f"error: cannot write {path}", written.exit_code)
    return Observation("ok", 0)


def _file_command(script: str, path: str, place: Place, stdin: bytes = b"") -> Command:
    return Command(
        argv=("/bin/sh", "-c", script, "sh", path),
        cwd=place.cwd,
        env=place.env,
        stdin=stdin,
        timeout_s=place.timeout_s,
        output_bytes_max=2 * FILE_BYTES_MAX,
    )
