"""`python -m toolcall_dsl encode|parse`: conversations to prompts and completions to calls, from stdin to stdout.

A contract for programs in any language, so it depends on nothing of its surroundings: stdin and
stdout are UTF-8 whatever the locale says, and no line break is translated.  Exit codes: 0 the
answer is on stdout (a completion that breaks the format is an answer), 1 stdout did not take it
whole, 2 bad usage or bad input; 1 and 2 are told in one line on stderr.

See: docs/formats/toolcall_dsl.md, "Command line".
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO, NoReturn, get_args

from toolcall_dsl.dialect import DIALECTS, V4
from toolcall_dsl.encode import encode, encode_text
from toolcall_dsl.errors import DslError
from toolcall_dsl.messages import FIELDS
from toolcall_dsl.parser import parse_text
from toolcall_dsl.pieces import token_ids_of
from toolcall_dsl.schema import ToolChecker
from toolcall_dsl.tokenizer import Tokenizer, valid_text
from toolcall_dsl.types import Policy, ToolCall

MODES = ("chat", "thinking")

_ENCODE_HELP = """\
Reads one JSON object from stdin and prints the prompt, without a line break of its own.

fields:
  messages                list, required
  thinking_mode           "chat" or "thinking", required
  reasoning_effort        one that the dialect knows, or null for its default
  drop_thinking           true or false (true)
  add_default_bos_token   true or false (true)
  context                 list of messages that were encoded before
  tools, response_format  what the request declares, for the first system message

example:
  echo '{"messages": [{"role": "user", "content": "Hi"}], "thinking_mode": "chat"}' | python -m toolcall_dsl encode
"""

_PARSE_HELP = """\
Reads a completion from stdin, as text in which control tokens are spelled, and prints one JSON object:
{"reasoning", "content", "tool_calls": [{"name", "arguments", "status"}], "error"}, error null or
{"rule", "offset", "line", "column", "excerpt", "message"}.

Without --check, --tools checks nothing: it only serves the tolerant policy, to tell one parameter that wraps all
arguments from a real one. With --check each call has "problems" too, a list of {"path", "expected", "found"}, empty
for a call that fits its schema; under the tolerant policy values are converted where that makes a call fit.

example:
  printf 'Easy.</think>It is 4.' | python -m toolcall_dsl parse --thinking-mode thinking --policy tolerant
"""

_FIELDS: Mapping[str, tuple[type, ...]] = {
    "messages": (list,),
    "thinking_mode": (str,),
    "reasoning_effort": (str, int, type(None)),
    "drop_thinking": (bool,),
    "add_default_bos_token": (bool,),
    "context": (list, type(None)),
    "tools": (list, type(None)),
    "response_format": (object,),
}


class _BadInputError(Exception):
    """What is wrong with the arguments, a file or stdin."""


class _Parser(argparse.ArgumentParser):
    """An argument parser whose complaint is one line."""

    def error(self, message: str) -> NoReturn:
        raise _BadInputError(f"{message} (see --help)")


def main(argv: Sequence[str] | None = None, *, stdin: BinaryIO | None = None, stdout: BinaryIO | None = None) -> int:
    """Run the command and return its exit code; streams are those of the process unless given."""
    try:
        options = _parser().parse_args(argv)
        answer = valid_text(options.run(options, _process_stdin() if stdin is None else stdin)).encode()
    except SystemExit as stop:  # --help has been printed; main returns codes
        return int(stop.code or 0)
    except (_BadInputError, DslError) as error:
        return _refusal(str(error), 2)
    if stdout is None and sys.stdout is None:
        return _refusal("stdout: is closed", 1)
    sink = sys.stdout.buffer if stdout is None else stdout
    try:
        sink.write(answer)
        sink.flush()
    except OSError as error:
        # What is left in the buffer must not fail again, and louder, when the process ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sink.fileno())
        return _refusal(f"stdout: the answer was not written: {error.strerror}", 1)
    return 0


def _refusal(why: str, code: int) -> int:
    print(f"toolcall_dsl: {' '.join(why.split())}", file=sys.stderr)
    return code


def _parser() -> _Parser:
    parser = _Parser(prog="python -m toolcall_dsl", description="DeepSeek-V4's chat encoding and tool-call language.")
    commands = parser.add_subparsers(required=True, metavar="encode|parse", dest="command")
    raw = argparse.RawDescriptionHelpFormatter
    encoding = commands.add_parser("encode", help="messages to a prompt", description=_ENCODE_HELP, formatter_class=raw)
    encoding.add_argument("--ids", action="store_true", help="print token ids, a JSON list, instead of text")
    encoding.add_argument("--tokenizer", type=Path, metavar="FILE", help="a tokenizers JSON, for --ids")
    encoding.set_defaults(run=_encode)
    parsing = commands.add_parser("parse", help="a completion to calls", description=_PARSE_HELP, formatter_class=raw)
    parsing.add_argument("--thinking-mode", choices=MODES, required=True, help="the header that the completion follows")
    parsing.add_argument("--policy", choices=get_args(Policy), default="strict", help="default: strict")
    parsing.add_argument(
        "--tools", type=Path, metavar="FILE", help="a JSON list of the tools that were declared; see above"
    )
    parsing.add_argument("--check", action="store_true", help="check each call against the schemas of --tools")
    parsing.set_defaults(run=_parse)
    for command in (encoding, parsing):
        command.add_argument("--dialect", choices=tuple(DIALECTS), default=V4.name, help=f"default: {V4.name}")
    return parser


def _encode(options: argparse.Namespace, source: BinaryIO) -> str:
    if options.ids != (options.tokenizer is not None):
        raise _BadInputError("--ids and --tokenizer FILE go together")
    request = _request(_input(source))
    messages, thinking = request.pop("messages"), request.pop("thinking_mode") == "thinking"
    request["dialect"] = DIALECTS[options.dialect]
    if options.tokenizer is None:
        return encode_text(messages, thinking=thinking, **request)
    segments = encode(messages, Tokenizer.from_file(options.tokenizer), thinking=thinking, **request)
    return json.dumps(token_ids_of(segments)) + "\n"


def _request(text: str) -> dict[str, Any]:
    """The keywords of `encode` out of a request."""
    request = _json(text, "stdin")
    if not isinstance(request, dict):
        raise _BadInputError("stdin: the request must be a JSON object")
    for name, value in request.items():
        if name not in _FIELDS:
            raise _BadInputError(f"stdin: unknown field {name[:40]!r}, expected {', '.join(_FIELDS)}")
        if not isinstance(value, _FIELDS[name]):
            raise _BadInputError(f"stdin: {name} must not be {type(value).__name__}")
    for name in ("messages", "thinking_mode"):
        if name not in request:
            raise _BadInputError(f"stdin: {name} is missing")
    for name in ("messages", "context"):
        _refuse_unknown_fields(name, request.get(name) or ())
    if request["thinking_mode"] not in MODES:
        raise _BadInputError(f"stdin: thinking_mode must be one of {', '.join(MODES)}")
    return {name: value for name, value in request.items() if value is not None}


def _refuse_unknown_fields(name: str, messages: Sequence[object]) -> None:
    """A misspelled field must not be lost; what is null is not given (clients dump all that they know)."""
    for index, message in enumerate(messages):
        given = message.items() if isinstance(message, dict) else ()
        unknown = next((key for key, value in given if key not in FIELDS and value is not None), None)
        if unknown is not None:
            known = ", ".join(sorted(FIELDS))
            raise _BadInputError(f"stdin: {name}[{index}]: unknown field {unknown[:40]!r}, expected {known}")


def _parse(options: argparse.Namespace, source: BinaryIO) -> str:
    if options.check and options.tools is None:
        raise _BadInputError("--check needs --tools FILE")
    tools: list[dict[str, object]] | None = None
    if options.tools is not None:
        tools = _json(_text(_bytes(options.tools), str(options.tools)), str(options.tools))
        if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
            raise _BadInputError(f"{options.tools}: tools must be a list of objects")
    checker = ToolChecker(tools or ()) if options.check else None
    turn = parse_text(
        _input(source),
        thinking=options.thinking_mode == "thinking",
        policy=options.policy,
        tools=tools,
        dialect=DIALECTS[options.dialect],
    )
    calls = [_shown(call) if checker is None else _checked(call, checker, options.policy) for call in turn.calls]
    error = None if turn.error is None else asdict(turn.error)
    shown = {"reasoning": turn.reasoning, "content": turn.content, "tool_calls": calls, "error": error}
    return json.dumps(shown, ensure_ascii=False) + "\n"


def _shown(call: ToolCall) -> dict[str, Any]:
    return {"name": call.name, "arguments": call.arguments, "status": call.status.value}


def _checked(call: ToolCall, checker: ToolChecker, policy: Policy) -> dict[str, Any]:
    """The call that would run, and what does not fit."""
    checked = checker.check(call, policy=policy)
    return {**_shown(checked.call), "problems": [asdict(problem) for problem in checked.problems]}


def _process_stdin() -> BinaryIO:
    if sys.stdin is None:
        raise _BadInputError("stdin: is closed")
    return sys.stdin.buffer


def _input(source: BinaryIO) -> str:
    try:
        data = source.read()
    except OSError as error:
        raise _BadInputError(f"stdin: cannot be read: {error.strerror}") from error
    return _text(data, "stdin")


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise _BadInputError(f"{path}: cannot be read: {error.strerror}") from error


def _text(data: bytes, where: str) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise _BadInputError(f"{where}: not UTF-8 at byte {error.start}") from error


def _json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _BadInputError(f"{where}: not JSON: {error}") from error


if __name__ == "__main__":
    sys.exit(main())
