"""Messages of the protocol: parts and their merge, text, enum values, and structs by field name."""

from __future__ import annotations

import math

import msgspec
import pytest

from rollout import record, request
from rollout.client.values import trajectory_of
from rollout.context import Span
from rollout.engine import EngineInfo, Routing, Sampling, Scored, TopLogprobs
from rollout.errors import RequestError
from rollout.pb.v1 import rollout_pb2 as pb
from rollout.rpc.listing import RolloutSummary
from rollout.rpc.messages import MESSAGE_BYTES_MAX, fill, merge, parse, parts, plain


@pytest.mark.parametrize(
    ("message", "struct"),
    [
        (pb.Trajectory, record.TrajectoryRecord),
        (pb.Span, Span),
        (pb.Turn, record.TurnRecord),
        (pb.Place, record.Place),
        (pb.VersionRun, record.VersionRun),
        (pb.KvBreak, record.KvBreakRecord),
        (pb.RewardRecord, record.RewardRecord),
        (pb.Membership, record.Membership),
        (pb.Timing, record.Timing),
        (pb.LogRange, record.LogRange),
        (pb.Lineage, record.Lineage),
        (pb.SideChannel, record.SideChannel),
        (pb.Encoder, record.Encoder),
        (pb.QuickAnswer, record.QuickAnswer),
        (pb.RolloutSummary, RolloutSummary),
        (pb.EngineInfo, EngineInfo),
        (pb.Routing, Routing),
        (pb.ScoreTokensResponse, Scored),
        (pb.TopLogprobs, TopLogprobs),
        (pb.Sampling, Sampling),
        (pb.Limits, request.Limits),
        (pb.EarlyStop, request.EarlyStop),
        (pb.PolicyRule, request.PolicyRule),
        (pb.TestsReward, request.TestsReward),
        (pb.NoReward, request.NoReward),
        (pb.CallableReward, request.CallableReward),
        (pb.JudgeReward, request.JudgeReward),
    ],
)
def test_a_message_has_the_fields_of_its_struct(message: type, struct: type) -> None:
    assert {field.name for field in message.DESCRIPTOR.fields} == {f.name for f in msgspec.structs.fields(struct)}  # type: ignore[attr-defined]


def test_a_tool_call_has_the_fields_of_its_struct_and_its_arguments_as_text() -> None:
    names = {field.name for field in pb.ToolCall.DESCRIPTOR.fields}
    assert names - {"arguments_json"} == {f.name for f in msgspec.structs.fields(record.CallRecord)} - {"arguments"}


def test_every_job_field_can_be_asked_for() -> None:
    asked = {field.name for field in pb.SubmitRequest.DESCRIPTOR.fields}
    of_http = {"draws_by_place", "ends_with_caller"}
    assert {f.name for f in msgspec.structs.fields(request.Job)} - asked == {"groups", "edge_url", "returns"} | of_http


@pytest.mark.parametrize("tokens_count", [0, 1, 700_000, 2_000_000])
def test_parts_merge_to_the_whole_and_fit_a_message(tokens_count: int) -> None:
    whole = pb.Trajectory(
        rollout_id="r", token_ids=range(tokens_count), logprobs=[math.nan, -1.5] * (tokens_count // 2)
    )
    for start in range(0, tokens_count, 1000):
        whole.spans.add(start=start, length=1000, kind="SAMPLED_TEXT", trainable=True)
    whole.reward.components["tests"] = 0.5
    pieces = list(parts(whole))
    assert [piece for piece in pieces if piece.ByteSize() >= MESSAGE_BYTES_MAX] == []
    assert len(pieces) == 1 if tokens_count < 2 else len(pieces) > 2
    assert merge(pieces).SerializeToString(deterministic=True) == whole.SerializeToString(deterministic=True)


def test_large_texts_come_apart_by_their_messages_and_one_too_large_is_an_error() -> None:
    whole = pb.Trajectory(rollout_id="r")
    for number in range(9):
        whole.tool_calls.add(call_index=number, result="x" * (1 << 20))
    pieces = list(parts(whole))
    assert len(pieces) > 3
    assert merge(pieces) == whole
    whole.tool_calls[4].result *= 5
    with pytest.raises(RequestError, match="without FIELD_TEXT"):
        list(parts(whole))
    assert merge([]) is None


@pytest.mark.parametrize(
    ("field", "request_"),
    [
        ("request_id", pb.SubmitRequest(request_id="bad?")),
        ("bundled_tasks", pb.SubmitRequest(bundled_tasks=["good", "bad?"])),
        ("tasks.files.key", pb.SubmitRequest(tasks=[pb.TaskFolder(name="t", files={"bad?": b"\xff"})])),
        ("conversations.messages_json", pb.SubmitRequest(conversations=[pb.Conversation(messages_json="bad?")])),
        ("reward.judge.rubric", pb.SubmitRequest(reward=pb.Reward(judge=pb.JudgeReward(rubric="bad?")))),
    ],
)
def test_text_that_is_not_utf8_is_refused_by_the_name_of_its_field(field: str, request_: pb.SubmitRequest) -> None:
    data = request_.SerializeToString().replace(b"bad?", b"bad\xff")
    with pytest.raises(RequestError, match=f"^{field}: not UTF-8$"):
        parse(pb.SubmitRequest, data)


def test_bytes_that_are_no_message_are_refused() -> None:
    with pytest.raises(RequestError, match="not a SubmitRequest message"):
        parse(pb.SubmitRequest, b"\xff\xff\xff")


@pytest.mark.parametrize(
    ("said", "request_"),
    [
        ("thinking: 9", pb.SubmitRequest(thinking=9)),  # type: ignore[arg-type]
        ("return_mask: 77", pb.SubmitRequest(return_mask=[pb.FIELD_TEXT, 77])),  # type: ignore[list-item]
        ("policy.on_update: 5", pb.SubmitRequest(policy=pb.PolicyRule(on_update=5))),  # type: ignore[arg-type]
        ("reward.judge.thinking: 8", pb.SubmitRequest(reward=pb.Reward(judge=pb.JudgeReward(thinking=8)))),  # type: ignore[arg-type]
    ],
)
def test_an_enum_value_of_tomorrow_is_refused_by_the_name_of_its_field(said: str, request_: pb.SubmitRequest) -> None:
    with pytest.raises(RequestError, match=f"^{said} is not known to this server$"):
        parse(pb.SubmitRequest, request_.SerializeToString())


def test_fields_of_tomorrow_are_ignored() -> None:
    unknown = b"\xfa\x7f\x03abc"  # field 2047
    assert parse(pb.CancelRequest, pb.CancelRequest(request_id="a").SerializeToString() + unknown).request_id == "a"  # type: ignore[attr-defined]


def test_what_is_unset_stays_unset_both_ways() -> None:
    limits = pb.Limits()
    fill(limits, {"turns_count_max": 0, "wall_clock_s": None})
    assert plain(limits) == {"turns_count_max": 0}
    asked = pb.SubmitRequest()
    fill(asked, {"thinking": "max", "policy": request.PolicyRule(on_update="cut"), "early_stop": None})
    assert (asked.thinking, asked.policy.on_update, asked.HasField("early_stop")) == (
        pb.THINKING_MAX,
        pb.ON_UPDATE_CUT,
        False,
    )
    assert plain(asked)["thinking"] == "max"
    assert "agent" not in plain(asked)
    assert msgspec.convert(plain(asked.policy), request.PolicyRule) == request.PolicyRule(on_update="cut")


def test_a_record_without_its_big_fields_is_still_a_record() -> None:
    message = pb.Trajectory(rollout_id="r")
    for name in ("reward", "group", "timing", "wal", "lineage", "encoder", "sampling_effective"):
        getattr(message, name).SetInParent()
    message.sampling_effective.MergeFrom(pb.Sampling(temperature=0.7, top_p=1, top_k=0, seed=1))
    got = trajectory_of(message)
    assert (got.reward, got.finish_reason, len(got.token_ids), len(got.loss_mask)) == (None, None, 0, 0)
    assert got.record.sampling_effective.temperature == 0.7
