"""Rewards that no sandbox gives: by a function, or by verdicts of the model, each a rollout in the same log.

A judge's rollout is opened, sampled, resumed and finished like any other, by the Runner that drives the judged one,
which waits for it, and stops where that is to stop.  A resume finds verdicts that were given in the log, and goes on
with those that were begun.

Invariants:
1. A verdict that the log holds is never drawn again.
2. Only a rollout without a readable verdict gets another attempt; with all attempts used up the reward stays unset.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Protocol

from rollout.engine import Engine
from rollout.errors import PreemptedError, VerifierError
from rollout.events import (
    FinishReason,
    Judged,
    RolloutEvent,
    RolloutFinished,
    RolloutOpened,
)
from rollout.ledger import Ledger
from rollout.record import trajectory_record
from rollout.request import CallableReward, JudgeReward
from rollout.rewards import callables, judge
from rollout.rewards.judge import Verdict
from rollout.scheduling.dispatch import Order
from rollout.state import Phase, State

CALLABLE_TIMEOUT_S = 60.0


class Runs(Protocol):
    """What the Runner gives to a judge: the ledger, the engine, the log, and a way to drive a rollout."""

    ledger: Ledger
    engine: Engine
    take_up_judge: Callable[[State], Awaitable[bool]]
    """Have one that was begun go on where it stands; False if it is not to (rollout/recovery.py)."""

    async def log(self, event: RolloutEvent) -> None:
        """Append, fold, tell."""
        ...

    async def drive(self, rollout_id: str, host: Order) -> None:
        """Run one that is open to its end, to an InfraFailed, or to a Preempted with its host."""
        ...


async def call_judge(runs: Runs, state: State, reward: CallableReward) -> AsyncGenerator[RolloutEvent, None]:
    """A function's reward."""
    began, rollout_id = time.monotonic(), state.opened.rollout_id
    record = trajectory_record(runs.ledger, rollout_id)
    value, components = await callables.call(reward.target, record, CALLABLE_TIMEOUT_S)
    spent = time.monotonic() - began
    yield Judged(rollout_id, value, components, reward.target, spent, verifier_id=callables.VERIFIER_ID)


async def model_judge(
    runs: Runs, state: State, reward: JudgeReward, instruction: str, order: Order
) -> AsyncGenerator[RolloutEvent, None]:
    """The mean of the model's verdicts; without one of them the rollout ends as JUDGE_UNAVAILABLE, its reward unset.

    PreemptedError: by its order the rollout stops, and its judges stand.
    """
    began, rollout_id = time.monotonic(), state.opened.rollout_id
    try:
        async with asyncio.TaskGroup() as group:
            samples = range(reward.samples_count)
            asked = [group.create_task(_verdict(runs, state, reward, instruction, sample, order)) for sample in samples]
    except BaseExceptionGroup as failed:
        raise failed.exceptions[0] from None
    given = [task.result() for task in asked]
    if any(runs.ledger.rollouts[judge_id].phase is not Phase.DONE for judge_id, _ in given):
        raise PreemptedError(f"{rollout_id} stops while it is judged")
    verdicts = [verdict for _, verdict in given if verdict is not None]
    if len(verdicts) < len(given):
        yield RolloutFinished(rollout_id, FinishReason.JUDGE_UNAVAILABLE)
        return
    value, components = judge.mean_of(verdicts)
    yield Judged(
        rollout_id,
        value,
        components,
        judge.verifier_digest(reward),
        time.monotonic() - began,
        "\n".join(verdict.reason for verdict in verdicts),
        judge.VERIFIER_ID,
        tuple(judge_id for judge_id, _ in given),
    )


async def _verdict(
    runs: Runs, state: State, reward: JudgeReward, instruction: str, sample: int, order: Order
) -> tuple[str, Verdict | None]:
    """The verdict of one sample, and the rollout that gave it, was the last to fail to, or was stopped."""
    judge_id = ""
    for attempt in range(reward.attempts_max):
        judge_id = judge.judge_id(state.opened.rollout_id, sample, attempt)
        known = runs.ledger.rollouts.get(judge_id)
        if known is None:
            await runs.log(_opened(runs, state, instruction, judge_id, sample))
        if known is None or (known.phase is not Phase.DONE and await runs.take_up_judge(known)):
            await runs.drive(judge_id, order)
        ended = runs.ledger.rollouts[judge_id]
        if ended.failure is not None and ended.phase is not Phase.DONE:
            raise VerifierError(f"{judge_id} could not run: {ended.failure.message}")
        if ended.phase is not Phase.DONE:
            break
        verdict = judge.read_verdict(ended)
        if verdict is not None:
            return judge_id, verdict
    return judge_id, None


def _opened(runs: Runs, state: State, instruction: str, judge_id: str, sample: int) -> RolloutOpened:
    return RolloutOpened(
        judge_id,
        state.job.request_id,
        judge.judge_group(state.opened.rollout_id),
        sample,
        judge.judge_prompt(state, instruction, runs.ledger.tokenizer),
        runs.ledger.tokenizer.digest,
        runs.engine.info,
        has_environment=False,
        judged_rollout_id=state.opened.rollout_id,
    )
