"""Non-think, High and Max: what the prompt says, and what a turn may spend."""

from __future__ import annotations

from typing import Any

import pytest

from rollout import context
from rollout.errors import RequestError
from rollout.jobs import make_conversation, make_job
from rollout.modes import limits_of
from rollout.pb.v1 import rollout_pb2 as pb
from rollout.request import Job, Limits, Thinking
from rollout.rpc.asked import job_of
from toolcall_dsl import V4, Tokenizer


@pytest.mark.parametrize(
    ("mode", "opening", "header"),
    [
        ("none", "You are a coding agent", "</think>"),
        ("high", "You are a coding agent", "<think>"),
        ("max", "Reasoning Effort: Absolute maximum", "<think>"),
    ],
)
def test_a_mode_is_what_the_prompt_opens_and_ends_with(
    mode: Thinking, opening: str, header: str, tokenizer: Tokenizer
) -> None:
    ids = [token for segment in context.prompt("Copy a to b.", tokenizer, mode) for token in segment.token_ids]
    text = tokenizer.decode(ids)
    assert text.startswith(V4.bos + opening)
    assert text.endswith(f"Copy a to b.{V4.assistant}{header}")


@pytest.mark.parametrize("length", [64, 2048, 1 << 20])
def test_budgets_grow_with_the_mode_and_leave_each_the_same_room_to_answer(length: int) -> None:
    none, high, most = (limits_of(mode, length) for mode in ("none", "high", "max"))
    assert none.thinking_tokens_count_max == 0 < high.thinking_tokens_count_max < most.thinking_tokens_count_max
    rooms = {each.turn_tokens_count_max - each.thinking_tokens_count_max for each in (none, high, most)}
    assert rooms == {length // 8}
    assert most.turn_tokens_count_max < length == most.context_tokens_count_max
    make_job(Job(request_id="r", limits=most), [make_conversation("c", token_ids=[0])])


@pytest.mark.parametrize(
    ("asked", "complaint"),
    [(("low",), "mode 'low' is none of none, high, max"), (("max", 63), "context_tokens_count_max is 63, must be 64")],
)
def test_a_mode_that_there_is_not_and_a_context_without_room_are_refused(asked: Any, complaint: str) -> None:
    with pytest.raises(RequestError, match=complaint):
        limits_of(*asked)


@pytest.mark.parametrize(
    ("asked", "mode"), [(pb.THINKING_NONE, "none"), (pb.THINKING_HIGH, "high"), (0, "high"), (pb.THINKING_MAX, "max")]
)
def test_a_job_without_limits_has_the_budgets_of_its_mode(asked: Any, mode: Thinking) -> None:
    talk = pb.Conversation(name="c", messages_json='[{"role": "user", "content": "Say hello."}]')
    job, _ = job_of(pb.SubmitRequest(request_id="r", conversations=[talk], thinking=asked))
    assert (job.thinking, job.limits) == (mode, limits_of(mode))


def test_limits_that_are_given_hold_as_they_are_and_ids_think_as_long_as_they_like() -> None:
    talk = pb.Conversation(name="c", messages_json='[{"role": "user", "content": "Say hello."}]')
    given = pb.SubmitRequest(request_id="r", conversations=[talk], limits=pb.Limits(turns_count_max=3))
    assert job_of(given)[0].limits == Limits(turns_count_max=3)
    raw = pb.Conversation(name="c", tokens=pb.TokenIds(token_ids=[0, 5]))
    assert job_of(pb.SubmitRequest(request_id="r", conversations=[raw]))[0].limits == Limits()
