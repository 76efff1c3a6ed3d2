"""Records for tests of what is written of them: rollouts of any length, made up, equal for equal arguments."""

from __future__ import annotations

import random

import msgspec

from rollout.context import Span
from rollout.engine import Sampling
from rollout.record import (
    CallRecord,
    Encoder,
    Lineage,
    LogRange,
    Membership,
    Place,
    RewardRecord,
    Timing,
    TrajectoryRecord,
    TurnRecord,
    VersionRun,
)

_BLANK = TrajectoryRecord(
    rollout_id="",
    request_id="job",
    project="",
    task="",
    task_digest="d" * 64,
    agent="model",
    thinking="high",
    token_ids=(),
    spans=(),
    logprobs=(),
    logprobs_mode="processed",
    policy_versions=(),
    kv_breaks=(),
    turns=(),
    finish_reason=None,
    infra_failure=None,
    reward=RewardRecord(),
    verifier_output=None,
    solution_output=None,
    group=Membership(group_id="", index=0, size=1),
    tool_calls=(),
    timing=Timing(
        queue_s=0.0,
        prefill_s=0.1,
        decode_s=1.0,
        environment_s=0.2,
        judge_s=0.1,
        log_s=0.01,
        sandbox_start_s=0.01,
        preempted_s=0.0,
        cached_tokens_count=0,
    ),
    preempt_count=0,
    tokens_sampled=0,
    tokens_replayed=0,
    tokens_regenerated=0,
    commands_replayed=0,
    commands_run_twice=0,
    wal=LogRange(first_lsn=1, last_lsn=2, digest="0" * 64),
    lineage=Lineage(attempt=1, resumed_from=(), judged_rollout_id=""),
    side_channels=(),
    encoder=Encoder(dialect="v4", tokenizer_digest="0" * 64),
    sampling_effective=Sampling(),
)


def made_up_record(
    group_id: str,
    index: int = 0,
    *,
    size: int = 1,
    turns: tuple[tuple[int, int], ...] = ((20, 30),),
    reward: float | None = 1.0,
    finish_reason: str | None = "STOP",
    version: int = 0,
    task: str = "task",
) -> TrajectoryRecord:
    """The rollout `{group_id}.{index}`; `turns` are counts of read, then of sampled tokens."""
    rollout_id = f"{group_id}.{index}"
    dice = random.Random(rollout_id)  # noqa: S311 - it makes data, not secrets
    logprobs: list[float | None] = []
    spans, runs, said, at = [], [], [], 0
    for turn, (read, sampled) in enumerate(turns):
        spans.append(Span(at, read, "TOOL_RESULT" if turn else "USER", turn, trainable=False))
        logprobs += [None] * read
        at += read
        if not sampled:
            continue
        spans.append(Span(at, sampled, "SAMPLED_CALL", turn, trainable=True))
        logprobs += [-dice.random() for _ in range(sampled)]
        said.append(
            TurnRecord(
                start=at, length=sampled, finish_reason="TOOL_CALLS", reasoning="…", content="ls", parse_error=None
            )
        )
        runs.append(
            VersionRun(
                start=at,
                length=sampled,
                version=version + turn,
                weights_digest="0" * 64,
                engine_id="e",
                engine_build="1",
            )
        )
        at += sampled
    failure = {"code": "ENGINE_ERROR", "fault": "peer", "message": "it went away"}
    return msgspec.structs.replace(
        _BLANK,
        rollout_id=rollout_id,
        task=task,
        token_ids=tuple(dice.randrange(1 << 17) for _ in range(at)),
        spans=tuple(spans),
        logprobs=tuple(logprobs),
        policy_versions=tuple(runs),
        turns=tuple(said),
        finish_reason=finish_reason,
        infra_failure=None if finish_reason else failure,
        reward=RewardRecord(value=reward, components={} if reward is None else {"tests": reward}),
        group=Membership(group_id=group_id, index=index, size=size),
        tool_calls=tuple(_call(turn, each) for turn, each in enumerate(said[:-1])),
        tokens_sampled=sum(sampled for _, sampled in turns),
    )


def _run(start: int, length: int, version: int) -> VersionRun:
    return VersionRun(
        start=start, length=length, version=version, weights_digest="0" * 64, engine_id="e", engine_build="1"
    )


def _call(turn: int, said: TurnRecord) -> CallRecord:
    return CallRecord(
        call_index=turn,
        turn=turn,
        name="bash",
        arguments={"command": "ls"},
        span=Place(said.start, said.length),
        parse_status="ok",
        exit=0,
        timed_out=False,
        duration_s=0.25,
        result_span=None,
        truncated_bytes=0,
        replayed=False,
        outcome_unknown=False,
        result="a.txt\n",
    )
