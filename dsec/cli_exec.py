"""Commands for what runs in a sandbox: `dsec exec`, `logs` and `trajectory`."""

from __future__ import annotations

import asyncio
import base64
import os
import shlex
import signal
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import click
import msgspec

from dsec.cli_sandbox import ENV_OPTION, connected, example
from dsec.client.commands import RunOptions
from dsec.client.sandbox import AsyncSandbox
from dsec.client.terminal import Printed, print_output, relay, terminal_size, write_all
from dsec.errors import DsecError, NotFoundError, OutcomeUnknownError, SandboxLostError, UnreachableError
from dsec.keyed import fresh_name
from dsec.terminal import render_columns, visible
from dsec.types import TOOLBOX, ExecResult, Stream
from dsec.views import CommandView

TIMEOUT_S_MAX = 7 * 86_400.0
FAILED_CODE = 125
"""As `docker run`: dsec itself failed, and the command's own exit code is not known."""

DIRECTORY_OPTION = click.option(
    "--directory",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="An Edge's state: read its journal there, without the Edge, also of what it has forgotten.",
)


class ExecCommand(click.Command):
    """Says 125 where dsec itself failed: every other code may be the command's."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Our options stand before ID or after it; from the command's name on, all is the command's own."""
        ctx.allow_interspersed_args = False
        options = click.Command(None, params=[one for one in self.params if isinstance(one, click.Option)])
        parser = options.make_parser(ctx)
        rest = parser.parse_args(list(args))[1]
        argv = parser.parse_args(rest[1:])[1]
        ours = [*args[: len(args) - len(rest)], *rest[1 : len(rest) - len(argv)]]
        return super().parse_args(ctx, [*(one for one in ours if one != "--"), "--", *rest[:1], *argv])

    def make_context(self, *args: Any, **options: Any) -> click.Context:
        """Parse; bad usage is a failure of ours."""
        try:
            return super().make_context(*args, **options)
        except click.UsageError as error:
            error.show()
            sys.exit(FAILED_CODE)

    def invoke(self, ctx: click.Context) -> object:
        """Run; an error of ours is a line on stderr and 125."""
        try:
            return super().invoke(ctx)
        except click.UsageError as error:
            error.show()
            sys.exit(FAILED_CODE)
        except DsecError as error:
            click.echo(f"dsec: {visible(str(error))}", err=True)
            sys.exit(FAILED_CODE)


@click.command(
    "exec",
    cls=ExecCommand,
    short_help="Run a command in a sandbox.",
    epilog=example(
        "dsec exec ID ls -l /",
        "dsec exec ID --timeout-s 60 --json -- bash -c 'make test 2>&1'",
        "dsec exec -it ID -- bash",
        "tar -c . | dsec exec -i ID -- tar -x -C /srv",
    ),
)
@click.option(
    "--timeout-s",
    type=click.FloatRange(0, TIMEOUT_S_MAX, min_open=True),
    default=TIMEOUT_S_MAX,
    help="Kill its tree after so long  [default: 7 days]",
)
@click.option("--key", default="", help="Run it once: the same key gives the same result for ever.")
@click.option("-w", "--cwd", default="", help="Where it runs  [default: the image's]")
@ENV_OPTION
@click.option("-u", "--user", default="", help="USER[:GROUP], names or numbers  [default: the image's]")
@click.option("-i", "--interactive", is_flag=True, help="Pass our stdin on.")
@click.option("-t", "--tty", "has_tty", is_flag=True, help="Give it a terminal.")
@click.option("-d", "--detach", is_flag=True, help="Print its key and leave it running.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object when it has ended.")
@click.argument("sandbox_id", metavar="ID")
@click.argument("argv", metavar="CMD...", nargs=-1, required=True, type=click.UNPROCESSED)
def exec_(
    sandbox_id: str,
    argv: Sequence[str],
    timeout_s: float,
    key: str,
    cwd: str,
    envs: dict[str, str],
    user: str,
    interactive: bool,
    has_tty: bool,
    detach: bool,
    as_json: bool,
) -> None:
    """Run a command in a sandbox; its output, and its exit code, are ours.

    Our options end where the command begins.  No shell is between: say `bash -c '...'` for one.  An interrupt kills the
    command.  Exit code 125: dsec itself failed, or the command ended with 0 and some of its output is missing here, as
    the Edge kept no more of it (64 MiB of each stream, DSEC_EDGE_SPOOL_BYTES_MAX); a line on stderr says how much.

    With --json: exit_code, stdout and stderr (base64, head and tail of 1 MiB), truncated, stdout_bytes and stderr_bytes
    (as they were), timed_out, oom, duration_s, key.
    """
    if has_tty and not os.isatty(0):
        raise click.UsageError("-t needs a terminal on stdin")
    if has_tty and (as_json or detach):
        raise click.UsageError("-t goes with neither --json nor --detach")
    options = RunOptions(cwd=cwd, envs=envs, user=user, timeout_s=timeout_s, stdin=interactive)
    key = key or fresh_name()

    async def run(sandbox: AsyncSandbox) -> Printed | str:
        if has_tty:
            size = terminal_size()
            handle = await sandbox.pty.create(argv, rows=size.rows, columns=size.columns, key=key, **options)
            return await relay(handle, feeds_stdin=interactive, has_tty=True)
        if as_json and not interactive:
            return Printed(await sandbox.commands.run(argv, key=key, **options), {})
        handle = await sandbox.commands.run(argv, background=True, key=key, **options)
        if detach:
            return handle.key
        return await relay(handle, feeds_stdin=interactive, has_tty=False, is_quiet=as_json)

    try:
        ended = _interruptible(connected(sandbox_id, run))
    except UnreachableError as error:
        raise UnreachableError(
            f"{error}\nif the command began, it runs on: once the Edge is back, ask `dsec logs {sandbox_id} {key}`"
        ) from error
    if isinstance(ended, str):
        click.echo(ended)
        return
    result = ended.result
    if as_json:
        click.echo(msgspec.json.encode(result_fields(result.raw) | {"key": result.key}))
        sys.exit(result.exit_code)
    if result.timed_out:
        click.echo(f"dsec: timed out after {timeout_s:g} s and was killed", err=True)
    elif result.oom_killed:
        click.echo(
            "dsec: the sandbox ran out of memory (dsec create --memory-mib), and processes were killed", err=True
        )
    missing_code = _missing_code(result.raw, ended.bytes_count)
    sys.exit(result.exit_code or missing_code)


def _missing_code(result: ExecResult, bytes_count: dict[Stream, int]) -> int:
    """0 if that is all that a command wrote; else 125, and a line that says how much is missing."""
    totals = {"stdout": result.stdout.total_bytes, "stderr": result.stderr.total_bytes}
    missing = [
        f"{totals[stream] - count} of the {totals[stream]} bytes of {stream}"
        for stream, count in bytes_count.items()
        if count < totals[stream]
    ]
    if not missing:
        return 0
    way = "let the command write to a file there, and take it with dsec cp"
    click.echo(f"dsec: {' and '.join(missing)} were not kept by the Edge and are missing here: {way}", err=True)
    return FAILED_CODE


def _interruptible(running: Any) -> Any:
    """What a coroutine gives; SIGINT and SIGTERM cancel it, and then end us with 130 or 143."""

    async def run() -> Any:
        task = asyncio.ensure_future(running)
        stopped_by: list[signal.Signals] = []

        def stop(number: signal.Signals) -> None:
            stopped_by.append(number)
            task.cancel()

        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            asyncio.get_running_loop().add_signal_handler(number, stop, number)
        try:
            return await task
        except asyncio.CancelledError:
            sys.exit(128 + (stopped_by or [signal.SIGTERM])[0])

    return asyncio.run(run())


def result_fields(result: ExecResult) -> dict[str, object]:
    """A result as JSON: output in base64, what was kept of it, and how long it was."""
    return {
        "exit_code": result.exit_code,
        "stdout": base64.b64encode(result.stdout.data).decode(),
        "stderr": base64.b64encode(result.stderr.data).decode(),
        "truncated": result.stdout.is_truncated or result.stderr.is_truncated,
        "stdout_bytes": result.stdout.total_bytes,
        "stderr_bytes": result.stderr.total_bytes,
        "timed_out": result.timed_out,
        "oom": result.oom_killed,
        "duration_s": result.duration_s,
    }


@click.command(short_help="Print the output of a command.", epilog=example("dsec logs ID KEY", "dsec logs ID 3"))
@click.argument("sandbox_id", metavar="ID")
@click.argument("key")
@DIRECTORY_OPTION
def logs(sandbox_id: str, key: str, directory: Path | None) -> None:
    """Print what a command wrote, from its first byte until it ends.

    KEY is the command's key or its number, as `dsec trajectory` shows them.  Of a sandbox that has ended there is what
    the Edge's journal kept: all, or head and tail.  Exit code 125: some of it is missing, and a line on stderr says how
    much.
    """
    if directory is not None:
        views = _recorded(directory, sandbox_id)
        sys.exit(_print_kept(_named(key, [view for view in views if _is_named(key, view)])))

    async def run(sandbox: AsyncSandbox) -> int:
        try:
            found = _named(key, await sandbox.commands.list())
        except SandboxLostError:
            return _print_kept(_named(key, [view async for view in sandbox.trajectory() if _is_named(key, view)]))
        printed = await print_output(await sandbox.commands.connect(found.key))
        return _missing_code(printed.result.raw, printed.bytes_count)

    sys.exit(_interruptible(connected(sandbox_id, run)))


def _recorded(directory: Path, sandbox_id: str) -> Iterator[CommandView]:
    from dsec.edge.history import read_trajectory  # here alone: the other commands need nothing of an Edge

    return read_trajectory(directory, sandbox_id)


def _is_named(key: str, view: CommandView) -> bool:
    return key in (view.key, f"#{view.number}", str(view.number))


def _named(key: str, views: Sequence[CommandView]) -> CommandView:
    """The command of that key, else of that number.  NotFoundError."""
    found = [view for view in views if _is_named(key, view)]
    if not found:
        raise NotFoundError(f"the sandbox has no command {key!r}: dsec trajectory names them")
    return max(found, key=lambda view: view.key == key)


def _print_kept(view: CommandView) -> int:
    if view.result is None:
        raise OutcomeUnknownError(f"command {view.key!r} has no known end: the journal has the output of what ended")
    out, err = view.result.stdout, view.result.stderr
    write_all(1, out.data)
    write_all(2, err.data)
    return _missing_code(view.result, {"stdout": len(out.data), "stderr": len(err.data)})


@click.command(
    short_help="Print every command of a sandbox and what came of it.",
    epilog=example(
        "dsec trajectory ID", "dsec trajectory ID --json | jq .key", "dsec trajectory ID --directory /var/lib/dsec"
    ),
)
@click.argument("sandbox_id", metavar="ID")
@DIRECTORY_OPTION
@click.option("--all", "shows_all", is_flag=True, help="Also the file operations, in the table.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object a line for each command.")
def trajectory(sandbox_id: str, directory: Path | None, shows_all: bool, as_json: bool) -> None:
    """Print every command of a sandbox and what came of it; it outlives the sandbox.

    STATE is how it ended, too: `timeout`, `oom` (a process was killed as the memory was used up), `killed` (SIGKILL).
    """

    async def run(sandbox: AsyncSandbox) -> list[CommandView]:
        return [view async for view in sandbox.trajectory()]

    views = asyncio.run(connected(sandbox_id, run)) if directory is None else list(_recorded(directory, sandbox_id))
    views.sort(key=lambda view: view.number)
    if as_json:
        for view in views:
            click.echo(msgspec.json.encode(_fields(view)))
        return
    shown = [view for view in views if shows_all or view.command.argv[:1] != (TOOLBOX,)]
    click.echo(render_columns(("NO", "KEY", "STATE", "EXIT", "SECONDS", "COMMAND"), list(map(_row, shown))))
    if len(shown) < len(views):
        click.echo(f"dsec: {len(views) - len(shown)} file operations left out (--all)", err=True)


def _fields(view: CommandView) -> dict[str, object]:
    command = view.command
    return {
        "number": view.number,
        "key": view.key,
        "state": view.state,
        "argv": list(map(printable, command.argv)),
        "cwd": printable(command.cwd),
        "env": {printable(name): printable(value) for name, value in command.env.items()},
        "user": command.user,
        "stdin_bytes": len(command.stdin),
        "timeout_s": command.timeout_s,
        **({} if view.result is None else result_fields(view.result)),
    }


def _row(view: CommandView) -> tuple[str, ...]:
    result = view.result
    how = ("", "") if result is None else (str(result.exit_code), f"{result.duration_s:.3f}")
    command = shlex.join(map(printable, view.command.argv))
    return str(view.number), view.key, _state(view), *how, command if len(command) <= 100 else command[:97] + "..."


def _state(view: CommandView) -> str:
    """In a word: 137 alone does not say who killed."""
    result = view.result
    if result is None:
        return view.state
    if result.timed_out:
        return "timeout"
    if result.oom_killed:
        return "oom"
    return "killed" if result.exit_code == 128 + signal.SIGKILL else view.state


def printable(text: str) -> str:
    """A text of the kernel's with its bytes that are not UTF-8 replaced."""
    return text.encode(errors="surrogateescape").decode(errors="replace")
