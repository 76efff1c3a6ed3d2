"""The rollout as a pure state machine: `step` folds one event in, `effect` says what is wanted next.

There is no I/O, clock or randomness here.  State is nothing but the fold of the rollout's events and
the wanted effect is a function of the state alone, so going on, resuming after a preemption and
recovering after a crash are one and the same computation.

Invariants:
1. `effect(fold(events))` is the same in every process that reads the same log.
2. A token's position in the log is its position in the context; a gap or an overlap is a MachineError.
3. `token_ids` only ever grows; sampled ids are never decoded and encoded again.
4. An event is folded only in the phases that `TRANSITIONS` names for it.

See: docs/architecture.md, "Machine".
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from itertools import groupby
from typing import Any

from msgspec.structs import replace

from rollout import context
from rollout.column import Column
from rollout.context import Span, spans_of
from rollout.effects import ApplySolution, Effect, Finish, Force, Judge, Prepare, RunTool, Sample
from rollout.engine import Routes, Sampled, SampleRequest
from rollout.errors import MachineError
from rollout.events import (
    AgentStopped,
    FinishReason,
    InfraFailed,
    Judged,
    KvBroke,
    NetworkSwitched,
    Preempted,
    PromptSegment,
    RolloutEvent,
    RolloutFinished,
    RolloutResumed,
    SandboxPrepared,
    SideChannelsFound,
    SolutionApplied,
    TokensForced,
    ToolFinished,
    TopLogprobsFound,
)
from rollout.request import NoReward, TestsReward
from rollout.state import AnsweredCall, KvBreak, Phase, State, Turn
from toolcall_dsl import V4, ParsedTurn, SpanKind, Tokenizer, parse
from wal.tokens import TokensAppended


def stream_key(rollout_id: str) -> int:
    """The u64 that sets a rollout's noise apart: the same in every run that names it the same."""
    return int.from_bytes(hashlib.blake2b(rollout_id.encode(), digest_size=8).digest(), "little")


def effect(state: State, tokenizer: Tokenizer) -> Effect | None:
    """What is wanted next; None when the rollout is over."""
    match state.phase:
        case Phase.PREPARE:
            return Prepare()
        case Phase.SAMPLE:
            if _thinking_left(state, tokenizer) == 0:
                return Force(state.tokens_count, (tokenizer.control(V4.think_close),))
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
    phases, fold = TRANSITIONS.get(type(event), (frozenset(), None))
    if fold is None or state.phase not in phases:
        raise MachineError(f"{state.opened.rollout_id}: {type(event).__name__} does not fit phase {state.phase}")
    return fold(state, event, tokenizer)


def is_current(state: State, key: str) -> bool:
    """True unless a command's key belongs to an attempt at the set-up or the verdict that failed."""
    part, _, rest = key.partition("/")
    current = {"setup": state.setup_try, "judge": state.judge_try}.get(part)
    return current is None or rest.startswith(f"{current}/")


def _prepared(state: State, event: SandboxPrepared, _: Tokenizer) -> State:
    state = replace(state, sandbox_start_s=event.duration_s)
    if state.job.agent == "model" and _is_full(state):
        return _end_agent(state, FinishReason.LENGTH_CONTEXT)
    if state.job.agent == "model":
        return replace(state, phase=Phase.SAMPLE)
    if state.job.agent == "oracle":
        return replace(state, phase=Phase.SOLVE, reason=FinishReason.STOP)
    return _end_agent(state, FinishReason.STOP)


def _end_agent(state: State, reason: FinishReason, answer: str = "") -> State:
    """The agent is done: what it left is judged, if anybody judges."""
    reward, has_environment = state.job.reward, state.opened.has_environment
    is_judged = not isinstance(reward, NoReward) and (has_environment or not isinstance(reward, TestsReward))
    return replace(state, phase=Phase.JUDGE if is_judged else Phase.FINISH, reason=reason, answer=answer)


def _resume(state: State, event: RolloutResumed, _: Tokenizer) -> State:
    engines = state.engines
    if event.engine is not None and event.engine != engines[-1][1]:
        engines = (*engines, (event.tokens_count, event.engine))
    return replace(
        state,
        attempt=event.attempt,
        resumed_at=(*state.resumed_at, event.tokens_count),
        kv_breaks=(*state.kv_breaks, KvBreak(event.tokens_count, event.kv)),
        failure=None,
        preempted=None,
        preempted_s=state.preempted_s + event.preempted_s,
        engines=engines,
    )


def _preempt(state: State, event: Preempted, _: Tokenizer) -> State:
    spent = (*state.spent, event.spent)
    return replace(state, preempted=event, preempt_count=state.preempt_count + 1, spent=spent)


def _fail(state: State, event: InfraFailed, _: Tokenizer) -> State:
    return replace(
        state,
        failure=event,
        spent=(*state.spent, event.spent),
        setup_try=state.setup_try + (state.phase is Phase.PREPARE),
        judge_try=state.judge_try + (state.phase is Phase.JUDGE),
    )


def _finish(state: State, event: RolloutFinished, tokenizer: Tokenizer) -> State:
    closed = _close_cut_turn(state, tokenizer, event.reason)  # a cancel may come in mid-turn
    return replace(closed, phase=Phase.DONE, reason=event.reason, finished=event, spent=(*closed.spent, event.spent))


def _pass(state: State, _: RolloutEvent, __: Tokenizer) -> State:
    """Nothing that is wanted depends on it."""
    return state


def _break_kv(state: State, event: KvBroke, _: Tokenizer) -> State:
    return replace(state, kv_breaks=(*state.kv_breaks, KvBreak(event.position, event.cause)))


def _solved(state: State, event: SolutionApplied, _: Tokenizer) -> State:
    return _end_agent(replace(state, solution=event), FinishReason.STOP)


def _stop_agent(state: State, event: AgentStopped, tokenizer: Tokenizer) -> State:
    return _end_agent(_close_cut_turn(state, tokenizer, event.reason), event.reason)


def _judged(state: State, event: Judged, _: Tokenizer) -> State:
    return replace(state, phase=Phase.FINISH, judged=event)


def _thinking_left(state: State, tokenizer: Tokenizer) -> int | None:
    """How many tokens of thinking the open turn may still have; None if nothing bounds it, or it has ended."""
    bound = state.job.limits.thinking_tokens_count_max
    if not bound or state.job.thinking == "none" or tokenizer.control(V4.think_close) in state.current:
        return None
    return max(0, bound - len(state.current))


def _request(state: State, tokenizer: Tokenizer) -> SampleRequest:
    limits = state.job.limits
    bounds = [
        limits.turn_tokens_count_max - len(state.current),
        limits.context_tokens_count_max - state.tokens_count,
    ]
    if limits.sampled_tokens_count_max:
        bounds.append(limits.sampled_tokens_count_max - state.sampled_count)
    if (thinking_left := _thinking_left(state, tokenizer)) is not None:
        bounds.append(thinking_left)
    return SampleRequest(
        session=state.opened.rollout_id,
        token_ids=state.token_ids + state.current,
        sampling=state.job.sampling,
        stream_key=stream_key(_noise_name(state)),
        tokens_count_max=min(bounds),
        stop_ids=frozenset({tokenizer.control(V4.eos)}),
        on_update=state.job.policy.on_update,
        priority=state.job.priority,
        top_logprobs_count=state.job.top_logprobs_count,
        returns_mask="sampling_mask" in state.job.returns,
        returns_routes="routes" in state.job.returns,
        returns_hidden="hidden" in state.job.returns,
    )


def _noise_name(state: State) -> str:
    name = state.opened.rollout_id
    return name.removeprefix(f"{state.job.request_id}/") if state.job.draws_by_place else name


def _check_start(state: State, start: int) -> None:
    if start != state.tokens_count:
        raise MachineError(
            f"{state.opened.rollout_id}: tokens logged at position {start}, the context ends at {state.tokens_count}"
        )


def _append(state: State, event: TokensAppended, tokenizer: Tokenizer) -> State:
    _check_start(state, event.start)
    versions = state.versions
    if not versions or versions[-1][1] != event.policy_version:
        versions = (*versions, (event.start, event.policy_version))
    drawn = state.current_logprobs + event.logprobs
    state = replace(state, current=state.current + event.token_ids, current_logprobs=drawn, versions=versions)
    return _close_if_full(state, tokenizer)


def _note_top_logprobs(state: State, event: TopLogprobsFound, _: Tokenizer) -> State:
    _check_start(state, event.start)
    return replace(state, top_logprobs=state.top_logprobs.first(state.sampled_count) + event.top_logprobs)


def _note_side_channels(state: State, event: SideChannelsFound, _: Tokenizer) -> State:
    _check_start(state, event.start)
    state = replace(state, masks=state.masks.first(state.sampled_count) + event.masks)
    if event.routes is None:
        return state
    if event.routes.start < _routes_settled(state):
        raise MachineError(f"{event.rollout_id}: routes logged again from position {event.routes.start}")
    return replace(state, routes_end=event.routes.start + len(event.routes.expert_ids) // _row_bytes(state))


def side_channels(state: State, chunk: Sampled) -> SideChannelsFound:
    """What is to be logged of a chunk that comes next: no routes that the log has already."""
    routes = chunk.routes
    if routes is not None and (known := _routes_settled(state) - routes.start) > 0:
        routes = Routes(routes.start + known, routes.expert_ids[known * _row_bytes(state) :])
    return SideChannelsFound(
        state.opened.rollout_id, state.tokens_count, chunk.policy_version, chunk.masks, routes, chunk.hidden
    )


def _routes_settled(state: State) -> int:
    """Positions before this one have their routes in the log, and are followed by a token of the log."""
    return min(state.routes_end, max(0, state.tokens_count - 1))


def _row_bytes(state: State) -> int:
    routing = state.engines[-1][1].routing
    if routing is None:
        raise MachineError(f"{state.opened.rollout_id}: routes of an engine that tells none")
    return routing.row_bytes


def _force(state: State, event: TokensForced, tokenizer: Tokenizer) -> State:
    _check_start(state, event.start)
    forced = state.forced | frozenset(range(event.start, event.start + len(event.token_ids)))
    return _close_if_full(replace(state, current=state.current + event.token_ids, forced=forced), tokenizer)


def _close_if_full(state: State, tokenizer: Tokenizer) -> State:
    if state.current[-1] == tokenizer.control(V4.eos):
        return _close_turn(state, tokenizer)
    if len(state.current) >= state.job.limits.turn_tokens_count_max:
        return _close_turn(state, tokenizer, FinishReason.LENGTH_TURN)
    return _close_turn(state, tokenizer, FinishReason.LENGTH_CONTEXT) if _is_full(state) else state


def _is_full(state: State, added_count: int = 0) -> bool:
    """Whether the context (with so many tokens more), or the budget of sampled tokens, has no room for another one."""
    limits = state.job.limits
    is_spent = 0 < limits.sampled_tokens_count_max <= state.sampled_count
    return is_spent or state.tokens_count + added_count >= limits.context_tokens_count_max


def read_turn(state: State, tokenizer: Tokenizer) -> tuple[ParsedTurn, tuple[Span, ...]]:
    """What the open turn's tokens say so far, and the spans that they take in the context."""
    ids, thinks = tuple(state.current), state.job.thinking != "none"
    parsed = parse(ids, tokenizer, thinking=thinks, policy=state.job.parse_policy)
    begin, number = len(state.token_ids), len(state.turns)
    kinds = [(begin + s + i, kind.value) for s, n, kind in parsed.spans for i in range(n)] if state.forced else []
    if not kinds:
        return parsed, tuple(Span(begin + s, n, kind.value, number, trainable=True) for s, n, kind in parsed.spans)
    marked = [(at, SpanKind.FORCED.value if at in state.forced else kind) for at, kind in kinds]
    runs = [(kind, [at for at, _ in run]) for kind, run in groupby(marked, key=lambda pair: pair[1])]
    return parsed, tuple(
        Span(run[0], len(run), kind, number, trainable=kind != SpanKind.FORCED.value) for kind, run in runs
    )


def _close_turn(state: State, tokenizer: Tokenizer, cut: FinishReason | None = None) -> State:
    parsed, spans = read_turn(state, tokenizer)
    if cut is not None:
        finish = cut
    elif parsed.error is not None:
        finish = FinishReason.PARSE_FAILED
    else:
        finish = FinishReason.TOOL_CALLS if parsed.calls else FinishReason.STOP
    state = replace(
        state,
        token_ids=state.token_ids + state.current,
        logprobs=state.logprobs + state.current_logprobs,
        spans=state.spans + spans,
        turns=(*state.turns, Turn(len(state.token_ids), len(state.current), finish, parsed)),
        current=Column(),
        current_logprobs=Column(),
        forced=frozenset(),
    )
    if cut is not None:
        return _end_agent(state, cut)
    if finish is FinishReason.STOP or not state.opened.has_environment:  # else the caller runs the calls
        return _end_agent(state, finish, parsed.content)
    if parsed.error is not None:
        return _continue_with(state, (f"error: {parsed.error.message}",), tokenizer)
    return replace(state, phase=Phase.TOOLS, pending=parsed.calls, answered=0)


def _close_cut_turn(state: State, tokenizer: Tokenizer, reason: FinishReason) -> State:
    """A turn that was cut off from outside keeps its tokens; its calls never run."""
    return _close_turn(state, tokenizer, reason) if state.current else state


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
        return _end_agent(state, FinishReason.TURN_LIMIT)
    segments: tuple[PromptSegment, ...] = context.results(observations, tokenizer, state.job.thinking)
    added = tuple(token for segment in segments for token in segment.token_ids)
    if _is_full(state, len(added)):
        return _end_agent(state, FinishReason.LENGTH_CONTEXT)
    return replace(
        state,
        phase=Phase.SAMPLE,
        token_ids=state.token_ids + added,
        spans=state.spans + spans_of(segments, len(state.token_ids), len(state.turns)),
    )


_ALWAYS = frozenset(Phase)
_OPEN = _ALWAYS - {Phase.DONE}
TRANSITIONS: dict[type, tuple[frozenset[Phase], Callable[[State, Any, Tokenizer], State]]] = {
    RolloutResumed: (_ALWAYS, _resume),
    Preempted: (_OPEN, _preempt),
    KvBroke: (_OPEN, _break_kv),
    InfraFailed: (_ALWAYS, _fail),
    NetworkSwitched: (_ALWAYS, _pass),
    SandboxPrepared: (frozenset({Phase.PREPARE}), _prepared),
    TokensAppended: (frozenset({Phase.SAMPLE}), _append),
    TopLogprobsFound: (frozenset({Phase.SAMPLE}), _note_top_logprobs),
    SideChannelsFound: (frozenset({Phase.SAMPLE}), _note_side_channels),
    TokensForced: (frozenset({Phase.SAMPLE}), _force),
    ToolFinished: (frozenset({Phase.TOOLS}), _answer),
    AgentStopped: (frozenset({Phase.SAMPLE, Phase.TOOLS}), _stop_agent),
    SolutionApplied: (frozenset({Phase.SOLVE}), _solved),
    Judged: (frozenset({Phase.JUDGE}), _judged),
    RolloutFinished: (_OPEN, _finish),
}
"""Event -> the phases that it may come in, and how it is folded."""
