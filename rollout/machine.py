"""The rollout as a pure state machine: `step` folds one event in, `effect` says what is wanted next.

There is no I/O, clock or randomness here.  State is nothing but the fold of the rollout's events and
the wanted effect is a function of the state alone, so going on, resuming after a preemption and
recovering after a crash are one and the same computation.

Invariants:
1. `effect(fold(events))` is the same in every process that reads the same log.
2. A token's position in the log is its position in the context; a gap or an overlap is a MachineError.
3. `token_ids` only ever grows; sampled ids are never decoded and encoded again.

See: docs/architecture.md, "Machine".
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from enum import StrEnum

from rollout import context
from rollout.context import Span, spans_of
from rollout.effects import ApplySolution, Effect, Finish, Judge, Prepare, RunTool, Sample
from rollout.engine import EngineInfo, SampleRequest
from rollout.errors import MachineError
from rollout.events import (
    AgentStopped,
    FinishReason,
    InfraFailed,
    Job,
    Judged,
    PromptSegment,
    RolloutEvent,
    RolloutFinished,
    RolloutOpened,
    RolloutResumed,
    SandboxPrepared,
    SolutionApplied,
    ToolFinished,
)
from toolcall_dsl import V4, ParsedTurn, Tokenizer, ToolCall, parse
from wal.tokens import TokensAppended


class Phase(StrEnum):
    """What the rollout is waiting for."""

    PREPARE = "prepare"
    SAMPLE = "sample"
    TOOLS = "tools"
    SOLVE = "solve"
    JUDGE = "judge"
    FINISH = "finish"
    DONE = "done"


class TurnFinish(StrEnum):
    """How one model turn ended."""

    STOP = "STOP"
    TOOL_CALLS = "TOOL_CALLS"
    PARSE_FAILED = "PARSE_FAILED"
    LENGTH_TURN = "LENGTH_TURN"
    LENGTH_CONTEXT = "LENGTH_CONTEXT"


@dataclass(frozen=True, slots=True)
class Turn:
    """A closed model turn: `length` sampled tokens from `start`, and what they said."""

    start: int
    length: int
    finish: TurnFinish
    parsed: ParsedTurn


@dataclass(frozen=True, slots=True)
class AnsweredCall:
    """A tool call of turn number `turn` with its answer."""

    turn: int
    call: ToolCall
    answer: ToolFinished


@dataclass(frozen=True, slots=True)
class State:
    """A rollout so far.  `token_ids`, `spans` and `logprobs` hold what is closed, `current*` the open turn.

    `logprobs` has one entry for each sampled token, in order.  `calls` are all answered calls;
    `pending` the open block's calls, of which `answered` are answered.  `setup_try` and `judge_try`
    count failed attempts, whose commands a later attempt does not build on.  `engines` says from which
    position of the context on which engine drew.
    """

    job: Job
    opened: RolloutOpened
    phase: Phase
    token_ids: tuple[int, ...]
    spans: tuple[Span, ...]
    logprobs: tuple[float, ...] = ()
    current: tuple[int, ...] = ()
    current_logprobs: tuple[float, ...] = ()
    turns: tuple[Turn, ...] = ()
    calls: tuple[AnsweredCall, ...] = ()
    pending: tuple[ToolCall, ...] = ()
    answered: int = 0
    reason: FinishReason | None = None
    answer: str = ""
    solution: SolutionApplied | None = None
    judged: Judged | None = None
    finished: RolloutFinished | None = None
    failure: InfraFailed | None = None
    attempt: int = 1
    resumed_at: tuple[int, ...] = ()
    sandbox_start_s: float = 0.0
    setup_try: int = 0
    judge_try: int = 0
    engines: tuple[tuple[int, EngineInfo], ...] = ()

    @property
    def tokens_count(self) -> int:
        """Length of the whole context, the open turn included."""
        return len(self.token_ids) + len(self.current)

    @property
    def sampled_count(self) -> int:
        """How many tokens the model drew."""
        return len(self.logprobs) + len(self.current)


def stream_key(rollout_id: str) -> int:
    """The u64 that sets a rollout's noise apart: the same in every run that names it the same."""
    return int.from_bytes(hashlib.blake2b(rollout_id.encode(), digest_size=8).digest(), "little")


def start(job: Job, opened: RolloutOpened) -> State:
    """The state after RolloutOpened."""
    segments = opened.prompt
    return State(
        job=job,
        opened=opened,
        phase=Phase.PREPARE,
        token_ids=tuple(token for segment in segments for token in segment.token_ids),
        spans=spans_of(segments, 0, 0),
        engines=((0, opened.engine),),
    )


def effect(state: State, tokenizer: Tokenizer) -> Effect | None:
    """What is wanted next; None when the rollout is over."""
    match state.phase:
        case Phase.PREPARE:
            return Prepare()
        case Phase.SAMPLE:
            return Sample(_request(state, tokenizer))
        case Phase.TOOLS:
            return RunTool(len(state.calls), state.pending[state.answered])
        case Phase.SOLVE:
            return ApplySolution()
        case Phase.JUDGE:
            return Judge(None if state.job.agent == "oracle" else state.answer)
        case Phase.FINISH:
            if state.reason is None:
                raise MachineError(f"{state.opened.rollout_id}: finishing without a reason")
            return Finish(state.reason)
        case Phase.DONE:
            return None


def step(state: State, event: RolloutEvent, tokenizer: Tokenizer) -> State:
    """Fold one event in.  MachineError if it does not answer what the state waits for."""
    match event, state.phase:
        case RolloutResumed(), _:
            return _resume(state, event)
        case InfraFailed(), phase:
            return replace(
                state,
                failure=event,
                setup_try=state.setup_try + (phase is Phase.PREPARE),
                judge_try=state.judge_try + (phase is Phase.JUDGE),
            )
        case RolloutFinished(), phase if phase is not Phase.DONE:
            closed = _close_cut_turn(state, tokenizer)  # a cancel may come in mid-turn
            return replace(closed, phase=Phase.DONE, reason=event.reason, finished=event)
        case SandboxPrepared(), Phase.PREPARE:
            return _prepared(state, event)
        case TokensAppended(), Phase.SAMPLE:
            return _append(state, event, tokenizer)
        case ToolFinished(), Phase.TOOLS:
            return _answer(state, event, tokenizer)
        case SolutionApplied(), Phase.SOLVE:
            return replace(state, phase=Phase.JUDGE, solution=event)
        case AgentStopped(), Phase.SAMPLE | Phase.TOOLS:
            return replace(_close_cut_turn(state, tokenizer), phase=Phase.JUDGE, reason=event.reason)
        case Judged(), Phase.JUDGE:
            return replace(state, phase=Phase.FINISH, judged=event)
    raise MachineError(f"{state.opened.rollout_id}: {type(event).__name__} does not fit phase {state.phase}")


def is_current(state: State, key: str) -> bool:
    """True unless a command's key belongs to an attempt at the set-up or the verdict that failed."""
    part, _, rest = key.partition("/")
    current = {"setup": state.setup_try, "judge": state.judge_try}.get(part)
    return current is None or rest.startswith(f"{current}/")


def _prepared(state: State, event: SandboxPrepared) -> State:
    state = replace(state, sandbox_start_s=event.duration_s)
    if state.job.agent == "model" and state.tokens_count >= state.job.limits.context_tokens_count_max:
        return replace(state, phase=Phase.JUDGE, reason=FinishReason.LENGTH_CONTEXT)
    if state.job.agent == "model":
        return replace(state, phase=Phase.SAMPLE)
    return replace(state, phase=Phase.SOLVE if state.job.agent == "oracle" else Phase.JUDGE, reason=FinishReason.STOP)


def _resume(state: State, event: RolloutResumed) -> State:
    engines = state.engines
    if event.engine is not None and event.engine != engines[-1][1]:
        engines = (*engines, (event.tokens_count, event.engine))
    resumed_at = (*state.resumed_at, event.tokens_count)
    return replace(state, attempt=event.attempt, resumed_at=resumed_at, failure=None, engines=engines)


def _request(state: State, tokenizer: Tokenizer) -> SampleRequest:
    limits = state.job.limits
    return SampleRequest(
        session=state.opened.rollout_id,
        token_ids=state.token_ids + state.current,
        sampling=state.job.sampling,
        stream_key=stream_key(state.opened.rollout_id),
        tokens_count_max=min(
            limits.turn_tokens_count_max - len(state.current), limits.context_tokens_count_max - state.tokens_count
        ),
        stop_ids=frozenset({tokenizer.control(V4.eos)}),
    )


def _append(state: State, event: TokensAppended, tokenizer: Tokenizer) -> State:
    if event.start != state.tokens_count:
        raise MachineError(
            f"{event.request}: tokens logged at position {event.start}, the context ends at {state.tokens_count}"
        )
    state = replace(
        state,
        current=state.current + event.token_ids,
        current_logprobs=state.current_logprobs + event.logprobs,
    )
    limits = state.job.limits
    if state.current[-1] == tokenizer.control(V4.eos):
        return _close_turn(state, tokenizer)
    if len(state.current) >= limits.turn_tokens_count_max:
        return _close_turn(state, tokenizer, TurnFinish.LENGTH_TURN)
    if state.tokens_count >= limits.context_tokens_count_max:
        return _close_turn(state, tokenizer, TurnFinish.LENGTH_CONTEXT)
    return state


def read_turn(state: State, tokenizer: Tokenizer) -> tuple[ParsedTurn, tuple[Span, ...]]:
    """What the open turn's tokens say so far, and the spans that they take in the context."""
    parsed = parse(state.current, tokenizer, thinking=state.job.thinking != "none", policy="strict")
    begin, number = len(state.token_ids), len(state.turns)
    return parsed, tuple(Span(begin + s, n, kind.value, number, trainable=True) for s, n, kind in parsed.spans)


def _close_turn(state: State, tokenizer: Tokenizer, cut: TurnFinish | None = None) -> State:
    parsed, spans = read_turn(state, tokenizer)
    if cut is not None:
        finish = cut
    elif parsed.error is not None:
        finish = TurnFinish.PARSE_FAILED
    else:
        finish = TurnFinish.TOOL_CALLS if parsed.calls else TurnFinish.STOP
    state = replace(
        state,
        token_ids=state.token_ids + state.current,
        logprobs=state.logprobs + state.current_logprobs,
        spans=state.spans + spans,
        turns=(*state.turns, Turn(len(state.token_ids), len(state.current), finish, parsed)),
        current=(),
        current_logprobs=(),
    )
    if cut is not None:
        return replace(state, phase=Phase.JUDGE, reason=FinishReason(cut.value))
    if parsed.error is not None:
        return _continue_with(state, (f"error: {parsed.error.message}",), tokenizer)
    if parsed.calls:
        return replace(state, phase=Phase.TOOLS, pending=parsed.calls, answered=0)
    return replace(state, phase=Phase.JUDGE, reason=FinishReason.STOP, answer=parsed.content)


def _close_cut_turn(state: State, tokenizer: Tokenizer) -> State:
    """A turn that was cut off from outside keeps its tokens; its calls never run."""
    return _close_turn(state, tokenizer, TurnFinish.LENGTH_TURN) if state.current else state


def _answer(state: State, event: ToolFinished, tokenizer: Tokenizer) -> State:
    if event.call_index != len(state.calls):
        raise MachineError(f"{event.rollout_id}: call {event.call_index} answered, {len(state.calls)} was open")
    call = AnsweredCall(len(state.turns) - 1, state.pending[state.answered], event)
    state = replace(state, calls=(*state.calls, call), answered=state.answered + 1)
    if state.answered < len(state.pending):
        return state
    observations = tuple(call.answer.observation for call in state.calls[-state.answered :])
    return _continue_with(replace(state, pending=(), answered=0), observations, tokenizer)


def _continue_with(state: State, observations: tuple[str, ...], tokenizer: Tokenizer) -> State:
    """Append what the model reads next, or end the agent's part if a bound is met."""
    if len(state.turns) >= state.job.limits.turns_count_max:
        return replace(state, phase=Phase.JUDGE, reason=FinishReason.TURN_LIMIT)
    segments: tuple[PromptSegment, ...] = context.results(observations, tokenizer, state.job.thinking)
    added = tuple(token for segment in segments for token in segment.token_ids)
    if len(state.token_ids) + len(added) >= state.job.limits.context_tokens_count_max:
        return replace(state, phase=Phase.JUDGE, reason=FinishReason.LENGTH_CONTEXT)
    return replace(
        state,
        phase=Phase.SAMPLE,
        token_ids=state.token_ids + added,
        spans=state.spans + spans_of(segments, len(state.token_ids), len(state.turns)),
    )
