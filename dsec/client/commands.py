"""Running commands in a sandbox, as a Python user expects it: `run`, a handle for what goes on, `list`, `connect`.

A `str` is a line for bash, a list an argv that no shell sees.  Every run has a key; a run whose connection
broke is asked for again under it, and so happens once.
"""

from __future__ import annotations

import asyncio
import codecs
import inspect
import reprlib
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypedDict, TypeVar, Unpack, overload

from dsec.client.substrate import RemoteProcess, RemoteSandbox
from dsec.errors import DsecError, Fault, InvalidArgumentError, Started
from dsec.keyed import fresh_name
from dsec.messages import STREAM_NUMBERS
from dsec.types import OUTPUT_BYTES_MAX, Command, ExecResult, Output, Stream, TtySize
from dsec.views import CommandView

TIMEOUT_S = 60.0
"""A program waits for a command with nobody to press Ctrl-C; `dsec exec`, where somebody is, waits seven days."""
TTY_TIMEOUT_S = 86_400.0
SHELL = ("bash", "-c")
FAILURE_TEXT_MAX = 500
REPR_TEXT_MAX = 200
OnText = Callable[[str], Awaitable[None] | None]
_SHORT = reprlib.Repr()
_SHORT.maxstring = REPR_TEXT_MAX
F = TypeVar("F", bound=Callable[..., Any])


class RunOptions(TypedDict, total=False):
    """Options of a command.

    cwd: where it runs (default: as the sandbox or its image says, else /)
    envs: variables over those of the sandbox
    user: NAME[:GROUP], or numbers (default: as the sandbox or its image says, else root)
    timeout_s: then its whole process tree is killed (default: 60; of a pty a day)
    stdin: its input, or True to send it later with `send_stdin` (default: none)
    output_bytes_max: how much is kept of each stream, head and tail (default: 1 MiB)
    merge_stderr: stderr goes to stdout (default: False)
    """

    cwd: str
    envs: Mapping[str, str]
    user: str
    timeout_s: float
    stdin: bytes | str | bool
    output_bytes_max: int
    merge_stderr: bool


def check_options(options: Mapping[str, object], known: type) -> None:
    """TypeError for an option that is none: a misspelt limit must not be no limit."""
    names = known.__annotations__
    if unknown := sorted(options.keys() - names.keys()):
        raise TypeError(f"there is no option {unknown[0]!r}; there are {', '.join(names)}")


def explains(*options: type) -> Callable[[F], F]:
    """Puts what these say of each option into a function's help, which shows no more than their name else."""

    def explain(function: F) -> F:
        function.__doc__ = "\n\n".join(inspect.cleandoc(thing.__doc__ or "") for thing in (function, *options))
        return function

    return explain


class CommandFailedError(DsecError):
    """A command that was run with `check=True` did not end with 0; `result` says how it ended."""

    code: ClassVar[str] = "COMMAND_FAILED"
    fault: ClassVar[Fault] = "caller"
    command_started: ClassVar[Started] = "yes"

    def __init__(self, command: Command, result: CommandResult) -> None:
        how = f"ended with {result.exit_code}"
        if result.timed_out:
            how = f"timed out after {command.timeout_s:g} s"
        elif result.oom_killed:
            how += ", out of memory"
        said = (result.stderr.strip() or result.stdout.strip())[-FAILURE_TEXT_MAX:]  # one stream on a terminal
        super().__init__(f"{' '.join(command.argv)[:200]!r} {how}{said and ': '}{said}")
        self.result = result


@dataclass(frozen=True, slots=True, repr=False)
class CommandResult:
    """How a command ended.  Output is bytes; the text is a view of them, with U+FFFD for what is not UTF-8."""

    key: str
    raw: ExecResult

    def __repr__(self) -> str:
        names = ("timed_out", "oom_killed", "is_truncated")
        flags = "".join(f", {name}=True" for name in names if getattr(self, name))
        out, err = _SHORT.repr(self.stdout), _SHORT.repr(self.stderr)
        return f"CommandResult(exit_code={self.exit_code}, stdout={out}, stderr={err}{flags}, key={self.key!r})"

    @property
    def exit_code(self) -> int:
        """0..255; 128 + n for death by signal n."""
        return self.raw.exit_code

    @property
    def stdout(self) -> str:
        """As text; if it is truncated, a line in the middle says so."""
        return _text(self.raw.stdout)

    @property
    def stderr(self) -> str:
        """As text; if it is truncated, a line in the middle says so."""
        return _text(self.raw.stderr)

    @property
    def stdout_bytes(self) -> bytes:
        """What was kept of it: head, then tail."""
        return self.raw.stdout.data

    @property
    def stderr_bytes(self) -> bytes:
        """What was kept of it: head, then tail."""
        return self.raw.stderr.data

    @property
    def is_truncated(self) -> bool:
        """True if bytes of either stream are not here; `raw.stdout.total_bytes` counts them."""
        return self.raw.stdout.is_truncated or self.raw.stderr.is_truncated

    @property
    def timed_out(self) -> bool:
        """True if `timeout_s` passed and the whole process tree was killed."""
        return self.raw.timed_out

    @property
    def oom_killed(self) -> bool:
        """True if a process was killed for memory while the command ran."""
        return self.raw.oom_killed

    @property
    def duration_s(self) -> float:
        """The command's own time; see `dsec.types.ExecResult`."""
        return self.raw.duration_s


def _text(output: Output) -> str:
    if not output.dropped_bytes:
        return output.head.decode(errors="replace") + output.tail.decode(errors="replace")
    gap = f"\n[{output.dropped_bytes} bytes left out]\n"
    return output.head.decode(errors="replace") + gap + output.tail.decode(errors="replace")


class CommandHandle:
    """A command that goes on by itself."""

    def __init__(self, process: RemoteProcess) -> None:
        self.process = process

    def __repr__(self) -> str:
        return f"CommandHandle(key={self.key!r})"

    @property
    def key(self) -> str:
        """Under which `commands.connect` finds it again."""
        return self.process.key

    @property
    def pid(self) -> int:
        """Its number in the sandbox; no pid of a kernel."""
        return self.process.number

    async def wait(
        self, *, check: bool = False, on_stdout: OnText | None = None, on_stderr: OnText | None = None
    ) -> CommandResult:
        """Its result; the callbacks get all its output from the first byte on, as text."""
        if on_stdout is None and on_stderr is None:
            return self.ended(await self.process.wait(), check=check)
        callbacks = {"stdout": on_stdout, "stderr": on_stderr}
        async for event in self.follow_text():
            if isinstance(event, CommandResult):
                return checked(self.process.command, event, check=check)
            callback = callbacks[event[0]]
            answer = None if callback is None else callback(event[1])
            if inspect.isawaitable(answer):
                await answer
        raise AssertionError("the output ends with the result")

    async def follow(self) -> AsyncIterator[tuple[Stream, bytes] | CommandResult]:
        """(`stdout` or `stderr`, bytes) from the first byte on as it comes; the last item is the result."""
        async for event in self.process.follow():
            yield self.ended(event) if isinstance(event, ExecResult) else event

    async def follow_text(self) -> AsyncIterator[tuple[Stream, str] | CommandResult]:
        """As `follow`, whole characters only, with U+FFFD for what is not UTF-8."""
        decoders = {stream: codecs.getincrementaldecoder("utf-8")("replace") for stream in STREAM_NUMBERS}
        async for event in self.follow():
            if isinstance(event, CommandResult):
                for stream, decoder in decoders.items():
                    if text := decoder.decode(b"", final=True):
                        yield stream, text
                yield event
            elif text := decoders[event[0]].decode(event[1]):
                yield event[0], text

    async def kill(self) -> None:
        """Kill its whole process tree."""
        await self.process.kill()

    async def send_signal(self, number: int) -> None:
        """To its process group."""
        await self.process.signal(number)

    async def send_stdin(self, data: bytes | str) -> None:
        """More input, for a command that was run with `stdin=True`; returns when it is in the pipe."""
        await self.process.write_stdin(data.encode() if isinstance(data, str) else data)

    async def close_stdin(self) -> None:
        """It sees end of file."""
        await self.process.close_stdin()

    async def resize(self, rows: int, columns: int) -> None:
        """Change its terminal's size."""
        await self.process.resize(rows, columns)

    async def read_output(self, stream: Stream = "stdout", offset: int = 0, bytes_max: int = OUTPUT_BYTES_MAX) -> bytes:
        """Output from an offset on: waits for the first byte there, b"" at the end.  OutOfRangeError."""
        return await self.process.read_output(stream, offset, bytes_max)

    def ended(self, result: ExecResult, *, check: bool = False) -> CommandResult:
        """What the Edge says of its end, as the caller gets it."""
        return checked(self.process.command, CommandResult(self.key, result), check=check)


class AsyncCommands:
    """`sandbox.commands`."""

    def __init__(self, sandbox: RemoteSandbox, envs: Mapping[str, str]) -> None:
        self._sandbox = sandbox
        self.envs = dict(envs)

    def make_command(
        self, cmd: str | Sequence[str], tty: TtySize | None = None, **options: Unpack[RunOptions]
    ) -> Command:
        """What `run` runs: a shell line or an argv; what it does not say is the sandbox's to say."""
        check_options(options, RunOptions)
        if cmd == "":
            raise InvalidArgumentError("the command line is empty: bash would run nothing, and say 0")
        stdin = options.get("stdin", b"")
        data = b"" if isinstance(stdin, bool) else stdin
        return Command(
            argv=(*SHELL, cmd) if isinstance(cmd, str) else tuple(cmd),
            cwd=options.get("cwd", ""),
            env={**self.envs, **options.get("envs", {})},
            stdin=data.encode() if isinstance(data, str) else data,
            timeout_s=options.get("timeout_s", TIMEOUT_S),
            output_bytes_max=options.get("output_bytes_max", OUTPUT_BYTES_MAX),
            merge_stderr=options.get("merge_stderr", False),
            user=options.get("user", ""),
            keep_stdin_open=stdin is True,
            tty=tty,
        )

    @overload
    async def run(
        self,
        cmd: str | Sequence[str],
        *,
        background: Literal[False] = False,
        key: str = "",
        check: bool = False,
        on_stdout: OnText | None = None,
        on_stderr: OnText | None = None,
        **options: Unpack[RunOptions],
    ) -> CommandResult: ...

    @overload
    async def run(
        self, cmd: str | Sequence[str], *, background: Literal[True], key: str = "", **options: Unpack[RunOptions]
    ) -> CommandHandle: ...

    @explains(RunOptions)
    async def run(
        self,
        cmd: str | Sequence[str],
        *,
        background: bool = False,
        key: str = "",
        check: bool = False,
        on_stdout: OnText | None = None,
        on_stderr: OnText | None = None,
        **options: Unpack[RunOptions],
    ) -> CommandResult | CommandHandle:
        """Run a shell line or an argv.

        With `background` a handle comes back at once.  The callbacks get output as text while the command
        runs.  With `check` CommandFailedError unless it ends with 0.  Under the same `key` the same result comes
        back for ever, and nothing runs twice.  `stdin=True` leaves the input open for `send_stdin`.
        Cancelling a foreground run kills the command.
        """
        command = self.make_command(cmd, **options)
        if background:
            return CommandHandle(await self._sandbox.start(command, key=key))
        if on_stdout is None and on_stderr is None:
            key = key or fresh_name()
            return checked(command, CommandResult(key, await self._sandbox.exec(command, key)), check=check)
        handle = CommandHandle(await self._sandbox.start(command, key=key))
        try:
            return await handle.wait(check=check, on_stdout=on_stdout, on_stderr=on_stderr)
        except asyncio.CancelledError:
            await asyncio.shield(handle.kill())
            raise

    async def list(self) -> list[CommandView]:
        """Every command of the sandbox, ended ones too, without their output."""
        return await self._sandbox.commands()

    async def connect(self, key: str) -> CommandHandle:
        """The command that was run under `key`, by whomever.  NotFoundError."""
        return CommandHandle(await self._sandbox.process(key))


class AsyncPty:
    """`sandbox.pty`: commands on a terminal."""

    def __init__(self, commands: AsyncCommands, sandbox: RemoteSandbox) -> None:
        self._commands = commands
        self._sandbox = sandbox

    @explains(RunOptions)
    async def create(
        self,
        cmd: str | Sequence[str] = ("bash", "-l"),
        *,
        rows: int = 24,
        columns: int = 80,
        key: str = "",
        **options: Unpack[RunOptions],
    ) -> CommandHandle:
        """Start a command on a terminal; type with `send_stdin`, read with `follow` or `wait(on_stdout=...)`."""
        options["envs"] = {"TERM": "xterm-256color", **options.get("envs", {})}
        options.setdefault("timeout_s", TTY_TIMEOUT_S)
        command = self._commands.make_command(cmd, TtySize(rows, columns), **options)
        return CommandHandle(await self._sandbox.start(command, key=key))


def checked(command: Command, result: CommandResult, *, check: bool) -> CommandResult:
    """The result; with `check`, CommandFailedError unless the command ended with 0."""
    if check and result.exit_code != 0:
        raise CommandFailedError(command, result)
    return result
