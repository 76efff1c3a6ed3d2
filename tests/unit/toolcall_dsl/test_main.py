"""`python -m toolcall_dsl`: what it prints and how it exits; both streams are UTF-8, whatever the locale."""

from __future__ import annotations

import io
import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from toolcall_dsl import DIALECTS, Tokenizer, encode_text
from toolcall_dsl.__main__ import main

GOLDEN = Path(__file__).parents[2] / "golden/dsml"
VECTORS = [
    (path.stem, dialect, json.loads(path.read_text()))
    for folder, dialect in (("encode", "v4"), ("encode_0731", "v4-0731"))
    for path in sorted((GOLDEN / folder).glob("*.json"))
]
REQUEST: dict[str, Any] = {"messages": [{"role": "user", "content": "Hi"}], "thinking_mode": "chat"}
CALL = (
    '\n\n<｜DSML｜tool_calls>\n<｜DSML｜invoke name="bash">\n'
    '<｜DSML｜parameter name="command" string="true">ls\r\n é</｜DSML｜parameter>\n'
    "</｜DSML｜invoke>\n</｜DSML｜tool_calls><｜end▁of▁sentence｜>"
)


def run(argv: list[str], data: str | bytes) -> tuple[int, str]:
    """Exit code and standard output."""
    written = io.BytesIO()
    code = main(argv, stdin=io.BytesIO(data if isinstance(data, bytes) else data.encode()), stdout=written)
    return code, written.getvalue().decode()


def parsed(argv: list[str], data: str) -> dict[str, Any]:
    code, output = run(["parse", *argv], data)
    assert code == 0
    assert output.endswith("}\n")
    found: dict[str, Any] = json.loads(output)
    assert list(found) == ["reasoning", "content", "tool_calls", "error"]
    return found


@pytest.mark.parametrize(("name", "dialect", "vector"), VECTORS, ids=[name for name, _, _ in VECTORS])
def test_the_input_of_a_vector_is_a_request(
    name: str, dialect: str, vector: dict[str, Any], tokenizer: Tokenizer, tokenizer_file: Path
) -> None:
    request = json.dumps(vector["input"])
    assert run(["encode", "--dialect", dialect], request) == (0, vector["output_text"])
    code, output = run(["encode", "--dialect", dialect, "--ids", "--tokenizer", str(tokenizer_file)], request)
    assert code == 0
    assert tokenizer.decode(json.loads(output)) == vector["output_text"]


def test_a_request_may_declare_tools_and_a_format() -> None:
    tools = [{"type": "function", "function": {"name": "f"}}]
    code, output = run(["encode"], json.dumps({**REQUEST, "tools": tools, "response_format": {"type": "json"}}))
    assert code == 0
    assert output == encode_text(REQUEST["messages"], thinking=False, tools=tools, response_format={"type": "json"})


def test_a_field_of_a_message_that_is_null_is_not_given() -> None:
    message = {**REQUEST["messages"][0], "refusal": None}
    assert run(["encode"], json.dumps({**REQUEST, "messages": [message]})) == run(["encode"], json.dumps(REQUEST))


@pytest.mark.parametrize("dialect", DIALECTS)
def test_null_stands_for_an_option_that_is_not_given(dialect: str) -> None:
    request = {**REQUEST, "reasoning_effort": None, "context": None, "tools": None, "response_format": None}
    assert run(["encode", "--dialect", dialect], json.dumps(request)) == run(
        ["encode", "--dialect", dialect], json.dumps(REQUEST)
    )


def test_text_comes_out_as_it_went_in() -> None:
    content = "a\r\nb\rc\n é 🧑‍💻"
    code, output = run(["encode"], json.dumps({**REQUEST, "messages": [{"role": "user", "content": content}]}))
    assert (code, output) == (0, f"<｜begin▁of▁sentence｜><｜User｜>{content}<｜Assistant｜></think>")


def test_half_a_surrogate_pair_is_printed_as_the_replacement_sign() -> None:
    code, output = run(["encode"], '{"messages": [{"role": "user", "content": "\\ud800"}], "thinking_mode": "chat"}')
    assert (code, output) == (0, "<｜begin▁of▁sentence｜><｜User｜>\ufffd<｜Assistant｜></think>")


@pytest.mark.parametrize(
    ("argv", "data", "complaint"),
    [
        ([], "", "required: encode|parse"),
        (["decode"], "", "invalid choice: 'decode'"),
        (["encode", "--dialect", "v9"], "{}", "invalid choice: 'v9'"),
        (["encode", "--ids"], "{}", "--ids and --tokenizer FILE go together"),
        (["encode", "--tokenizer", "x.json"], "{}", "--ids and --tokenizer FILE go together"),
        (["encode", "--ids", "--tokenizer", "absent.json"], json.dumps(REQUEST), "absent.json: cannot be read"),
        (["encode"], "", "stdin: not JSON"),
        (["encode"], "{", "stdin: not JSON"),
        (["encode"], "[" * 100_000, "stdin: not JSON"),
        (["encode"], b"\xff", "stdin: not UTF-8 at byte 0"),
        (["encode"], b"\xef\xbb\xbf{}", "stdin: not JSON"),
        (["encode"], "[]", "the request must be a JSON object"),
        (["encode"], "{}", "messages is missing"),
        (["encode"], '{"messages": []}', "thinking_mode is missing"),
        (["encode"], '{"messages": {}, "thinking_mode": "chat"}', "messages must not be dict"),
        (["encode"], '{"messages": [], "thinking_mode": "loud"}', "thinking_mode must be one of chat, thinking"),
        (["encode"], '{"messages": [], "thinking_mode": null}', "thinking_mode must not be NoneType"),
        (["encode"], json.dumps({**REQUEST, "drop_thinking": "no"}), "drop_thinking must not be str"),
        (["encode"], json.dumps({**REQUEST, "drop_thinkng": False}), "unknown field 'drop_thinkng'"),
        (["encode"], json.dumps({**REQUEST, "reasoning_effort": "low"}), "'low' is none of high, max"),
        (["encode"], json.dumps({**REQUEST, "reasoning_effort": True}), "True is none of high, max"),
        (["encode"], json.dumps({**REQUEST, "context": [3]}), "context[0]: a message must be an object"),
        (["encode"], json.dumps({**REQUEST, "tools": [{}]}), "request: each tool must be an object"),
        (["encode"], json.dumps({**REQUEST, "messages": [{"role": "a\nb"}]}), "unknown role 'a\\nb'"),
        (
            ["encode"],
            json.dumps({**REQUEST, "messages": [{"role": "assistant", "content": "x", "tool_call": []}]}),
            "messages[0]: unknown field 'tool_call', expected content, content_blocks, mask",
        ),
        (
            ["encode"],
            json.dumps({**REQUEST, "context": [*REQUEST["messages"], {"role": "tool", "content": "", "nam\ne": "x"}]}),
            "context[1]: unknown field 'nam\\ne'",
        ),
        (["parse"], "", "required: --thinking-mode"),
        (["parse", "--thinking-mode", "chat", "--check"], "", "--check needs --tools FILE"),
        (["parse", "--thinking-mode", "max"], "", "invalid choice: 'max'"),
        (["parse", "--thinking-mode", "chat", "--policy", "lax"], "", "invalid choice: 'lax'"),
        (["parse", "--thinking-mode", "chat"], b"\xe4\xb8", "stdin: not UTF-8 at byte 0"),
        (
            ["parse", "--thinking-mode", "chat", "--tools", "absent.json"],
            "",
            "absent.json: cannot be read: No such file",
        ),
    ],
)
def test_bad_input_is_told_in_one_line(
    argv: list[str], data: str | bytes, complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(argv, data) == (2, "")
    told = capsys.readouterr().err
    assert told.startswith("toolcall_dsl: ")
    assert complaint in told
    assert told.count("\n") == 1


@pytest.mark.parametrize(
    ("content", "complaint"),
    [("{", "not JSON"), ("{}", "tools must be a list of objects"), ("[3]", "tools must be a list of objects")],
)
def test_a_file_that_holds_no_tools_is_named(
    content: str, complaint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "tools.json"
    path.write_text(content)
    assert run(["parse", "--thinking-mode", "chat", "--tools", str(path)], "") == (2, "")
    assert capsys.readouterr().err.startswith(f"toolcall_dsl: {path}: {complaint}")


def test_a_completion_is_read_into_its_parts() -> None:
    found = parsed(["--thinking-mode", "thinking"], f"why</think>Now.{CALL}")
    call = {"name": "bash", "arguments": {"command": "ls\r\n é"}, "status": "ok"}
    assert found == {"reasoning": "why", "content": "Now.", "tool_calls": [call], "error": None}


def test_a_broken_completion_is_an_answer_too() -> None:
    error = parsed(["--thinking-mode", "chat", "--policy", "strict"], "one\ntwo")["error"]
    assert list(error) == ["rule", "offset", "line", "column", "excerpt", "message"]
    assert (error["rule"], error["offset"], error["line"], error["column"]) == ("missing-eos", 7, 2, 4)


def test_the_policy_and_the_dialect_decide_what_is_accepted() -> None:
    spaced = re.sub("｜DSML｜", "｜DSML｜ ", CALL).replace("tool_calls", "calls")
    for dialect, completion in (("v4", CALL), ("v4.1", spaced)):
        argv = ["--thinking-mode", "chat", "--dialect", dialect]
        assert [call["status"] for call in parsed(argv, completion)["tool_calls"]] == ["ok"]
        bare = completion.removeprefix("\n\n").replace("tool_calls", "toolcalls", 1).replace(" calls", "toolcalls", 1)
        assert parsed(argv, bare)["tool_calls"] == []
        assert [call["status"] for call in parsed([*argv, "--policy", "tolerant"], bare)["tool_calls"]] == ["recovered"]


def test_tools_tell_a_wrapper_from_a_parameter(tmp_path: Path) -> None:
    wrapped = CALL.replace('name="command" string="true">ls\r\n é', 'name="arguments" string="false">{"command": "ls"}')
    schema = {"type": "object", "properties": {"command": {"type": "string"}}}
    path = tmp_path / "tools.json"
    path.write_text(json.dumps([{"type": "function", "function": {"name": "bash", "parameters": schema}}]))
    argv = ["--thinking-mode", "chat", "--policy", "tolerant"]
    assert parsed(argv, wrapped)["tool_calls"][0]["arguments"] == {"arguments": {"command": "ls"}}
    assert parsed([*argv, "--tools", str(path)], wrapped)["tool_calls"][0]["arguments"] == {"command": "ls"}


@pytest.mark.parametrize("depth", [10, 900, 960, 980, 990, 1000, 5000])
def test_a_deep_value_is_data_or_an_error_but_no_crash(depth: int) -> None:
    value = "[" * depth + "]" * depth
    completion = CALL.replace('string="true">ls\r\n é', f'string="false">{value}')
    found = parsed(["--thinking-mode", "chat"], completion)
    assert (found["error"] is None) == (len(found["tool_calls"]) == 1)


@pytest.mark.parametrize("depth", [10, 900, 960, 980, 990, 1000, 5000])
def test_a_deep_request_is_encoded_or_refused_but_no_crash(depth: int) -> None:
    deep = "[" * depth + "]" * depth
    for message in (
        f'{{"role": "system", "tools": [{{"function": {{"parameters": {deep}}}}}]}}',
        f'{{"role": "system", "response_format": {deep}}}',
        f'{{"role": "assistant", "tool_calls": [{{"function": {{"name": "f", "arguments": {{"a": {deep}}}}}}}]}}',
        f'{{"role": "tool", "content": [{{"type": {deep}}}]}}',
        f'{{"role": {deep}}}',
    ):
        code, output = run(["encode"], f'{{"messages": [{message}], "thinking_mode": "chat"}}')
        assert (code == 0) == bool(output)


@pytest.mark.parametrize("command", ["encode", "parse"])
def test_help_shows_an_example_that_works(command: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main([command, "--help"]) == 0
    told = capsys.readouterr().out
    assert told.isascii()
    example = told.split("example:\n")[1].split("\n")[0].strip().replace("python", sys.executable)
    done = subprocess.run(["/bin/sh", "-c", example], capture_output=True, check=True, cwd=tmp_path)
    assert done.stdout.decode() in {
        "<｜begin▁of▁sentence｜><｜User｜>Hi<｜Assistant｜></think>",
        '{"reasoning": "Easy.", "content": "It is 4.", "tool_calls": [], "error": null}\n',
    }


def test_a_locale_without_unicode_changes_nothing() -> None:
    request = json.dumps({**REQUEST, "messages": [{"role": "user", "content": "温\r\n泉"}]}, ensure_ascii=False)
    environment = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = subprocess.run(
        [sys.executable, "-m", "toolcall_dsl", "encode"],
        input=request.encode(),
        capture_output=True,
        check=True,
        env=environment,
    )
    assert done.stdout.decode() == "<｜begin▁of▁sentence｜><｜User｜>温\r\n泉<｜Assistant｜></think>"


def test_a_reader_that_is_gone_has_not_got_the_answer(capsys: pytest.CaptureFixture[str]) -> None:
    read_end, write_end = os.pipe()
    os.close(read_end)
    with os.fdopen(write_end, "wb") as stdout:
        assert main(["encode"], stdin=io.BytesIO(json.dumps(REQUEST).encode()), stdout=stdout) == 1
    assert capsys.readouterr().err == "toolcall_dsl: stdout: the answer was not written: Broken pipe\n"


@pytest.mark.parametrize(
    ("redirection", "code", "complaint"),
    [
        ("> /dev/full", 1, "stdout: the answer was not written: No space left on device"),
        (">&-", 1, "stdout: is closed"),
        ("<&-", 2, "stdin: is closed"),
        ("0> /dev/null", 2, "stdin: cannot be read: Bad file descriptor"),
    ],
)
def test_a_stream_that_fails_is_told_in_one_line(redirection: str, code: int, complaint: str) -> None:
    command = f'"{sys.executable}" -m toolcall_dsl encode {redirection}'
    done = subprocess.run(
        ["/bin/sh", "-c", command], input=json.dumps(REQUEST).encode(), capture_output=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr.decode()) == (code, b"", f"toolcall_dsl: {complaint}\n")


def test_streams_that_a_caller_closed_are_told_too(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with os.fdopen(os.open(os.devnull, os.O_WRONLY), "rb") as unreadable:
        assert main(["encode"], stdin=unreadable) == 2
    monkeypatch.setattr(sys, "stdin", None)
    assert main(["encode"]) == 2
    monkeypatch.setattr(sys, "stdout", None)
    assert main(["encode"], stdin=io.BytesIO(json.dumps(REQUEST).encode())) == 1
    assert [line.split(": ")[1] for line in capsys.readouterr().err.splitlines()] == ["stdin", "stdin", "stdout"]


@pytest.mark.parametrize(
    ("policy", "value", "status", "problems"),
    [
        ("strict", "3", "ok", []),
        ("strict", '"3"', "ok", [{"path": "days", "expected": "integer", "found": '"3"'}]),
        ("tolerant", '"3"', "converted", []),
        ("tolerant", '"three"', "ok", [{"path": "days", "expected": "integer", "found": '"three"'}]),
    ],
)
def test_a_call_is_checked_against_its_schema_if_that_is_asked_for(
    policy: str, value: str, status: str, problems: list[dict[str, str]], tmp_path: Path
) -> None:
    schema = {"type": "object", "properties": {"days": {"type": "integer"}}}
    path = tmp_path / "tools.json"
    path.write_text(json.dumps([{"type": "function", "function": {"name": "bash", "parameters": schema}}]))
    completion = CALL.replace('name="command" string="true">ls\r\n é', f'name="days" string="false">{value}')
    argv = ["--thinking-mode", "chat", "--policy", policy, "--tools", str(path)]
    (plain,) = parsed(argv, completion)["tool_calls"]
    assert plain == {"name": "bash", "arguments": {"days": json.loads(value)}, "status": "ok"}
    (checked,) = parsed([*argv, "--check"], completion)["tool_calls"]
    days = 3 if status == "converted" else json.loads(value)
    assert checked == {"name": "bash", "arguments": {"days": days}, "status": status, "problems": problems}


def test_tools_that_cannot_be_checked_against_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "tools.json"
    path.write_text('[{"name": "bash"}]')
    assert run(["parse", "--thinking-mode", "chat", "--tools", str(path), "--check"], CALL) == (2, "")
    assert "tools[0]: must be an object with function.name" in capsys.readouterr().err


def test_the_exit_code_is_that_of_the_process(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["toolcall_dsl", "encode", "--dialect", "v9"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(main.__code__.co_filename, run_name="__main__")
    assert stop.value.code == 2
    assert "'v9'" in capsys.readouterr().err
