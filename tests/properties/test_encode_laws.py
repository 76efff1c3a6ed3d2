"""Laws of encoding in every dialect: ids spell text, appending is exact or refused, kinds are what `parse` says."""

from __future__ import annotations

import io
import json
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

from hypothesis import assume, event, example, given, settings
from hypothesis import strategies as st

from toolcall_dsl import (
    DIALECTS,
    V4,
    V4_1,
    AppendError,
    Dialect,
    Tokenizer,
    encode,
    encode_appended,
    encode_text,
    parse,
    token_ids_of,
)
from toolcall_dsl.__main__ import main
from toolcall_dsl.append import REASONS
from toolcall_dsl.quick import instruction, shared_prefix

TOKENIZER_FILE = Path(__file__).parents[2] / "rollout/engines/embedded/checkpoint/tokenizer.json"
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
EDGES = ["<", "</", ">", "\n", "\n\n", "</tool_result>", "<tool_result>", "a", " b", "é", "🧑‍💻", "tool_calls>"]
EFFORTS = {name: [None, *dialect.efforts] for name, dialect in DIALECTS.items()}

dialects = st.sampled_from([*DIALECTS.values()])
hostile = st.sampled_from([*V4_1.control_tokens, V4.image, *EDGES])
prose = st.lists(st.one_of(st.text(max_size=8), hostile), max_size=4).map("".join)
names = st.text(st.characters(exclude_characters='"\n', exclude_categories=["Cs"]), min_size=1, max_size=8)
values = st.one_of(st.none(), st.booleans(), st.integers(), prose, st.lists(prose, max_size=2))
call_ids = st.sampled_from(["c0", "c1", "c2", "unknown", ""])
calls = st.lists(
    st.builds(
        lambda call_id, name, arguments: {
            "id": call_id,
            "function": {"name": name, "arguments": json.dumps(arguments)},
        },
        call_ids,
        names,
        st.dictionaries(names, values, max_size=2),
    ),
    max_size=3,
)
parts = st.lists(
    st.one_of(st.builds(lambda text: {"type": "text", "text": text}, prose), st.just({"type": "image_url"})), max_size=3
)


def seldom(strategy: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.one_of(st.none(), st.none(), st.none(), strategy)


def message(role: str, **fields: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries({"role": st.just(role), "content": prose, **fields})


tasks = seldom(st.sampled_from([*V4.tasks]))
users = message("user", content=st.one_of(prose, parts), task=tasks, tools=seldom(st.just(TOOLS)))
assistants = message(
    "assistant",
    reasoning_content=prose,
    tool_calls=st.one_of(st.just([]), calls),
    task=tasks,
    wo_eos=seldom(st.just(True)),
    mask=seldom(st.just(1)),
)
results = message("tool", tool_call_id=call_ids)
systems = message("system", tools=seldom(st.just(TOOLS)), response_format=seldom(st.just({"type": "json"})))
developers = message("developer", content=prose.map("d".__add__), tools=seldom(st.just(TOOLS)))
reminders = message("latest_reminder")
messages = st.one_of(users, users, assistants, assistants, results, results, systems, developers, reminders)
conversations = st.lists(messages, max_size=7)


@st.composite
def options_of(draw: st.DrawFn) -> dict[str, Any]:
    dialect: Dialect = draw(dialects)
    return {
        "dialect": dialect,
        "thinking": draw(st.booleans()),
        "drop_thinking": draw(st.booleans()),
        "reasoning_effort": draw(st.sampled_from(EFFORTS[dialect.name])),
        "add_default_bos_token": draw(st.booleans()),
        "tools": draw(seldom(st.just(TOOLS))),
    }


@cache
def tokenizer() -> Tokenizer:
    """The shipped vocabulary with the two tokens that it lacks."""
    definition = json.loads(TOKENIZER_FILE.read_text())
    for token_id, token in ((5000, V4_1.system), (5001, V4_1.image)):
        definition["added_tokens"].append({**definition["added_tokens"][0], "id": token_id, "content": token})
    return Tokenizer(json.dumps(definition), "wide.json")


@given(talk=conversations, options=options_of(), trains=st.booleans())
def test_the_ids_of_a_conversation_spell_its_text(
    talk: list[dict[str, Any]], options: dict[str, Any], trains: bool
) -> None:
    assume(not (options["tools"] and any(each["role"] == "system" and each.get("tools") for each in talk)))
    text = encode_text(talk, **options)
    segments = encode(talk, tokenizer(), train_on_assistant=trains, **options)
    assert tokenizer().decode(token_ids_of(segments)) == text
    assert [(before, after) for before, after in pairwise(segments) if before.kind == after.kind] == []
    assert trains or not any(segment.trainable for segment in segments)


@settings(max_examples=400)
@given(talk=conversations, options=options_of(), split=st.integers(0, 6))
def test_appending_is_exact_or_refused_because_the_prefix_would_change(
    talk: list[dict[str, Any]], options: dict[str, Any], split: int
) -> None:
    assume(not (options["tools"] and any(each["role"] == "system" and each.get("tools") for each in talk)))
    prefix, new = talk[:split], talk[split:]
    whole, head = (
        token_ids_of(encode(talk, tokenizer(), **options)),
        token_ids_of(encode(prefix, tokenizer(), **options)),
    )
    refusal = None
    try:
        tail = token_ids_of(encode_appended(prefix, new, tokenizer(), **options))
    except AppendError as error:
        refusal = error
    if refusal is not None:
        event(refusal.reason)
        assert whole[: len(head)] != head
        assert refusal.reason in REASONS
        assert -1 <= refusal.index < len(prefix)
        return
    event("appended")
    assert head + tail == whole
    assert tokenizer().decode(head) + tokenizer().decode(tail) == encode_text(talk, **options)


@given(talk=st.lists(messages, min_size=1, max_size=5), rest=conversations, options=options_of(), answer=assistants)
def test_behind_an_answer_only_dropping_can_forbid_to_append(
    talk: list[dict[str, Any]], rest: list[dict[str, Any]], options: dict[str, Any], answer: dict[str, Any]
) -> None:
    ended = {**answer, "wo_eos": None, "task": None}
    system = {"role": "system", "content": "s", "tools": TOOLS}
    for prefix in ([system, *talk, ended], [*talk, ended]):
        keeps = {**options, "tools": None, "drop_thinking": options["drop_thinking"] and prefix[0] is system}
        head = token_ids_of(encode(prefix, tokenizer(), **keeps))
        tail = token_ids_of(encode_appended(prefix, rest, tokenizer(), **keeps))
        assert head + tail == token_ids_of(encode([*prefix, *rest], tokenizer(), **keeps))
        assert tail == token_ids_of(encode(rest, tokenizer(), context=prefix, **keeps))


@given(
    talk=st.lists(messages, max_size=4),
    answer=assistants,
    dialect=dialects,
    thinking=st.booleans(),
    drop=st.booleans(),
)
@example(talk=[], answer={"role": "assistant", "content": "a\n"}, dialect=V4, thinking=True, drop=False)
def test_the_kinds_of_supervised_data_are_the_spans_of_the_parser(
    talk: list[dict[str, Any]], answer: dict[str, Any], dialect: Dialect, thinking: bool, drop: bool
) -> None:
    options: dict[str, Any] = {"thinking": thinking, "drop_thinking": drop, "dialect": dialect}
    said = {**answer, "wo_eos": None, "mask": None, "task": None}
    before = [{"role": "system", "content": "s"}, *talk]
    prefix = token_ids_of(encode(before, tokenizer(), **options))
    whole = encode([*before, said], tokenizer(), train_on_assistant=True, **options)
    tagged = [(token_id, segment.kind) for segment in whole for token_id in segment.token_ids]
    assume([token_id for token_id, _ in tagged[: len(prefix)]] == prefix)
    turn = tagged[len(prefix) :]
    ids = [token_id for token_id, _ in turn]
    thinks = thinking and tokenizer().control(dialect.think_close) in ids
    spans = parse(ids, tokenizer(), thinking=thinks, dialect=dialect).spans
    assert [kind for _, kind in turn] == [span.kind for span in spans for _ in range(span.length)]


@given(
    talk=conversations, question=prose, url=prose.filter(str.strip), thinking=st.booleans(), dialect=dialects,
    answer=prose, task=st.sampled_from([*V4.tasks]),
)  # fmt: skip
def test_an_instruction_behind_the_shared_prefix_is_the_task_encoded(
    talk: list[dict[str, Any]], question: str, url: str, thinking: bool, dialect: Dialect, answer: str, task: str
) -> None:
    assume(not talk or talk[-1]["role"] not in {"user", "tool"})
    assume(task != "read_url" or dialect.task_marks["read_url"] not in url)
    options: dict[str, Any] = {"thinking": thinking, "dialect": dialect}
    asked = [*talk, {"role": "user", "content": question}]
    if task == "title":
        asked.append({"role": "assistant", "content": answer})
    prompt = token_ids_of(encode(asked, tokenizer(), **options))
    branch = instruction(task, thinking=thinking, url=url if task == "read_url" else None, dialect=dialect)
    address = f"{dialect.task_marks['read_url']}{url}" if task == "read_url" else ""
    with_task = [*asked[:-1], {**asked[-1], "content": f"{asked[-1]['content']}{address}", "task": task}]
    shared = list(shared_prefix(prompt, tokenizer(), dialect=dialect))
    assert shared + token_ids_of(branch.segments(tokenizer())) == token_ids_of(
        encode(with_task, tokenizer(), **options)
    )


@given(
    request=st.one_of(
        st.binary(max_size=40),
        st.recursive(
            st.one_of(st.none(), st.booleans(), st.integers(), st.text(max_size=5), messages, conversations),
            lambda inner: st.dictionaries(
                st.sampled_from(["messages", "thinking_mode", "reasoning_effort", "context", "tools", "drop_thinking"]),
                inner,
                max_size=4,
            ),
            max_leaves=6,
        ).map(lambda value: json.dumps(value).encode()),
    )
)
def test_whatever_stands_on_stdin_the_command_line_answers_or_refuses(request: bytes) -> None:
    for argv in (["encode"], ["parse", "--thinking-mode", "chat"], ["parse", "--thinking-mode", "thinking"]):
        written = io.BytesIO()
        code = main(argv, stdin=io.BytesIO(request), stdout=written)
        assert code in {0, 2}
        assert (code == 0) or written.getvalue() == b""
