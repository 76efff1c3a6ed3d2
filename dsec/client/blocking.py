"""`Sandbox`: the same as `AsyncSandbox`, for programs without an event loop.

    with Sandbox.create() as sandbox:
        print(sandbox.commands.run("echo hello").stdout)

See: dsec/client/loop.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Literal, Self, Unpack, overload

from dsec.client.blocking_files import BlockingFiles
from dsec.client.commands import AsyncCommands, AsyncPty, CommandHandle, CommandResult, RunOptions, checked, explains
from dsec.client.loop import LOOP
from dsec.client.sandbox import AsyncSandbox, CreateOptions, LifeOptions, Network
from dsec.types import OUTPUT_BYTES_MAX, LayerId, SandboxId, Stream
from dsec.views import CommandView, SandboxView

OnTextNow = Callable[[str], None]


class Handle:
    """As `CommandHandle`."""

    def __init__(self, handle: CommandHandle) -> None:
        self._handle = handle

    def __repr__(self) -> str:
        return f"Handle(key={self.key!r})"

    @property
    def key(self) -> str:
        """Under which `commands.connect` finds it again."""
        return self._handle.key

    @property
    def pid(self) -> int:
        """Its number in the sandbox; no pid of a kernel."""
        return self._handle.pid

    def wait(
        self, *, check: bool = False, on_stdout: OnTextNow | None = None, on_stderr: OnTextNow | None = None
    ) -> CommandResult:
        """Its result; the callbacks are called on this thread."""
        if on_stdout is None and on_stderr is None:
            return LOOP.run(self._handle.wait(check=check))
        callbacks = {"stdout": on_stdout, "stderr": on_stderr}
        for event in LOOP.iterate(self._handle.follow_text()):
            if isinstance(event, CommandResult):
                return checked(self._handle.process.command, event, check=check)
            callback = callbacks[event[0]]
            if callback is not None:
                callback(event[1])
        raise AssertionError("the output ends with the result")

    def follow(self) -> Iterator[tuple[Stream, bytes] | CommandResult]:
        """(`stdout` or `stderr`, bytes) from the first byte on as it comes; the last item is the result."""
        return LOOP.iterate(self._handle.follow())

    def kill(self) -> None:
        """Kill its whole process tree."""
        LOOP.run(self._handle.kill())

    def send_signal(self, number: int) -> None:
        """To its process group."""
        LOOP.run(self._handle.send_signal(number))

    def send_stdin(self, data: bytes | str) -> None:
        """More input, for a command that was run with `stdin=True`; returns when it is in the pipe."""
        LOOP.run(self._handle.send_stdin(data))

    def close_stdin(self) -> None:
        """It sees end of file."""
        LOOP.run(self._handle.close_stdin())

    def resize(self, rows: int, columns: int) -> None:
        """Change its terminal's size."""
        LOOP.run(self._handle.resize(rows, columns))

    def read_output(self, stream: Stream = "stdout", offset: int = 0, bytes_max: int = OUTPUT_BYTES_MAX) -> bytes:
        """Output from an offset on: waits for the first byte there, b"" at the end.  OutOfRangeError."""
        return LOOP.run(self._handle.read_output(stream, offset, bytes_max))


class Commands:
    """As `AsyncCommands`."""

    def __init__(self, commands: AsyncCommands) -> None:
        self._commands = commands

    @overload
    def run(
        self,
        cmd: str | Sequence[str],
        *,
        background: Literal[False] = False,
        key: str = "",
        check: bool = False,
        on_stdout: OnTextNow | None = None,
        on_stderr: OnTextNow | None = None,
        **options: Unpack[RunOptions],
    ) -> CommandResult: ...

    @overload
    def run(
        self, cmd: str | Sequence[str], *, background: Literal[True], key: str = "", **options: Unpack[RunOptions]
    ) -> Handle: ...

    @explains(RunOptions)
    def run(
        self,
        cmd: str | Sequence[str],
        *,
        background: bool = False,
        key: str = "",
        check: bool = False,
        on_stdout: OnTextNow | None = None,
        on_stderr: OnTextNow | None = None,
        **options: Unpack[RunOptions],
    ) -> CommandResult | Handle:
        """Run a shell line or an argv.

        With `background` a handle comes back at once.  The callbacks get output as text while the command runs, on this
        thread.  With `check` CommandFailedError unless it ends with 0.  Under the same `key` the same result comes back
        for ever, and nothing runs twice.
        """
        if not background and on_stdout is None and on_stderr is None:
            return LOOP.run(self._commands.run(cmd, key=key, check=check, **options))
        handle = Handle(LOOP.run(self._commands.run(cmd, background=True, key=key, **options)))
        if background:
            return handle
        try:
            return handle.wait(check=check, on_stdout=on_stdout, on_stderr=on_stderr)
        except KeyboardInterrupt:
            handle.kill()
            raise

    def list(self) -> list[CommandView]:
        """Every command of the sandbox, ended ones too, without their output."""
        return LOOP.run(self._commands.list())

    def connect(self, key: str) -> Handle:
        """The command that was run under `key`, by whomever.  NotFoundError."""
        return Handle(LOOP.run(self._commands.connect(key)))


class Pty:
    """As `AsyncPty`."""

    def __init__(self, pty: AsyncPty) -> None:
        self._pty = pty

    @explains(RunOptions)
    def create(
        self,
        cmd: str | Sequence[str] = ("bash", "-l"),
        *,
        rows: int = 24,
        columns: int = 80,
        key: str = "",
        **options: Unpack[RunOptions],
    ) -> Handle:
        """Start a command on a terminal; type with `send_stdin`, read with `follow`."""
        return Handle(LOOP.run(self._pty.create(cmd, rows=rows, columns=columns, key=key, **options)))


class Sandbox:
    """As `AsyncSandbox`; made by `create` and `connect`, ended by `kill` or at the end of `with`."""

    def __init__(self, sandbox: AsyncSandbox) -> None:
        self._sandbox = sandbox
        self.commands = Commands(sandbox.commands)
        self.files = BlockingFiles(sandbox.files)
        self.pty = Pty(sandbox.pty)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.id}>"

    @classmethod
    @explains(CreateOptions, LifeOptions)
    def create(cls, base: str = "host", *, url: str = "", token: str = "", **options: Unpack[CreateOptions]) -> Self:
        """A fresh sandbox of the Edge at `url` (default: DSEC_API_URL, else this host's Edge), ready for commands.

        `base` is "host", a layer with an operating system, or the name of an image that has one or lies over "host".
        """
        return cls(LOOP.run(AsyncSandbox.create(base, url=url, token=token, **options)))

    @classmethod
    def connect(cls, sandbox_id: str, *, url: str = "", token: str = "", envs: Mapping[str, str] | None = None) -> Self:
        """A sandbox that lives.  NotFoundError, SandboxLostError."""
        return cls(LOOP.run(AsyncSandbox.connect(sandbox_id, url=url, token=token, envs=envs)))

    @classmethod
    def list(cls, metadata: Mapping[str, str] | None = None, *, url: str = "", token: str = "") -> list[SandboxView]:
        """Living sandboxes that have all of `metadata`."""
        return LOOP.run(AsyncSandbox.list(metadata, url=url, token=token))

    @property
    def id(self) -> SandboxId:
        """Names it for ever."""
        return self._sandbox.id

    def view(self) -> SandboxView:
        """Its state, limits and labels."""
        return LOOP.run(self._sandbox.view())

    def kill(self) -> None:
        """End it, and all that runs in it; safe to call twice."""
        LOOP.run(self._sandbox.kill())

    def close(self) -> None:
        """Let it live, and disconnect; safe to call twice."""
        LOOP.run(self._sandbox.close())

    def pause(self) -> None:
        """Stop all that runs in it and give its memory back; the next command resumes it."""
        LOOP.run(self._sandbox.pause())

    def resume(self) -> None:
        """Let it go on."""
        LOOP.run(self._sandbox.resume())

    def snapshot(self, name: str = "") -> LayerId:
        """What was written in it, as a layer: `create(layers=[layer])` goes on from there; with a name, an image."""
        return LOOP.run(self._sandbox.snapshot(name))

    @explains(LifeOptions)
    def fork(self, count: int = 1, **options: Unpack[LifeOptions]) -> Sequence[Self]:
        """Sandboxes that go on from what was written in this one: all of them, or none and an error."""
        return [type(self)(fork) for fork in LOOP.run(self._sandbox.fork(count, **options))]

    @explains(LifeOptions)
    def branch(self, key: str, **options: Unpack[LifeOptions]) -> Self:
        """A sandbox in the state after the command that was run under `key`; works after this one's end, too."""
        return type(self)(LOOP.run(self._sandbox.branch(key, **options)))

    def update_network(self, network: Network) -> None:
        """Replace its allowlist; connections that it no longer allows are closed."""
        LOOP.run(self._sandbox.update_network(network))

    def trajectory(self) -> Iterator[CommandView]:
        """Every command and what came of it, in order; it outlives the sandbox."""
        return LOOP.iterate(self._sandbox.trajectory())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()
