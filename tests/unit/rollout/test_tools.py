"""What the model reads: each case of the two tools, word for word as the checkpoint was taught."""

import pytest

from dsec.errors import InvalidArgumentError
from dsec.types import Command, ExecResult, Output
from rollout.environment.tools import FILE_BYTES_MAX, OBSERVATION_CHARACTERS_MAX, Observation, Place, use_tool
from toolcall_dsl import ToolCall

PLACE = Place("/app", {"PATH": "/usr/bin"}, 10.0)


class Files:
    """A `run` that serves the reads and writes of `edit` from a dictionary, and bash from a script."""

    def __init__(self, files: dict[str, bytes] | None = None, bash: ExecResult | None = None) -> None:
        self.files = files or {}
        self.bash = bash
        self.steps: list[str] = []

    async def __call__(self, step: str, command: Command) -> ExecResult:
        self.steps.append(step)
        assert (command.cwd, command.env, command.timeout_s) == ("/app", {"PATH": "/usr/bin"}, 10.0)
        if step == "bash":
            assert self.bash is not None
            return self.bash
        path = command.argv[-1]
        if step == "write":
            self.files[path] = command.stdin
            return ExecResult(exit_code=0)
        if path not in self.files:
            return ExecResult(exit_code=3)
        return ExecResult(exit_code=0, stdout=Output(head=self.files[path]))


async def bash(result: ExecResult) -> Observation:
    return await use_tool(ToolCall("bash", {"command": "true"}), PLACE, Files(bash=result))


@pytest.mark.parametrize(
    ("stdout", "exit_code", "text"),
    [
        (b"PASS\n", 0, "PASS"),
        (b"a\n\nb\n\n\n", 0, "a\n\nb"),
        (b"", 0, "(no output)"),
        (b"FAIL: got 1, want 2\n", 1, "FAIL: got 1, want 2\n[exit code 1]"),
        (b"", 2, "[exit code 2]"),
        (b"\xff\xfeok", 0, "\ufffd\ufffdok"),
    ],
)
async def test_bash_shows_output_and_a_failing_exit_code(stdout: bytes, exit_code: int, text: str) -> None:
    seen = await bash(ExecResult(exit_code=exit_code, stdout=Output(head=stdout)))
    assert (seen.text, seen.exit_code) == (text, exit_code)


async def test_bash_shows_at_most_the_first_1500_characters_and_counts_the_rest() -> None:
    seen = await bash(ExecResult(exit_code=0, stdout=Output(head=b"x" * 4000, tail=b"y" * 100, dropped_bytes=50)))
    assert seen.text == "x" * OBSERVATION_CHARACTERS_MAX
    assert seen.truncated_bytes == 4000 + 100 - OBSERVATION_CHARACTERS_MAX + 50


async def test_a_timeout_is_all_that_is_said_of_a_command_that_did_not_end() -> None:
    seen = await bash(ExecResult(exit_code=137, stdout=Output(head=b"partial"), timed_out=True))
    assert (seen.text, seen.timed_out) == ("[timeout]", True)


@pytest.mark.parametrize(
    ("name", "arguments", "text"),
    [
        ("browse", {}, "error: unknown tool browse"),
        ("bash", {}, "error: missing parameter 'command'"),
        ("edit", {"path": "a", "new": "x"}, "error: missing parameter 'old'"),
        ("bash", {"command": 3}, "error: parameter 'command' must be a string without NUL characters"),
        ("bash", {"command": "a\0b"}, "error: parameter 'command' must be a string without NUL characters"),
        ("bash", {"command": "x" * 100_001}, "error: command longer than 100000 bytes"),
        ("edit", {"path": "a", "old": "", "new": "x"}, "error: parameter 'old' is empty"),
    ],
)
async def test_a_call_that_cannot_run_touches_no_sandbox(name: str, arguments: dict[str, object], text: str) -> None:
    files = Files()
    assert (await use_tool(ToolCall(name, arguments), PLACE, files)).text == text
    assert files.steps == []


@pytest.mark.parametrize(
    ("content", "old", "text", "after"),
    [
        (b"a = 1\nb = 2\n", "a = 1", "ok", b"a = 9\nb = 2\n"),
        (b"a = 1\na = 1\n", "a = 1", "error: old text found 2 times", b"a = 1\na = 1\n"),
        (b"b = 2\n", "a = 1", "error: old text found 0 times", b"b = 2\n"),
        (b"\xff a = 1 \xfe", "a = 1", "ok", b"\xff a = 9 \xfe"),
    ],
)
async def test_edit_replaces_a_text_that_stands_exactly_once(content: bytes, old: str, text: str, after: bytes) -> None:
    files = Files({"f.py": content})
    seen = await use_tool(ToolCall("edit", {"path": "f.py", "old": old, "new": "a = 9"}), PLACE, files)
    assert seen.text == text
    assert files.files["f.py"] == after


async def test_a_command_that_the_sandbox_refuses_is_an_observation() -> None:
    async def refuse(step: str, command: Command) -> ExecResult:
        raise InvalidArgumentError(f"cwd {command.cwd!r}: No such file or directory")

    for call in (ToolCall("bash", {"command": "ls"}), ToolCall("edit", {"path": "a", "old": "b", "new": "c"})):
        assert (await use_tool(call, PLACE, refuse)).text == "error: cwd '/app': No such file or directory"


async def test_edit_refuses_a_file_over_its_bound() -> None:
    files = Files({"big": b"x" * FILE_BYTES_MAX + b"y"})
    seen = await use_tool(ToolCall("edit", {"path": "big", "old": "y", "new": "z"}), PLACE, files)
    assert seen.text == f"error: file larger than {FILE_BYTES_MAX} bytes"


async def test_edit_of_a_file_that_is_not_there_says_so() -> None:
    seen = await use_tool(ToolCall("edit", {"path": "no.py", "old": "a", "new": "b"}), PLACE, Files())
    assert seen.text == "error: no such file"
