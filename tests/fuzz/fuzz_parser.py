"""A coverage-guided fuzz target for the parser: bytes become tokens, and every law must hold for them.

Needs atheris (tests/external/run installs it):

    python tests/fuzz/fuzz_parser.py [--corpus DIR] [libFuzzer options, for example -runs=20000 or a crash file]

The first byte chooses mode, policy and dialect, the second how the turn is cut; each further byte is one token or one
piece of markup.  Seeds are made of the parse vectors.  What was found worth keeping lies in the corpus directory.
"""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator, Sequence
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    import atheris

    with atheris.instrument_imports(include=["toolcall_dsl"]):
        importlib.import_module("toolcall_dsl.testing")

from toolcall_dsl import (
    DIALECTS,
    RULES,
    ArgumentsText,
    CallFinished,
    Dialect,
    ParsedTurn,
    ParseStatus,
    StreamParser,
    Tokenizer,
    ToolChecker,
    TurnEvent,
    TurnFailed,
    parse,
    parse_text,
    turn_of,
)
from toolcall_dsl.scanner import UNDECIDED_UNITS_MAX
from toolcall_dsl.testing import joined, sampled_ids

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = ROOT / "tests/golden/dsml/parse"
DIALECT_LIST: list[Dialect] = list(DIALECTS.values())
SCHEMA = {"properties": {"a": {"type": "integer"}, "b": {"type": ["string", "null"]}}, "required": ["a"]}
TOOLS: list[dict[str, Any]] = [{"function": {"name": "f", "parameters": SCHEMA}}]
CHECKER = ToolChecker(TOOLS)
FIRST_PIECE = 0xC0
"""Bytes below are tokens of one byte each, bytes from here on are pieces of markup."""


@cache
def byte_tokenizer() -> Tokenizer:
    """A vocabulary of all bytes (in the byte-level alphabet) and every control token of the dialects."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(0x100) if byte not in printable]
    vocabulary = {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}
    controls = dict.fromkeys(token for dialect in DIALECT_LIST for token in dialect.control_tokens)
    added = [
        {"id": 0x100 + i, "content": token, "special": False, "normalized": False, "single_word": False}
        | {"lstrip": False, "rstrip": False}
        for i, token in enumerate([*controls, "<｜unknown｜>"])
    ]
    model = {"type": "BPE", "vocab": vocabulary, "merges": []}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    definition = {"version": "1.0", "added_tokens": added, "pre_tokenizer": byte_level, "decoder": byte_level}
    return Tokenizer(json.dumps({**definition, "model": model}), "bytes")


@cache
def pieces_of(name: str) -> tuple[str, ...]:
    """The markup of a dialect that one byte stands for; longest first, so that seeds can be cut into pieces."""
    dialect = DIALECTS[name]
    tag, end = f"<{dialect.dsml}", f"</{dialect.dsml}"
    block, invoke, parameter = dialect.block_name, dialect.invoke_name, dialect.parameter_name
    openers = (f"\n\n{tag}{block}>\n", f'{tag}{invoke} name="f">\n', f'{tag}{invoke} name="', f"{tag}toolcalls>")
    values = tuple(f'{tag}{parameter} name="{name}" string="{flag}">' for name in "ab" for flag in ("true", "false"))
    wrappers = (f'{tag}{parameter} name="arguments" string="false">', f'{tag}{parameter} name="')
    closers = tuple(f"{end}{name}{rest}" for name in (block, invoke, parameter) for rest in (">\n", ">", ""))
    parts = (*openers, *values, *wrappers, *closers, '" string="true">', '{"a": 1}', "[1, ", "🧑", "<｜unknown｜>")
    return tuple(sorted(dict.fromkeys((*parts, *dialect.control_tokens)), key=len, reverse=True))[: 0x100 - FIRST_PIECE]


def cut(whole: Sequence[Any], step: int) -> list[Any]:
    """The parts of a turn: single elements for 0, else parts of growing and shrinking size."""
    sizes: Iterator[int] = ((step * i) % 13 + 1 if step else 1 for i in range(len(whole) + 1))
    borders = [0]
    while borders[-1] < len(whole):
        borders.append(min(len(whole), borders[-1] + next(sizes)))
    return [whole[start:stop] for start, stop in pairwise(borders)]


def read(parser: StreamParser, parts: Sequence[Any]) -> list[TurnEvent]:
    """Feed part by part; little may be held after each."""
    events: list[TurnEvent] = []
    for part in parts:
        if isinstance(part, str):
            parser.feed_text(part)
        else:
            parser.feed(part)
        assert parser.undecided_count <= UNDECIDED_UNITS_MAX
        events += iter(parser.next_event, None)
    parser.finish()
    return [*events, *iter(parser.next_event, None)]


def check_turn(turn: ParsedTurn, events: Sequence[TurnEvent], policy: str) -> None:
    """What holds for any turn and its events."""
    assert turn_of(events) == ParsedTurn(turn.reasoning, turn.content, turn.calls, turn.error, ())
    assert all(not isinstance(event, TurnFailed) for event in events[:-1])
    for event in events:
        if isinstance(event, CallFinished):
            texts = [e.json_text for e in events if isinstance(e, ArgumentsText) and e.index == event.index]
            assert json.loads("".join(texts)) == event.call.arguments
            checked = CHECKER.check(event.call, policy="tolerant")
            assert checked.fits or checked.message
            assert CHECKER.check(event.call).call is event.call
    if turn.error is not None:
        assert turn.error.rule in RULES
        assert len(turn.error.excerpt) <= 80
        assert turn.error.line <= turn.error.offset + 1
        assert turn.error.column <= turn.error.offset + 1
        if policy == "strict":
            assert not turn.calls
        else:
            assert turn.error.rule in {"truncated-call", "malformed-invoke"}


def check(data: bytes) -> None:
    """Every law, for the turn that `data` stands for."""
    mode, step, *body = (*data, *bytes(max(0, 2 - len(data))))
    thinking, policy = bool(mode & 1), "tolerant" if mode & 2 else "strict"
    dialect = DIALECT_LIST[(mode >> 2) % len(DIALECT_LIST)]
    tokenizer, pieces = byte_tokenizer(), pieces_of(dialect.name)
    ids: list[int] = []
    for byte in body:
        piece = byte - FIRST_PIECE
        ids += [byte] if piece < 0 else sampled_ids(pieces[piece % len(pieces)], tokenizer, dialect=dialect)
    options: dict[str, Any] = {"thinking": thinking, "policy": policy, "tools": TOOLS, "dialect": dialect}
    turn = parse(ids, tokenizer, **options)
    parser = StreamParser(tokenizer, **options)
    events = read(parser, cut(ids, step))
    check_turn(turn, events, policy)
    assert parser.spans() == turn.spans
    assert sum(span.length for span in turn.spans) == len(ids)
    assert all(before.start + before.length == after.start for before, after in pairwise(turn.spans))
    assert len(events) <= 4 * len(ids) + 4
    text = tokenizer.decode(ids)
    spelled = parse_text(text, **options)
    from_text = read(StreamParser(**options), cut(text, step))
    check_turn(spelled, from_text, policy)
    assert joined(from_text) == joined(read(StreamParser(**options), [text]))
    tolerant = parse_text(text, **{**options, "policy": "tolerant"})
    if policy == "strict" and spelled.error is None and not is_odd(spelled, dialect):
        assert (tolerant.reasoning, tolerant.content, tolerant.error) == (spelled.reasoning, spelled.content, None)
        assert tolerant.calls == spelled.calls
        assert all(call.status is ParseStatus.OK for call in tolerant.calls)


def is_odd(turn: ParsedTurn, dialect: Dialect) -> bool:
    """Whether a sound turn holds what `tolerant` reads otherwise: a quote in a name, a wrapper, another block's tag."""
    names = [name for call in turn.calls for name in (call.name, *call.arguments)]
    values = "".join(json.dumps(call.arguments, ensure_ascii=False) for call in turn.calls)
    has_wrapper = any("arguments" in call.arguments for call in turn.calls)
    has_tag = any(f"｜{alias}" in values for alias in dialect.block_aliases)
    return has_wrapper or has_tag or any('"' in name for name in names)


def seeds() -> Iterator[bytes]:
    """The parse vectors as fuzz inputs, each in both policies and two cuts."""
    cases: list[tuple[str, bool, str]] = []
    lines = (GOLDEN / "open.jsonl").read_text().splitlines()
    cases += ((case["raw"], case["thinking"], "v4") for case in map(json.loads, lines))
    for name in ("reference_strict.json", "tolerant_expected.json", "grammar_replay.json"):
        for case in json.loads((GOLDEN / name).read_text()):
            thinking = case.get("thinking_mode", "thinking") == "thinking"
            cases.append((case["completion_text"], thinking, case.get("dialect", "v4")))
    for text, thinking, name in cases:
        dialect = DIALECTS[name]
        body = bytearray()
        at, pieces = 0, pieces_of(dialect.name)
        while at < len(text):
            index = next((i for i, piece in enumerate(pieces) if text.startswith(piece, at)), None)
            length = 1 if index is None else len(pieces[index])
            body += text[at].encode() if index is None else bytes([FIRST_PIECE + index])
            at += length
        for policy in (0, 2):
            mode = thinking | policy | DIALECT_LIST.index(dialect) << 2
            yield from (bytes([mode, step]) + body for step in (0, 5))


def main() -> None:
    """Write the seeds, then fuzz with libFuzzer's options."""
    arguments = sys.argv[1:]
    corpus = ROOT / "build/fuzz"
    if "--corpus" in arguments:
        at = arguments.index("--corpus")
        corpus = Path(arguments[at + 1])
        del arguments[at : at + 2]
    for folder in ("found", "seeds"):
        (corpus / folder).mkdir(parents=True, exist_ok=True)
    for index, seed in enumerate(seeds()):
        (corpus / "seeds" / f"{index:03}").write_bytes(seed)
    given = [argument for argument in arguments if not argument.startswith("-")]
    places = given or [str(corpus / "found"), str(corpus / "seeds")]
    options = [argument for argument in arguments if argument.startswith("-")]
    defaults = ["-max_len=400", "-len_control=0", f"-artifact_prefix={corpus}/"]
    atheris.Setup([sys.argv[0], *defaults, *options, *places], check)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
