"""What the client refuses before anything is sent: an argument that is none, by its field."""

from __future__ import annotations

from typing import Any

import pytest

from rollout.errors import RequestError
from rollout.jobs import make_conversation
from rollout.request import PolicyRule


@pytest.mark.parametrize(
    ("said", "asked"),
    [
        ("say sampling=Sampling", {"temperature": 1.0}),
        ("group_size is -1: it cannot be asked for", {"group_size": -1}),
        ("group_size is 0, must be 1 or more", {"group_size": 0}),
        ("policy is .*max_lag=-1", {"policy": PolicyRule(max_lag=-1)}),
        ("reward is 'tests': give a value of rollout.request", {"reward": "tests"}),
    ],
)
async def test_a_job_that_cannot_be_asked_for_is_refused_by_field(
    setting: Any, said: str, asked: dict[str, Any]
) -> None:
    with pytest.raises(RequestError, match=said):
        await setting.job(**asked)
    with pytest.raises(RequestError, match="prompts: give a list of them, also of one"):
        await anext(setting.client.rollouts("copy-1-000"))


async def test_what_is_none_of_a_calls_arguments_is_named_by_field(setting: Any) -> None:
    client = setting.client
    for said, call in {
        "rollout_ids: give a list": client.ack("job/one.0"),
        "rollout_ids: give a list of": client.preempt(rollout_ids="job/one.0"),
        "tasks: give a list of them, also of one": client.quick("job/one.0", "action"),
        r"token_ids is \[-1\]": client.score_tokens([-1]),
        "token_ids is 'abc'": client.score_tokens("abc"),
        "policy_version is -3": client.update_policy("x", -3),
    }.items():
        with pytest.raises(RequestError, match=said):
            await call
    with pytest.raises(RequestError, match="messages_json must be JSON text"):
        make_conversation("one", messages_json=[{"role": "user", "content": "1?"}])  # type: ignore[arg-type]
