"""Quick Instructions: what a server appends to a shared prefix, where, and how it reads the answer."""

from __future__ import annotations

from typing import Any

import pytest

from toolcall_dsl import DIALECTS, V4, MessageError, SpanKind, Tokenizer, encode, encode_text, token_ids_of
from toolcall_dsl.quick import Answer, instruction, read_answer, shared_prefix
from toolcall_dsl.testing import sampled_ids

QUESTION: list[dict[str, Any]] = [{"role": "system", "content": "s"}, {"role": "user", "content": "Which springs?"}]
ANSWERED = [*QUESTION, {"role": "assistant", "content": "These."}]


@pytest.mark.parametrize("dialect", DIALECTS.values(), ids=lambda dialect: dialect.name)
@pytest.mark.parametrize(
    ("task", "thinking", "count", "place", "text"),
    [
        ("query", True, 1, "question", "<｜query｜>"),
        ("authority", True, 1, "question", "<｜authority｜>"),
        ("domain", False, 1, "question", "<｜domain｜>"),
        ("action", False, 3, "question", "<｜Assistant｜></think><｜action｜>"),
        ("action", True, 3, "question", "<｜Assistant｜><think><｜action｜>"),
        ("title", True, 1, "answer", "<｜title｜>"),
    ],
)
def test_an_instruction_costs_one_token_or_three(
    task: str, thinking: bool, count: int, place: str, text: str, dialect: Any, wide_tokenizer: Tokenizer
) -> None:
    branch = instruction(task, thinking=thinking, dialect=dialect)
    assert (branch.task, branch.place, branch.text) == (task, place, text)
    (segment,) = branch.segments(wide_tokenizer)
    assert segment.kind is SpanKind.TEMPLATE
    assert wide_tokenizer.decode(segment.token_ids) == text
    assert len(segment.token_ids) == count


@pytest.mark.parametrize("thinking", [False, True])
@pytest.mark.parametrize("task", ["query", "authority", "domain", "action", "title"])
def test_a_branch_is_the_conversation_with_the_task_on_its_last_message(
    task: str, thinking: bool, tokenizer: Tokenizer
) -> None:
    branch = instruction(task, thinking=thinking)
    talk = ANSWERED if branch.place == "answer" else QUESTION
    prefix = shared_prefix(token_ids_of(encode(talk, tokenizer, thinking=thinking)), tokenizer)
    whole = encode([*talk[:-1], {**talk[-1], "task": task}], tokenizer, thinking=thinking)
    assert [*prefix, *token_ids_of(branch.segments(tokenizer))] == token_ids_of(whole)


def test_branches_and_the_real_turn_go_on_from_one_prefix(tokenizer: Tokenizer) -> None:
    prompt = token_ids_of(encode(QUESTION, tokenizer, thinking=True))
    prefix = shared_prefix(prompt, tokenizer)
    assert tokenizer.decode(prompt[len(prefix) :]) == "<｜Assistant｜><think>"
    assert shared_prefix(prefix, tokenizer) == prefix
    assert shared_prefix([], tokenizer) == []


def test_an_address_comes_behind_its_own_token(tokenizer: Tokenizer) -> None:
    url = "https://example.org/<｜User｜>"
    branch = instruction("read_url", thinking=False, url=url)
    assert branch.text == f"<｜extracted_url｜>{url}<｜read_url｜>"
    prefix = shared_prefix(token_ids_of(encode(QUESTION, tokenizer, thinking=False)), tokenizer)
    content = f"Which springs?<｜extracted_url｜>{url}"
    asked = [QUESTION[0], {"role": "user", "content": content, "task": "read_url"}]
    whole = token_ids_of(encode(asked, tokenizer, thinking=False))
    assert [*prefix, *token_ids_of(branch.segments(tokenizer))] == whole
    assert tokenizer.decode(whole) == encode_text(asked, thinking=False)
    assert whole.count(tokenizer.control("<｜User｜>")) == 1
    assert [segment.kind for segment in branch.segments(tokenizer)] == ["TEMPLATE", "USER", "TEMPLATE"]


@pytest.mark.parametrize(
    ("task", "url", "complaint"),
    [
        ("dance", None, "task: 'dance' is none of action, query"),
        ("read_url", None, "url: task 'read_url' needs one"),
        ("query", "https://example.org", "url: task 'query' takes none"),
    ],
)
def test_an_instruction_that_does_not_exist_is_refused(task: str, url: str | None, complaint: str) -> None:
    with pytest.raises(MessageError, match=complaint):
        instruction(task, thinking=True, url=url)


@pytest.mark.parametrize(
    ("completion", "answer"),
    [
        ("Search<｜end▁of▁sentence｜>", Answer("Search", is_complete=True)),
        ("Search", Answer("Search", is_complete=False)),
        ("", Answer("", is_complete=False)),
        ("<｜end▁of▁sentence｜>more", Answer("", is_complete=True)),
        ("世界著名温泉\n</think>x<｜end▁of▁sentence｜>", Answer("世界著名温泉\n</think>x", is_complete=True)),
    ],
)
def test_an_answer_is_the_text_up_to_the_end_token(completion: str, answer: Answer, tokenizer: Tokenizer) -> None:
    assert read_answer(sampled_ids(completion, tokenizer), tokenizer) == answer


def test_a_spelled_end_token_does_not_end_an_answer(tokenizer: Tokenizer) -> None:
    ids = [*tokenizer.encode_plain(f"a{V4.eos}b"), tokenizer.control(V4.eos)]
    assert read_answer(ids, tokenizer) == Answer(f"a{V4.eos}b", is_complete=True)
