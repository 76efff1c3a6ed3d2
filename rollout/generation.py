"""One prompt continued, without an environment: what every HTTP dialect asks of the service.

A generation is a job of conversations, so its tokens are in the log before anybody sees them, and whoever asks
again under the same request id gets the same tokens, from the log and then live.  One without an id of its caller's
ends with its caller, and is acknowledged then: nobody could ask for it again.

Invariants:
1. What is yielded is durable.
2. Every member's tokens come in order and once, then its end.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing, suppress
from dataclasses import dataclass

import wal
from rollout.engine import Sampling, TopLogprobs
from rollout.errors import EngineError, RequestError
from rollout.events import InfraFailed, RolloutFinished
from rollout.jobs import make_job
from rollout.request import Conversation, Job, Limits, NoReward, Thinking
from rollout.service import RolloutService
from rollout.state import State
from toolcall_dsl import Policy
from wal.tokens import TokensAppended


@dataclass(frozen=True, kw_only=True)
class Ask:
    """What to continue and how: `count` times each prompt; `is_named` says that the caller chose the id.

    `context_tokens_count_max`: what its contexts claim, if that is less than the longest context (0: it is not).
    """

    request_id: str
    prompts: tuple[Conversation, ...]
    count: int = 1
    thinking: Thinking = "none"
    sampling: Sampling
    tokens_count_max: int
    top_logprobs_count: int = 0
    context_tokens_count_max: int = 0
    project: str = "default"
    priority: int = 0
    parse_policy: Policy = "tolerant"
    is_named: bool = False


@dataclass(frozen=True)
class Drawn:
    """Tokens of member `index` (prompts in order, each `count` times); `top_logprobs` are empty unless asked for."""

    index: int
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[float, ...] = ()
    top_logprobs: tuple[TopLogprobs, ...] = ()


@dataclass(frozen=True)
class Ended:
    """Member `index` has ended; `state` holds all of it."""

    index: int
    state: State


def prompt_length(state: State) -> int:
    """Tokens before the first that was drawn."""
    return sum(len(segment.token_ids) for segment in state.opened.prompt)


def drawn_ids(state: State) -> tuple[int, ...]:
    """Every token that was drawn, of a rollout without an environment."""
    return (state.token_ids + state.current)[prompt_length(state) :]


def drawn_of(index: int, state: State) -> Drawn:
    """All that was drawn of member `index`."""
    logprobs = state.logprobs + state.current_logprobs
    return Drawn(index, drawn_ids(state), logprobs, state.top_logprobs[: len(logprobs)])


def context_bound(service: RolloutService) -> int:
    """The longest context that a generation may have."""
    return service.config.context_tokens_count_max


async def generate(service: RolloutService, ask: Ask) -> AsyncGenerator[Drawn | Ended, None]:
    """Submit, or attach to what was submitted under the id; ends when every member has.

    What the service failed before under this id, it tries again.  RequestError (also for an id that asked for
    something else), EngineError if the service failed one of them.
    """
    bound = min(ask.context_tokens_count_max or context_bound(service), context_bound(service))
    job = make_job(
        Job(
            request_id=ask.request_id,
            thinking=ask.thinking,
            sampling=ask.sampling,
            limits=Limits(
                turns_count_max=1,
                turn_tokens_count_max=min(ask.tokens_count_max, bound),
                context_tokens_count_max=bound,
            ),
            project=ask.project,
            priority=ask.priority,
            parse_policy=ask.parse_policy,
            reward=NoReward(),
            draws_by_place=True,
            ends_with_caller=not ask.is_named,
            top_logprobs_count=ask.top_logprobs_count,
        ),
        ask.prompts,
        group_size=ask.count,
        group_prefix=f"{ask.request_id}/",
    )
    is_over = False
    try:
        await service.submit(job, ask.prompts)  # a caller that goes meanwhile does not stop it
        again = service.resume(_failed(service, job))
        async with aclosing(_follow(service, job, frozenset(again))) as pieces:
            async for piece in pieces:
                yield piece
        is_over = True
    finally:
        if not ask.is_named and job.request_id in service.ledger.jobs:
            try:
                if not is_over:
                    with suppress(wal.ClosedError):  # the next start ends it
                        await service.cancel(job.request_id)
            finally:  # a caller that goes twice does not keep it from its end
                service.retention.let_go(job.request_id)


async def acknowledge(service: RolloutService, request_id: str) -> int:
    """Nobody needs a generation that has ended any longer.  StateError: it has not."""
    return await service.retention.acknowledge([member for member, _, _ in service.ledger.members(request_id)])


def _failed(service: RolloutService, job: Job) -> list[str]:
    states = [service.ledger.rollouts.get(rollout_id) for rollout_id, _, _ in service.ledger.members(job.request_id)]
    return [each.opened.rollout_id for each in states if each and each.failure and not each.finished]


async def _follow(service: RolloutService, job: Job, again: frozenset[str]) -> AsyncGenerator[Drawn | Ended, None]:
    """`again`: members that are tried again, whatever is logged of how they failed."""
    indices = {rollout_id: number for number, (rollout_id, _, _) in enumerate(service.ledger.members(job.request_id))}
    left = set(indices)
    async with aclosing(service.watch(job.request_id)) as events:
        known = {i: service.ledger.rollouts[i] for i in indices if i in service.ledger.rollouts}
        for rollout_id, state in known.items():
            if state.failure is not None and state.finished is None and rollout_id not in again:
                _fail(state.failure)
            yield drawn_of(indices[rollout_id], state)
            if state.finished:
                yield Ended(indices[rollout_id], state)
                left.remove(rollout_id)
        async for _, event in events:
            match event:
                case TokensAppended():
                    state = service.ledger.rollouts[event.request]
                    at = event.start - prompt_length(state)
                    tops = state.top_logprobs[at : at + len(event.token_ids)]
                    yield Drawn(indices[event.request], event.token_ids, event.logprobs, tops)
                case RolloutFinished(rollout_id=rollout_id):
                    left.discard(rollout_id)
                    yield Ended(indices[rollout_id], service.ledger.rollouts[rollout_id])
                case InfraFailed():
                    _fail(event)
    if left:
        raise EngineError(f"{job.request_id}: it was preempted, or the service stops; ask again under the same id")


def _fail(failure: InfraFailed) -> None:
    if failure.fault == "caller":
        raise RequestError(failure.message)
    raise EngineError(failure.message)
