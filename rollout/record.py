"""One rollout as its consumers see it: every per-token array aligned to one `token_ids`.

Built from the ledger alone, so it is the same for a running service, after a crash, and for a log
that was copied elsewhere.  An unset reward is None, never 0; a failure of the service is named in
`infra_failure` and never looks like a wrong answer.

See: docs/formats/trajectory.md.
"""

from __future__ import annotations

from itertools import pairwise

import msgspec

from dsec.trajectory import Trajectory
from rollout.context import Span
from rollout.engine import Sampling
from rollout.ledger import Ledger
from rollout.machine import AnsweredCall, State, Turn, read_turn


class TurnRecord(msgspec.Struct, frozen=True, kw_only=True):
    """One model turn: where its sampled tokens lie, how it ended, what it said."""

    start: int
    length: int
    finish_reason: str
    reasoning: str
    content: str
    parse_error: str | None


class CallRecord(msgspec.Struct, frozen=True, kw_only=True):
    """One tool call; `exit` is None if no command ran."""

    call_index: int
    turn: int
    name: str
    arguments: dict[str, object]
    parse_status: str
    exit: int | None
    timed_out: bool
    truncated_bytes: int
    duration_s: float
    replayed_count: int
    result: str

    @property
    def arguments_json(self) -> str:
        """The arguments as JSON text, in wire order."""
        return msgspec.json.encode(self.arguments).decode()


class VersionRun(msgspec.Struct, frozen=True, kw_only=True):
    """Which weights drew the sampled tokens from `start` on, `length` tokens of the context long."""

    start: int
    length: int
    version: int
    weights_digest: str
    engine_id: str
    engine_build: str


class TrajectoryRecord(msgspec.Struct, frozen=True, kw_only=True):
    """What comes back for one rollout (the field list of docs/formats/trajectory.md)."""

    rollout_id: str
    request_id: str
    task: str
    task_digest: str
    group_id: str
    group_index: int
    group_size: int
    agent: str
    thinking: str
    sampling: Sampling
    token_ids: tuple[int, ...]
    spans: tuple[Span, ...]
    logprobs: tuple[float | None, ...]
    policy_versions: tuple[VersionRun, ...]
    kv_breaks: tuple[int, ...]
    turns: tuple[TurnRecord, ...]
    tool_calls: tuple[CallRecord, ...]
    reward: float | None
    reward_components: dict[str, float]
    verifier_digest: str | None
    verifier_output: str | None
    solution_output: str | None
    finish_reason: str | None
    infra_failure: dict[str, str] | None
    attempt: int
    tokens_sampled: int
    tokens_replayed: int
    commands_replayed: int
    commands_run_twice: int
    sandbox_start_s: float
    tools_s: float
    judge_s: float
    weights_digest: str
    tokenizer_digest: str
    first_lsn: int
    last_lsn: int


def trajectory_record(ledger: Ledger, rollout_id: str) -> TrajectoryRecord:
    """The record of an opened rollout, finished or not.  KeyError if it was never opened."""
    state = ledger.rollouts[rollout_id]
    sandbox = ledger.trajectories.get(rollout_id, Trajectory(rollout_id))
    group = next(g for g in state.job.groups if g.group_id == state.opened.group_id)
    judged, failure = state.judged, state.failure
    return TrajectoryRecord(
        rollout_id=rollout_id,
        request_id=state.job.request_id,
        task=group.task,
        task_digest=group.task_digest,
        group_id=group.group_id,
        group_index=state.opened.group_index,
        group_size=group.size,
        agent=state.job.agent,
        thinking=state.job.thinking,
        sampling=state.job.sampling,
        token_ids=state.token_ids + state.current,
        spans=state.spans + (read_turn(state, ledger.tokenizer)[1] if state.current else ()),
        logprobs=_aligned_logprobs(state),
        policy_versions=version_runs(state),
        kv_breaks=state.resumed_at,
        turns=tuple(_turn(turn) for turn in state.turns),
        tool_calls=tuple(_call(index, call, sandbox) for index, call in enumerate(state.calls)),
        reward=judged.reward if judged else None,
        reward_components=judged.components if judged else {},
        verifier_digest=judged.verifier_digest if judged else None,
        verifier_output=judged.output if judged else None,
        solution_output=state.solution.output if state.solution else None,
        finish_reason=state.finished.reason.value if state.finished else None,
        infra_failure={"code": failure.code, "fault": failure.fault, "message": failure.message} if failure else None,
        attempt=state.attempt,
        tokens_sampled=state.sampled_count,
        tokens_replayed=sum(state.resumed_at),
        commands_replayed=sandbox.replayed_count,
        commands_run_twice=sandbox.run_twice_count,
        sandbox_start_s=state.sandbox_start_s,
        tools_s=sum(call.answer.duration_s for call in state.calls),
        judge_s=judged.duration_s if judged else 0.0,
        weights_digest=state.opened.engine.weights_digest,
        tokenizer_digest=state.opened.tokenizer_digest,
        first_lsn=ledger.lsns[rollout_id][0],
        last_lsn=ledger.lsns[rollout_id][1],
    )


def _aligned_logprobs(state: State) -> tuple[float | None, ...]:
    """One entry for each token of the context: None where the token was not sampled."""
    drawn = iter(state.logprobs)
    aligned: list[float | None] = []
    for span in state.spans:
        # Trainable are the sampled tokens: each has a logprob in the log.
        aligned.extend(next(drawn) if span.trainable else None for _ in range(span.length))
    return (*aligned, *state.current_logprobs)


def version_runs(state: State) -> tuple[VersionRun, ...]:
    """Runs of sampled tokens, cut where a turn ends and where another engine took over."""
    runs = []
    for turn in state.turns:
        cuts = [start for start, _ in state.engines if turn.start < start < turn.start + turn.length]
        edges = [turn.start, *cuts, turn.start + turn.length]
        for begin, end in pairwise(edges):
            engine = next(info for start, info in reversed(state.engines) if start <= begin)
            runs.append(
                VersionRun(
                    start=begin,
                    length=end - begin,
                    version=0,
                    weights_digest=engine.weights_digest,
                    engine_id=engine.name,
                    engine_build=engine.build,
                )
            )
    return tuple(runs)


def _turn(turn: Turn) -> TurnRecord:
    return TurnRecord(
        start=turn.start,
        length=turn.length,
        finish_reason=turn.finish.value,
        reasoning=turn.parsed.reasoning,
        content=turn.parsed.content,
        parse_error=turn.parsed.error.message if turn.parsed.error else None,
    )


def _call(index: int, call: AnsweredCall, sandbox: Trajectory) -> CallRecord:
    steps = [entry for key, entry in sandbox.entries.items() if key.startswith(f"call/{index}/")]
    return CallRecord(
        call_index=index,
        turn=call.turn,
        name=call.call.name,
        arguments=call.call.arguments,
        parse_status=call.call.status.value,
        exit=call.answer.exit_code,
        timed_out=call.answer.timed_out,
        truncated_bytes=call.answer.truncated_bytes,
        duration_s=call.answer.duration_s,
        replayed_count=max((entry.incarnations_count - 1 for entry in steps), default=0),
        result=call.answer.observation,
    )
