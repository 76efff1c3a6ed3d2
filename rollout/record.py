"""One rollout as its consumers see it: every per-token array aligned to one `token_ids`.

Built from the ledger alone, so it is the same for a running service, after a crash, and for a log
that was copied elsewhere.  An unset reward is None, never 0; a failure of the service is named in
`infra_failure` and never looks like a wrong answer.

See: docs/formats/trajectory.md.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import chain, pairwise
from typing import TypeVar

import msgspec

from dsec.trajectory import Entry, Trajectory
from rollout.context import Span, ragged_offsets
from rollout.engine import Sampling
from rollout.export.manifest import SideChannel
from rollout.ledger import Ledger
from rollout.machine import read_turn
from rollout.state import AnsweredCall, State, Turn, weights_at
from toolcall_dsl import V4, SpanKind
from toolcall_dsl.quick import Action

T = TypeVar("T")


class TurnRecord(msgspec.Struct, frozen=True, kw_only=True):
    """One model turn: where its tokens lie, how it ended, what it said."""

    start: int
    length: int
    finish_reason: str
    reasoning: str
    content: str
    parse_error: str | None


class Place(msgspec.Struct, frozen=True):
    """A run of tokens of the context."""

    start: int
    length: int


class CallRecord(msgspec.Struct, frozen=True, kw_only=True):
    """One tool call; `exit` is None if no command ran.

    `span` is where the block of calls lies that it stands in, `result_span` where the model read the answer (None:
    it never did).  `replayed` says that a lost sandbox was rebuilt with it, `outcome_unknown` that a command of it
    began and nobody knows how it ended.
    """

    call_index: int
    turn: int
    name: str
    arguments: dict[str, object]
    span: Place | None
    parse_status: str
    exit: int | None
    timed_out: bool
    duration_s: float
    result_span: Place | None
    truncated_bytes: int
    replayed: bool
    outcome_unknown: bool
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


class KvBreakRecord(msgspec.Struct, frozen=True):
    """Before `position`, the KV cache was `rebuilt`, `restored`, or `kept` across a change of weights."""

    position: int
    cause: str


class RewardRecord(msgspec.Struct, frozen=True, kw_only=True):
    """The judge's word; `value` None is unset, which is not 0."""

    value: float | None = None
    components: dict[str, float] = {}
    verifier_id: str | None = None
    verifier_digest: str | None = None
    judge_rollout_ids: tuple[str, ...] = ()


class Membership(msgspec.Struct, frozen=True, kw_only=True):
    """The place among the rollouts of one task; `missing_reasons` names why members have no reward, by index."""

    group_id: str
    index: int
    size: int
    missing_reasons: dict[int, str] = {}


class Timing(msgspec.Struct, frozen=True, kw_only=True):
    """Seconds by what the rollout waited for; a process that was killed could not tell its own.

    `cached_tokens_count`: tokens of its turns' prompts that the engine had kept and did not compute.
    """

    queue_s: float
    prefill_s: float
    decode_s: float
    environment_s: float
    judge_s: float
    log_s: float
    sandbox_start_s: float
    preempted_s: float
    cached_tokens_count: int


class LogRange(msgspec.Struct, frozen=True, kw_only=True):
    """The log records of a rollout; `digest` is `Ledger.sampled_digest`, which the record's tokens must give too."""

    first_lsn: int
    last_lsn: int
    digest: str


class Lineage(msgspec.Struct, frozen=True, kw_only=True):
    """`resumed_from`: the context lengths at which another attempt went on; `judged_rollout_id`: whom it judges."""

    attempt: int
    resumed_from: tuple[int, ...]
    judged_rollout_id: str


class Encoder(msgspec.Struct, frozen=True, kw_only=True):
    """What made tokens of text."""

    dialect: str
    tokenizer_digest: str


class TrajectoryRecord(msgspec.Struct, frozen=True, kw_only=True):
    """What comes back for one rollout (the field list of docs/formats/trajectory.md)."""

    rollout_id: str
    request_id: str
    project: str
    task: str
    task_digest: str
    agent: str
    thinking: str
    token_ids: tuple[int, ...]
    spans: tuple[Span, ...]
    logprobs: tuple[float | None, ...]
    logprobs_mode: str
    policy_versions: tuple[VersionRun, ...]
    kv_breaks: tuple[KvBreakRecord, ...]
    turns: tuple[TurnRecord, ...]
    finish_reason: str | None
    infra_failure: dict[str, str] | None
    reward: RewardRecord
    verifier_output: str | None
    solution_output: str | None
    group: Membership
    tool_calls: tuple[CallRecord, ...]
    timing: Timing
    preempt_count: int
    tokens_sampled: int
    tokens_replayed: int
    tokens_regenerated: int
    commands_replayed: int
    commands_run_twice: int
    wal: LogRange
    lineage: Lineage
    side_channels: tuple[SideChannel, ...]
    encoder: Encoder
    sampling_effective: Sampling
    topk_offsets: tuple[int, ...] = ()
    topk_ids: tuple[int, ...] = ()
    topk_logprobs: tuple[float, ...] = ()
    mask_offsets: tuple[int, ...] = ()
    mask_ids: tuple[int, ...] = ()


class QuickAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """What a Quick Instruction was answered, as text and in the field of its task (`toolcall_dsl.quick.Answer`).

    `rollout_id` is the record of its own that the answer has.  Of the prompt's tokens `cached_tokens_count` were not
    computed for it.
    """

    task: str
    text: str
    is_complete: bool
    rollout_id: str
    action: Action | None = None
    queries: tuple[str, ...] = ()
    title: str | None = None
    label: str | None = None
    unread: str = ""
    prompt_tokens_count: int = 0
    cached_tokens_count: int = 0
    answer_tokens_count: int = 0


def trajectory_record(ledger: Ledger, rollout_id: str, side_channels: tuple[SideChannel, ...] = ()) -> TrajectoryRecord:
    """The record of an opened rollout, finished or not.  KeyError if it was never opened."""
    state = ledger.rollouts[rollout_id]
    sandbox = ledger.trajectories.get(rollout_id, Trajectory(rollout_id))
    group = next(g for g in state.job.groups if g.group_id == state.opened.group_id)
    failure = state.failure
    spans = state.spans + (read_turn(state, ledger.tokenizer)[1] if state.current else ())
    top_ids = [top.token_ids for top in state.top_logprobs]
    return TrajectoryRecord(
        rollout_id=rollout_id,
        request_id=state.job.request_id,
        project=state.job.project,
        task=group.task,
        task_digest=group.task_digest,
        agent=state.job.agent,
        thinking=state.job.thinking,
        token_ids=state.token_ids + state.current,
        spans=spans,
        logprobs=_aligned_logprobs(state, spans),
        logprobs_mode="processed",
        policy_versions=version_runs(state, spans, ledger.weights),
        kv_breaks=tuple(KvBreakRecord(each.position, each.cause) for each in state.kv_breaks),
        turns=tuple(_turn(turn) for turn in state.turns),
        finish_reason=state.finished.reason.value if state.finished else None,
        infra_failure={"code": failure.code, "fault": failure.fault, "message": failure.message} if failure else None,
        reward=_reward(state),
        verifier_output=state.judged.output if state.judged else None,
        solution_output=state.solution.output if state.solution else None,
        group=Membership(
            group_id=group.group_id,
            index=state.opened.group_index,
            size=group.size,
            missing_reasons=ledger.missing_reasons(group),
        ),
        tool_calls=_calls(state, sandbox),
        timing=_timing(state),
        preempt_count=state.preempt_count,
        tokens_sampled=state.sampled_count,
        tokens_replayed=sum(state.resumed_at),
        tokens_regenerated=ledger.tokens_regenerated[rollout_id],
        commands_replayed=sandbox.replayed_count,
        commands_run_twice=sandbox.run_twice_count,
        wal=LogRange(
            first_lsn=ledger.lsns[rollout_id][0],
            last_lsn=ledger.lsns[rollout_id][1],
            digest=ledger.sampled_digest(rollout_id),
        ),
        lineage=Lineage(
            attempt=state.attempt, resumed_from=state.resumed_at, judged_rollout_id=state.opened.judged_rollout_id
        ),
        side_channels=side_channels,
        encoder=Encoder(dialect=V4.name, tokenizer_digest=state.opened.tokenizer_digest),
        sampling_effective=state.job.sampling,
        topk_offsets=ragged_offsets(spans, top_ids) if state.job.top_logprobs_count else (),
        topk_ids=_flat(state, top_ids),
        topk_logprobs=_flat(state, [top.logprobs for top in state.top_logprobs]),
        mask_offsets=ragged_offsets(spans, state.masks) if "sampling_mask" in state.job.returns else (),
        mask_ids=_flat(state, state.masks),
    )


def _reward(state: State) -> RewardRecord:
    judged = state.judged
    if judged is None:
        return RewardRecord()
    return RewardRecord(
        value=judged.reward,
        components=judged.components,
        verifier_id=judged.verifier_id,
        verifier_digest=judged.verifier_digest,
        judge_rollout_ids=judged.judge_rollout_ids,
    )


def _timing(state: State) -> Timing:
    spent = state.spent
    return Timing(
        queue_s=sum(each.queue_s for each in spent),
        prefill_s=sum(each.prefill_s for each in spent),
        decode_s=sum(each.decode_s for each in spent),
        environment_s=sum(each.environment_s for each in spent),
        judge_s=sum(each.judge_s for each in spent),
        log_s=sum(each.log_s for each in spent),
        sandbox_start_s=state.sandbox_start_s,
        preempted_s=state.preempted_s,
        cached_tokens_count=sum(each.cached_tokens_count for each in spent),
    )


def _aligned_logprobs(state: State, spans: tuple[Span, ...]) -> tuple[float | None, ...]:
    """One entry for each token of the context: None where the token was not sampled."""
    drawn = iter(state.logprobs + state.current_logprobs)
    # Trainable are the sampled tokens: each has a logprob in the log.
    return tuple(next(drawn) if span.trainable else None for span in spans for _ in range(span.length))


def _flat(state: State, rows: Sequence[Sequence[T]]) -> tuple[T, ...]:
    """The rows of the tokens that were logged, one after the other."""
    return tuple(chain.from_iterable(rows[: state.sampled_count]))


def version_runs(state: State, spans: tuple[Span, ...], weights: Mapping[int, str]) -> tuple[VersionRun, ...]:
    """Runs of sampled tokens, cut where a turn ends, where another engine took over, and where the weights changed."""
    sampled: list[tuple[int, int]] = []
    for span in spans:
        if not span.trainable:
            continue
        if sampled and sampled[-1][1] == span.start and not any(turn.start == span.start for turn in state.turns):
            sampled[-1] = sampled[-1][0], span.start + span.length
        else:
            sampled.append((span.start, span.start + span.length))
    cuts = sorted({start for start, _ in (*state.engines, *state.versions)})
    runs = []
    for start, end in sampled:
        for begin, stop in pairwise([start, *(cut for cut in cuts if start < cut < end), end]):
            engine = next(info for at, info in reversed(state.engines) if at <= begin)
            version, digest = weights_at(state, begin, weights)
            runs.append(
                VersionRun(
                    start=begin,
                    length=stop - begin,
                    version=version,
                    weights_digest=digest,
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


def _calls(state: State, sandbox: Trajectory) -> tuple[CallRecord, ...]:
    """The answered calls; the nth call of a block was answered by the nth result after it."""
    blocks = {s.turn: Place(s.start, s.length) for s in state.spans if s.kind == SpanKind.SAMPLED_CALL}
    results: dict[int, list[Place]] = {}
    for span in state.spans:
        if span.kind == SpanKind.TOOL_RESULT:
            results.setdefault(span.turn - 1, []).append(Place(span.start, span.length))
    records, seen = [], Counter[int]()
    for index, call in enumerate(state.calls):
        places, nth = results.get(call.turn, []), seen[call.turn]
        seen[call.turn] += 1
        entries = [entry for key, entry in sandbox.entries.items() if key.startswith(f"call/{index}/")]
        records.append(_call(index, call, blocks.get(call.turn), places[nth] if nth < len(places) else None, entries))
    return tuple(records)


def _call(
    index: int, call: AnsweredCall, span: Place | None, result_span: Place | None, entries: list[Entry]
) -> CallRecord:
    return CallRecord(
        call_index=index,
        turn=call.turn,
        name=call.call.name,
        arguments=call.call.arguments,
        span=span,
        parse_status=call.call.status.value,
        exit=call.answer.exit_code,
        timed_out=call.answer.timed_out,
        duration_s=call.answer.duration_s,
        result_span=result_span,
        truncated_bytes=call.answer.truncated_bytes,
        replayed=any(entry.incarnations_count > 1 for entry in entries),
        outcome_unknown=any(entry.state == "unknown" for entry in entries),
        result=call.answer.observation,
    )
