"""What a caller asks for: every bound is refused by its name, and equal requests make equal jobs."""

import json
import math

import pytest

from rollout.engine import Sampling
from rollout.errors import RequestError
from rollout.jobs import check_conversations, load_bundled, make_conversation, make_job
from rollout.request import CallableReward, Conversation, EarlyStop, Job, JudgeReward, Limits, PolicyRule, Reward
from rollout.testing import ENGINE
from toolcall_dsl import Tokenizer

HELLO = make_conversation("hello", messages_json='[{"role": "user", "content": "Hi"}]')


def asked(**fields: object) -> Job:
    return Job(request_id="r", **fields)  # type: ignore[arg-type]


def test_a_job_has_a_group_for_each_prompt_and_all_that_was_asked() -> None:
    other = make_conversation("other", token_ids=(0, 5))
    job = make_job(asked(project="math", priority=3), [HELLO, other], group_size=4, group_prefix="r/")
    assert [(group.group_id, group.size, group.task_digest) for group in job.groups] == [
        ("r/hello", 4, HELLO.digest),
        ("r/other", 4, other.digest),
    ]
    assert (job.project, job.priority) == ("math", 3)


def test_equal_conversations_have_equal_digests_however_their_json_is_spaced() -> None:
    again = make_conversation("hello", messages_json='[{"role":"user","content":"Hi"}]')
    assert again.digest == HELLO.digest
    assert make_conversation("hello", token_ids=(0,)).digest != HELLO.digest


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"project": "a/b"}, "project 'a/b'"),
        ({"priority": 1001}, "priority is 1001, must be -1000 to 1000"),
        ({"deadline_s": math.nan}, "deadline_s is nan"),
        ({"deadline_s": math.inf}, "deadline_s is inf"),
        ({"early_stop": EarlyStop(min_usable=3)}, "min_usable is 3, must be 1 to the group's 2"),
        ({"early_stop": EarlyStop(min_usable=1, grace_s=-1)}, "grace_s is -1"),
        ({"policy": PolicyRule(max_lag=-1)}, "max_lag must be 0 or more"),
        ({"policy": PolicyRule(min_version=-1)}, "min_version and max_lag must be 0 or more"),
        ({"limits": Limits(turns_count_max=0)}, "turns_count_max is 0"),
        ({"limits": Limits(thinking_tokens_count_max=-1)}, "thinking_tokens_count_max is -1"),
        ({"limits": Limits(wall_clock_s=math.nan)}, "wall_clock_s is nan"),
        ({"limits": Limits(tool_timeout_s=0)}, "tool_timeout_s is 0"),
        ({"sampling": Sampling(temperature=math.nan)}, "temperature is nan"),
        ({"sampling": Sampling(top_p=0)}, "top_p is 0"),
        ({"agent": "oracle"}, "a conversation has none"),
    ],
)
def test_what_is_out_of_its_bounds_is_named(fields: dict[str, object], said: str) -> None:
    with pytest.raises(RequestError, match=said):
        make_job(asked(**fields), [HELLO], group_size=2)


@pytest.mark.parametrize(
    ("reward", "said"),
    [
        (CallableReward("os.system"), "module:function"),
        (CallableReward("a:b; c"), "module:function"),
        (JudgeReward(rubric=" "), "give a rubric"),
        (JudgeReward(rubric="x" * 70_000), "at most 65536 bytes"),
        (JudgeReward(rubric="x", samples_count=0), "samples_count and attempts_max must be 1 to 16"),
        (JudgeReward(rubric="x", sampling=Sampling(top_k=-1)), "top_k is -1"),
    ],
)
def test_a_reward_that_cannot_be_given_is_refused_before_anything_runs(reward: Reward, said: str) -> None:
    with pytest.raises(RequestError, match=said):
        make_job(asked(reward=reward), [HELLO])


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({}, "give messages or token_ids"),
        ({"messages_json": "[]", "token_ids": (1,)}, "give messages or token_ids"),
        ({"token_ids": (-1,)}, "must fit 32 bits"),
        ({"messages_json": "[]"}, "there are no messages"),
        ({"messages_json": "{}"}, "must be a JSON list of objects"),
        ({"messages_json": "[" * 100_000}, "must be a JSON list of objects"),
        ({"messages_json": '["' + "x" * (17 << 20) + '"]'}, "bytes of messages"),
    ],
)
def test_a_conversation_that_cannot_be_read_is_refused(fields: dict[str, object], said: str) -> None:
    with pytest.raises(RequestError, match=said):
        make_conversation("c", **fields)  # type: ignore[arg-type]


def test_a_conversation_that_cannot_be_encoded_or_leaves_no_room_is_refused(
    tokenizer: Tokenizer,
) -> None:
    wrong: Conversation = make_conversation("c", messages_json='[{"role": "wizard", "content": "x"}]')
    with pytest.raises(RequestError, match=r"conversation c: .*wizard"):
        check_conversations(asked(), [wrong], tokenizer, ENGINE)
    long = make_conversation("long", token_ids=range(2048))
    with pytest.raises(RequestError, match="2048 tokens leave no room in 2048"):
        check_conversations(asked(), [HELLO, long], tokenizer, ENGINE)
    huge = make_conversation("huge", messages_json=json.dumps([{"role": "user", "content": "x" * 500_000}]))
    with pytest.raises(RequestError, match=r"a prompt of 500[0-9]* characters leaves no room in 2048 tokens"):
        check_conversations(asked(), [huge], tokenizer, ENGINE)
    foreign = make_conversation("foreign", token_ids=[1, ENGINE.vocab_count])
    with pytest.raises(RequestError, match="token_ids: ids must be 0 to"):
        check_conversations(asked(), [foreign], tokenizer, ENGINE)


def test_who_draws_no_tokens_cannot_tell_of_them() -> None:
    for fields in ({"returns": ("routes",)}, {"top_logprobs_count": 2}):
        with pytest.raises(RequestError, match="agent nop draws no tokens"):
            make_job(asked(agent="nop", **fields), load_bundled(["bug-1-000"]))
