"""Every call of the protocol by what it promises: its errors by field, its bounds, and that asking again is safe."""

from __future__ import annotations

import asyncio
import json
import math
import random
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.message_factory import GetMessageClass

from dsec.errors import DsecError, StateError
from dsec.wire import STATUS
from rollout.client import RolloutClient
from rollout.engine import Sampling
from rollout.errors import ConflictError, NotFoundError, RequestError, RolloutError, TaskError
from rollout.jobs import make_conversation
from rollout.modes import limits_of
from rollout.pb.v1 import rollout_pb2 as pb
from rollout.pb.v1.rollout_pb2_grpc import RolloutServiceStub
from rollout.request import (
    CallableReward,
    EarlyStop,
    JudgeReward,
    Limits,
    NoReward,
    PolicyRule,
    TestsReward,
)
from rollout.rpc.grpc_server import SERVICE
from rollout.rpc.messages import MESSAGE_BYTES_MAX, is_map, merge
from rollout.testing import Reply, hidden_row
from toolcall_dsl import DslError
from wal import WalError

EVERYTHING: tuple[Any, ...] = ("live_tokens", "tokens", "logprobs", "text")
WHOLE = [pb.FIELD_LIVE_TOKENS, pb.FIELD_TOKENS, pb.FIELD_LOGPROBS, pb.FIELD_TEXT]


async def test_everything_that_a_job_may_ask_for_arrives(setting: Any) -> None:
    asked = {
        "project": "math",
        "priority": -3,
        "deadline_s": 600.0,
        "thinking": "max",
        "sampling": Sampling(temperature=0.7, top_p=0.9, top_k=5, seed=1 << 63),
        "limits": Limits(turn_tokens_count_max=9, sampled_tokens_count_max=8, tool_timeout_s=3.5, wall_clock_s=99.0),
        "early_stop": EarlyStop(min_usable=2, grace_s=1.5),
        "policy": PolicyRule(min_version=0, max_lag=0, on_update="pin"),
        "reward": JudgeReward(rubric="Be fair.", samples_count=2, attempts_max=4, thinking="none"),
        "parse_policy": "tolerant",
    }
    assert len(await setting.job(**asked)) > 0
    job = setting.service.ledger.jobs["job"]
    assert {name: getattr(job, name) for name in asked} == asked
    assert [(group.group_id, group.size) for group in job.groups] == [("job/one", 3), ("job/two", 3)]
    for reward in (NoReward(), TestsReward()):
        await setting.job(f"job-{type(reward).__name__}", reward=reward)
        assert setting.service.ledger.jobs[f"job-{type(reward).__name__}"].reward == reward
    await setting.job("plain")
    plain = setting.service.ledger.jobs["plain"]
    said = (plain.limits, plain.sampling, plain.reward, plain.project)
    assert said == (limits_of("high"), Sampling(), TestsReward(), "default")


@pytest.mark.parametrize(
    ("said", "asked"),
    [
        ("request_id 'a b'", {"request_id": "a b"}),
        ("project 'x/y'", {"project": "x/y"}),
        ("priority is 9999", {"priority": 9999}),
        ("deadline_s is -1.0", {"deadline_s": -1.0}),
        ("deadline_s is nan", {"deadline_s": float("nan")}),
        ("group_size is 5000", {"group_size": 5000}),
        ("top_p is 0.0", {"sampling": Sampling(top_p=0.0)}),
        ("turns_count_max is 0", {"limits": Limits(turns_count_max=0)}),
        ("wall_clock_s is inf", {"limits": Limits(wall_clock_s=float("inf"))}),
        ("context_tokens_count_max is 9000000", {"limits": Limits(context_tokens_count_max=9_000_000)}),
        ("early_stop: min_usable is 0", {"early_stop": EarlyStop(min_usable=0)}),
        ("reward judge: give a rubric", {"reward": JudgeReward(rubric=" ")}),
        ("reward callable 'x'", {"reward": CallableReward("x")}),
        ("conversation", {"agent": "oracle"}),
        ("Thinking: 'sometimes' is none of none, high, max", {"thinking": "sometimes"}),
        ("a job has no colour", {"colour": "red"}),
        ("fields: pictures", {"fields": ["pictures"]}),
        ("priority is 'high': it cannot be asked for", {"priority": "high"}),
    ],
)
async def test_a_bad_field_is_named_and_nothing_is_logged(setting: Any, said: str, asked: dict[str, Any]) -> None:
    with pytest.raises(RequestError, match=said):
        await setting.job(**asked)
    assert setting.service.ledger.jobs == {}
    assert setting.service.ledger.conversations == {}


async def test_bad_prompts_are_named(setting: Any, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for said, prompts in {
        "a job needs at least one task": [],
        "no bundled task nosuch": ["nosuch"],
        "no task folder": [tmp_path / "empty"],
        "task names must differ within a job: one": [setting.ask("one"), setting.ask("one")],
    }.items():
        with pytest.raises((RequestError, TaskError), match=said):
            _ = [group async for group in setting.client.rollouts(prompts)]
    for said, conversation in {
        "one: give messages or token_ids": pb.Conversation(name="one"),
        "messages must be a JSON list": pb.Conversation(name="one", messages_json="{"),
        "conversation name 'a/b'": pb.Conversation(name="a/b", messages_json="[]"),
        "conversation one": pb.Conversation(name="one", messages_json='[{"role": "nobody"}]'),
        "leave no room": pb.Conversation(name="one", tokens=pb.TokenIds(token_ids=[1] * 5000)),
        "token_ids: ids must be 0 to": pb.Conversation(name="one", tokens=pb.TokenIds(token_ids=[1, 1 << 30])),
    }.items():
        with pytest.raises(grpc.aio.AioRpcError, match=said) as caught:
            await setting.stub.Submit(pb.SubmitRequest(request_id="job", conversations=[conversation])).read()
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert setting.service.ledger.jobs == {}


async def test_a_prompt_of_64_mb_and_a_message_beyond_the_bound_are_clear_errors(setting: Any) -> None:
    huge = pb.Conversation(name="huge", messages_json=json.dumps([{"role": "user", "content": "x" * (64 << 20)}]))
    for said, status, conversations in (
        ("conversation huge: more than 16777216 bytes", grpc.StatusCode.INVALID_ARGUMENT, [huge]),
        ("larger than max", grpc.StatusCode.RESOURCE_EXHAUSTED, [huge, huge]),
    ):
        request = pb.SubmitRequest(request_id="job", conversations=conversations)
        with pytest.raises(grpc.aio.AioRpcError, match=said) as caught:
            await setting.stub.Submit(request).read()
        assert caught.value.code() is status
    assert setting.service.ledger.jobs == {}
    assert len(await setting.job()) > 0


async def test_text_that_is_not_utf8_is_refused_by_field_over_the_wire(setting: Any) -> None:
    async with grpc.aio.insecure_channel(setting.address) as channel:
        call = channel.unary_stream("/rollout.pb.v1.RolloutService/Submit")
        data = pb.SubmitRequest(request_id="bad?").SerializeToString().replace(b"?", b"\xff")
        with pytest.raises(grpc.aio.AioRpcError, match="BAD_REQUEST: request_id: not UTF-8") as caught:
            await call(data).read()
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_the_same_request_attaches_and_another_under_its_id_is_a_conflict(setting: Any) -> None:
    first = await setting.job()
    assert await setting.job() == first
    with pytest.raises(ConflictError, match="contents: sampling, priority"):
        await setting.job(priority=1, sampling=Sampling(seed=1))
    both = await asyncio.gather(setting.job("twin"), setting.job("twin"))
    assert both[0] == both[1]


async def test_who_does_not_read_is_bounded_and_told_where_to_go_on(serving: Any, tmp_path: Path) -> None:
    long = {"reply": Reply(content="word " * 4000), "context_tokens_count_max": 1 << 15, "watch_events_count_max": 10}
    limits = pb.Limits(turn_tokens_count_max=8000, context_tokens_count_max=1 << 15)
    prompt = pb.Conversation(name="hello", messages_json='[{"role": "user", "content": "Hello."}]')
    request = pb.SubmitRequest(request_id="job", conversations=[prompt], limits=limits, return_mask=WHOLE)
    small = [("grpc.http2.bdp_probe", 0)]  # windows of 64 KiB that do not grow: what lies in them was sent
    async with (
        asyncio.timeout(120),
        serving(tmp_path / "run", **long) as setting,
        grpc.aio.insecure_channel(setting.address, options=small) as channel,
    ):
        slow = RolloutServiceStub(channel).Submit(request)  # type: ignore[no-untyped-call]
        seen = [await anext(aiter(slow))]
        await setting.service.wait("job")
        with pytest.raises(grpc.aio.AioRpcError, match="attach again from event") as caught:
            await _read_on(slow, seen)
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert setting.service.watchers.count == 0
        go_on = int(caught.value.details().rpartition(" ")[2])
        attach = pb.AttachRequest(request_id="job", return_mask=WHOLE)
        whole = [update async for update in setting.stub.Attach(attach)]
        attach.from_event = go_on
        assert seen + [update async for update in setting.stub.Attach(attach)] == whole
        # The client reads on by itself.
        assert len([u async for u in setting.client.attach("job", 0, EVERYTHING)]) == len(whole)


async def _read_on(stream: Any, seen: list[pb.Update]) -> None:
    async for update in stream:
        seen.append(update)  # noqa: PERF401 - also what came before an error


async def test_a_record_above_the_bound_comes_in_messages_that_merge_to_it(serving: Any, tmp_path: Path) -> None:
    count = 1_000_000
    async with asyncio.timeout(120), serving(tmp_path / "run", context_tokens_count_max=1 << 20) as setting:
        prompt = make_conversation("long", token_ids=[7] * count)
        asked = {"request_id": "job", "limits": Limits(context_tokens_count_max=1 << 20)}
        (group,) = [group async for group in setting.client.rollouts([prompt], **asked)]
        (trajectory,) = group.trajectories
        assert len(trajectory.token_ids) == len(trajectory.logprobs) == len(trajectory.loss_mask) > count
        messages = [m async for m in setting.stub.Get(pb.GetRequest(rollout_id="job/long.0", return_mask=WHOLE))]
        assert len(messages) > 1
        assert [message for message in messages if message.ByteSize() >= MESSAGE_BYTES_MAX] == []
        assert list(merge(messages).token_ids) == list(trajectory.token_ids)
        updates = [u async for u in setting.stub.Attach(pb.AttachRequest(request_id="job", return_mask=WHOLE))]
        last = [update for update in updates if update.event == updates[-1].event]
        assert [update.is_last for update in last] == [False] * (len(last) - 1) + [True]
        assert merge(last).group_finished.group_id == "job/long"


async def test_a_list_comes_in_pages_each_rollout_once(setting: Any) -> None:
    for request_id, project in (("a", "x"), ("b", "y"), ("c", "x")):
        await setting.job(request_id, project=project)

    async def names(**filters: Any) -> list[str]:
        return [each.rollout_id async for each in setting.client.list(**filters)]

    everyone = [f"{j}/{g}.{n}" for j in "abc" for g in ("one", "two") for n in range(3)]
    for page_size in (0, 1, 4, 5, 6, 17, 18, 1000):
        assert await names(page_size=page_size) == everyone
    assert await names(project="x", page_size=5) == [name for name in everyone if name[0] in "ac"]
    assert await names(request_id="b", group_id="b/two") == everyone[9:12]
    assert await names(states=["ended"]) == everyone
    assert await names(states=["queued", "running", "failed", "preempted"]) == []
    summary = await anext(setting.client.list())
    assert (summary.state, summary.finish_reason, summary.reward) == ("ended", "STOP", None)
    assert summary.last_event == (await setting.client.get(summary.rollout_id)).record.wal.last_lsn
    for said, request in {
        "page_token 'zzz'": pb.ListRequest(page_token="zzz"),
        "page_size is 5000": pb.ListRequest(page_size=5000),
    }.items():
        with pytest.raises(grpc.aio.AioRpcError, match=said):
            await setting.stub.List(request)


async def test_what_is_not_there_is_not_found(setting: Any) -> None:
    with pytest.raises(NotFoundError, match="no rollout 'x'"):
        await setting.client.get("x")
    with pytest.raises(NotFoundError, match="no job 'x'"):
        _ = [update async for update in setting.client.attach("x")]
    with pytest.raises(NotFoundError, match="no rollout 'x'"):
        _ = [update async for update in setting.client.replay("x")]
    with pytest.raises(NotFoundError, match="no rollout 'x'"):
        await setting.client.quick("x", ["query"])


@pytest.mark.parametrize("mode", ["keep", "wait", "abort"])
async def test_a_paused_engine_draws_nothing_until_it_is_resumed(setting: Any, mode: Any) -> None:
    await setting.client.pause_engine(mode)
    await setting.client.pause_engine(mode)
    asking = asyncio.create_task(setting.job())
    await setting.until(lambda: len(setting.service.ledger.rollouts) > 0)
    drawn = setting.engine.drawn_count
    assert not asking.done()
    assert setting.engine.drawn_count == drawn
    await setting.client.resume_engine()
    await setting.client.resume_engine()
    assert {update.what for update in await asking} >= {"tokens", "finished"}


async def test_tokens_are_scored_with_the_newest_weights(setting: Any) -> None:
    scored = await setting.client.score_tokens([0, 5, 9], top_logprobs_count=1)
    assert (scored.logprobs, scored.policy_version) == ((-0.5, -0.5), 0)
    assert [each.token_ids for each in scored.top_logprobs] == [(5,), (9,)]
    scored = await setting.client.score_tokens([7] * 1_000_000, returns_hidden=True)
    assert (len(scored.logprobs), scored.hidden) == (999_999, (hidden_row(7),) * 999_999)
    for bad in ([], [1 << 31], [0] * (1 << 21)):
        with pytest.raises(RequestError, match="token_ids"):
            await setting.client.score_tokens(bad)
    with pytest.raises(RequestError, match="top_logprobs_count"):
        await setting.client.score_tokens([0, 1], top_logprobs_count=1000)


async def test_quick_instructions_are_answered_in_parallel_and_again_the_same(setting: Any) -> None:
    await setting.job()
    tasks: list[Any] = ["query", "authority", "domain", "title", ("read_url", "https://a.example")]
    answers = await setting.client.quick("job/one.0", tasks, request_id="quick")
    assert [answer.task for answer in answers] == ["query", "authority", "domain", "title", "read_url"]
    for answer in answers:
        record = (await setting.client.get(answer.rollout_id)).record
        assert record.request_id == "quick"
        assert answer.is_complete
        assert answer.text.endswith("Hello.")
    drawn = setting.engine.drawn_count
    assert await setting.client.quick("job/one.0", tasks, request_id="quick") == answers
    assert setting.engine.drawn_count == drawn
    for rollout_id, other in (("job/one.0", ["query"]), ("job/one.1", tasks)):
        with pytest.raises(ConflictError, match="'quick' was submitted before"):
            await setting.client.quick(rollout_id, other, request_id="quick")
    bad: list[Any] = [("give 1 to 16, not 0", []), (r"\[1\]: task: 'x' is none", ["query", "x"]), ("task is 7", [7])]
    for said, wrong in bad:
        with pytest.raises(RequestError, match=said):
            await setting.client.quick("job/one.0", wrong)
    await setting.job("cut", limits=Limits(turn_tokens_count_max=1))
    with pytest.raises(StateError, match=r"title: cut/one\.0 has no whole answer"):
        await setting.client.quick("cut/one.0", ["title"])


async def test_a_running_rollout_can_be_asked_and_does_not_notice(setting: Any) -> None:
    calm = {u.rollout_id: u.trajectory.token_ids for u in await setting.job("calm") if u.trajectory}
    asked: list[Any] = []
    stream = setting.client.submit(
        [setting.ask("one", "1?"), setting.ask("two", "2?")], group_size=3, request_id="job", fields=EVERYTHING
    )
    ended = {}
    async for update in stream:
        if update.what == "tokens" and len(asked) < 5:
            asked += await setting.client.quick(update.rollout_id, ["query"])
        if update.trajectory:
            ended[update.rollout_id.replace("job", "calm")] = update.trajectory.token_ids
    assert len(asked) == 5
    assert ended == calm


async def test_a_program_without_an_event_loop_has_the_same_calls(setting: Any) -> None:
    def program() -> None:
        with RolloutClient(setting.address) as client:
            groups = list(client.rollouts([setting.ask("one")], group_size=2, request_id="job"))
            assert [len(group.trajectories) for group in groups] == [2]
            updates = list(client.attach("job", 0, EVERYTHING))
            assert (
                list(client.submit([setting.ask("one")], group_size=2, request_id="job", fields=EVERYTHING)) == updates
            )
            assert len(list(client.replay("job/one.0"))) > 1
            assert client.get("job/one.0").rollout_id == "job/one.0"
            assert len(list(client.list(request_id="job"))) == 2
            client.pause_engine()
            client.resume_engine()
            assert client.score_tokens([0, 1]).logprobs == (-0.5,)
            assert len(client.quick("job/one.0", ["query"])) == 1
            assert client.cancel("job") == 0
            with pytest.raises(RequestError, match="'x'"):
                client.quick("job/one.0", ["x"])

    await asyncio.to_thread(program)


def test_every_error_has_a_status() -> None:
    leaves = [leaf for root in (RolloutError, DsecError, WalError, DslError) for leaf in root.__subclasses__()]
    assert len(leaves) > 15
    assert [leaf.__name__ for leaf in leaves if leaf.code not in STATUS] == []


@pytest.mark.parametrize("method", [method.name for method in SERVICE.methods])
async def test_noise_in_any_request_is_the_callers_fault_and_leaves_the_service_as_it_is(
    setting: Any, method: str
) -> None:
    await setting.job()
    dice = random.Random(method)
    found, kind = SERVICE.methods_by_name[method], GetMessageClass(SERVICE.methods_by_name[method].input_type)
    async with grpc.aio.insecure_channel(setting.address) as channel:
        path = f"/{SERVICE.full_name}/{method}"
        for _ in range(150):
            data = _noise(dice, kind)
            try:
                if found.server_streaming:
                    async for _reply in channel.unary_stream(path)(data, timeout=60):
                        pass
                else:
                    await channel.unary_unary(path)(data, timeout=60)
            except grpc.aio.AioRpcError as error:
                known = {"INVALID_ARGUMENT", "NOT_FOUND", "OUT_OF_RANGE", "ALREADY_EXISTS", "FAILED_PRECONDITION"}
                assert error.code().name in known, (error.code(), error.details(), data)  # noqa: PT017
    await setting.client.resume_engine()
    assert len(await setting.job("after")) > 0


WORDS = ("job", "job/one.0", "job/one", "x", "", "a b", "ü", "\x00", "query", "../..", "one", "{}", "[]")


def _noise(dice: random.Random, kind: type[Any]) -> bytes:
    """A message with random fields, now and then with random bytes in it."""
    message = kind()
    _fill(dice, message, 0)
    data = bytearray(message.SerializeToString())
    if dice.random() < 0.3:
        for _ in range(dice.randrange(1, 4)):
            data[dice.randrange(len(data) + 1) : dice.randrange(len(data) + 1)] = dice.randbytes(dice.randrange(4))
    return bytes(data)


def _fill(dice: random.Random, message: Any, depth: int) -> None:
    for field in message.DESCRIPTOR.fields:
        if dice.random() < 0.5 or (field.message_type and depth > 3) or is_map(field):
            continue
        count = dice.randrange(3) if field.is_repeated else 1
        for _ in range(count):
            if field.message_type:
                part = getattr(message, field.name)
                part = part.add() if field.is_repeated else part
                part.SetInParent()
                _fill(dice, part, depth + 1)
                continue
            value = {
                field.CPPTYPE_STRING: lambda: dice.choice(WORDS),
                field.CPPTYPE_BOOL: lambda: dice.random() < 0.5,
                field.CPPTYPE_DOUBLE: lambda: dice.choice((0.0, 1.0, -1.0, math.nan, math.inf, 0.5)),
            }.get(field.cpp_type, lambda: dice.choice((0, 1, 2, 3, 5, 100, 0x7FFFFFFF)))()
            if field.is_repeated:
                getattr(message, field.name).append(value)
            else:
                setattr(message, field.name, value)
