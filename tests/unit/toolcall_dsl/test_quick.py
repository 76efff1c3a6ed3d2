"""Quick Instructions: what a server appends to a shared prefix, where, and how it reads the answer."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

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
        ("read_url", "", "url: task 'read_url' needs one, not an empty one"),
        ("read_url", " \n", "url: task 'read_url' needs one, not an empty one"),
        ("query", "", "url: task 'query' takes none"),
        ("query", "https://example.org", "url: task 'query' takes none"),
    ],
)
def test_an_instruction_that_does_not_exist_is_refused(task: str, url: str | None, complaint: str) -> None:
    with pytest.raises(MessageError, match=complaint):
        instruction(task, thinking=True, url=url)


@pytest.mark.parametrize(
    ("task", "completion", "read"),
    [
        ("action", "Search", {"action": "search"}),
        ("action", "Answer\n", {"action": "answer"}),
        ("action", "search", {"unread": "'search' is neither Search nor Answer"}),
        ("query", "世界著名温泉", {"queries": ("世界著名温泉",)}),
        ("query", "hot springs\n\n  onsen ", {"queries": ("hot springs", "onsen")}),
        ("authority", "high", {"label": "high"}),
        ("domain", " travel", {"label": "travel"}),
        ("read_url", "no", {"label": "no"}),
        ("title", "Famous Springs", {"title": "Famous Springs"}),
        ("title", "Famous\nSprings", {"unread": "it has 2 lines, must be one"}),
        ("domain", " \n", {"unread": "it is empty"}),
        ("domain", "a</think>", {"unread": "it holds the control token </think>"}),
        ("domain", "<｜begin▁of▁sentence｜>", {"unread": "it holds the control token <｜begin▁of▁sentence｜>"}),
    ],
)
def test_an_answer_says_what_its_task_asks_for_or_why_it_does_not(
    task: str, completion: str, read: dict[str, Any], tokenizer: Tokenizer
) -> None:
    ids = sampled_ids(f"{completion}<｜end▁of▁sentence｜>more", tokenizer)
    assert read_answer(task, ids, tokenizer) == Answer(text=completion, is_complete=True, **read)


@pytest.mark.parametrize("task", V4.tasks)
@pytest.mark.parametrize("completion", ["Search", ""])
def test_an_answer_that_was_cut_off_says_nothing(task: str, completion: str, tokenizer: Tokenizer) -> None:
    answer = read_answer(task, sampled_ids(completion, tokenizer), tokenizer)
    assert answer == Answer(text=completion, is_complete=False, unread="it was cut off before its end")


def test_a_spelled_end_token_does_not_end_an_answer(tokenizer: Tokenizer) -> None:
    ids = [*tokenizer.encode_plain(f"a{V4.eos}b"), tokenizer.control(V4.eos)]
    answer = read_answer("title", ids, tokenizer)
    assert (answer.title, answer.is_complete) == (f"a{V4.eos}b", True)


@given(data=st.data())
def test_whatever_was_sampled_is_read_as_something(data: st.DataObject, tokenizer: Tokenizer) -> None:
    ids, task = data.draw(st.lists(st.integers(0, 140_000))), data.draw(st.sampled_from(sorted(V4.tasks)))
    answer = read_answer(task, ids, tokenizer)
    said = (answer.action, answer.title, answer.label, answer.queries or None, answer.unread or None)
    assert sum(each is not None for each in said) == 1
