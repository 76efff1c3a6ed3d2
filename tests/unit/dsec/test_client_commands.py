"""What a Python user sees of commands and sandboxes: names, help, reprs, failures."""

from __future__ import annotations

import pytest

import dsec
from dsec.client.blocking import Commands, Pty, Sandbox
from dsec.client.commands import AsyncCommands, CommandFailedError, CommandResult, RunOptions, checked
from dsec.client.sandbox import AsyncSandbox, CreateOptions, LifeOptions
from dsec.errors import DsecError, InvalidArgumentError
from dsec.types import Command, ExecResult, Output

COMMAND = Command(argv=("make", "all"), timeout_s=2.5)


def test_the_package_offers_the_client_and_its_errors() -> None:
    assert {"Sandbox", "AsyncSandbox", "CommandResult", "CommandFailedError", "DsecError"} <= set(dir(dsec))
    assert [name for name in dir(dsec) if getattr(dsec, name).__name__ != name] == []
    with pytest.raises(AttributeError):
        dsec.Sandboxes  # noqa: B018
    assert issubclass(dsec.CommandFailedError, dsec.DsecError)


@pytest.mark.parametrize(
    ("function", "options"),
    [
        (AsyncSandbox.create, CreateOptions),
        (Sandbox.create, CreateOptions),
        (Sandbox.fork, LifeOptions),
        (AsyncSandbox.branch, LifeOptions),
        (AsyncCommands.run, RunOptions),
        (Commands.run, RunOptions),
        (Pty.create, RunOptions),
    ],
)
def test_help_names_every_option_and_its_default(function: object, options: type) -> None:
    explained = function.__doc__ or ""
    assert [name for name in options.__annotations__ if name not in explained] == []
    assert explained.count("default: ") >= len(options.__annotations__) - 2  # two share a line


@pytest.mark.parametrize(
    ("result", "said"),
    [
        (ExecResult(exit_code=2, stderr=Output(b" no rule\n")), "'make all' ended with 2: no rule"),
        (ExecResult(exit_code=2, stdout=Output(b"on a terminal\n")), "'make all' ended with 2: on a terminal"),
        (ExecResult(exit_code=137), "'make all' ended with 137"),
        (ExecResult(exit_code=137, oom_killed=True), "'make all' ended with 137, out of memory"),
        (ExecResult(exit_code=137, timed_out=True), "'make all' timed out after 2.5 s"),
    ],
)
def test_a_command_that_failed_says_how(result: ExecResult, said: str) -> None:
    with pytest.raises(DsecError) as caught:
        checked(COMMAND, CommandResult("k", result), check=True)
    assert isinstance(caught.value, CommandFailedError)
    assert (str(caught.value), caught.value.result.raw) == (said, result)


def test_a_result_is_shown_short() -> None:
    shown = repr(CommandResult("k", ExecResult(exit_code=137, stdout=Output(b"x" * 9999), oom_killed=True)))
    assert shown.startswith("CommandResult(exit_code=137, stdout='xxx")
    assert shown.endswith(", stderr='', oom_killed=True, key='k')")
    assert len(shown) < 300


def test_an_empty_command_line_is_refused() -> None:
    with pytest.raises(InvalidArgumentError, match="is empty"):
        AsyncCommands(None, {}).make_command("")  # type: ignore[arg-type]
