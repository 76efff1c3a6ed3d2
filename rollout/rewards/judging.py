"""Rewards that no sandbox gives: by a function, or by verdicts of the model, each a rollout in the same log.

A judge's rollout is opened, sampled, resumed and finished like any other, by the Runner that drives the judged one,
which waits for it.  A resume finds verdicts that were given in the log, and goes on with those that were begun.

Invariants:
1. A verdict that the log holds is never drawn again.
2. Only a rollout without a readable verdict gets another attempt; with all attempts used up the reward stays unset.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncGenerator
from typing import Protocol

from rollout.bench.tasks import Task
from rollout.engine import Engine
from rollout.errors import VerifierError
from rollout.events import (
    FinishReason,
    Judged,
    RolloutEvent,
    RolloutFinished,
    RolloutOpened,
    RolloutResumed,
)
from rollout.ledger import Ledger
from rollout.record import trajectory_record
from rollout.request import CallableReward, JudgeReward
from rollout.rewards import callables, judge
from rollout.rewards.judge import Verdict
from rollout.state import Phase, State

CALLABLE_TIMEOUT_S = 60.0


class Runs(Protocol):
    """What the Runner gives to a judge: the ledger, the engine, the log, and a way to drive a rollout."""

    ledger: Ledger
    engine: Engine

    async def log(self, event: RolloutEvent) -> None:
        """Append, fold, tell."""
        ...

    async def drive(self, rollout_id: str, task: Task | None, agent_left_s: float) -> None:
        """Run a rollout that is open to its end, or to an InfraFailed."""
        ...


async def call_judge(runs: Runs, state: State, reward: CallableReward) -> AsyncGenerator[RolloutEvent, None]:
    """A function's reward."""
    began, rollout_id = time.monotonic(), state.opened.rollout_id
    record = trajectory_record(runs.ledger, rollout_id)
    value, components = await callables.call(reward.target, record, CALLABLE_TIMEOUT_S)
    spent = time.monotonic() - began
    yield Judged(rollout_id, value, components, reward.target, spent, verifier_id=callables.VERIFIER_ID)


async def model_judge(
    runs: Runs, state: State, reward: JudgeReward, instruction: str
) -> AsyncGenerator[RolloutEvent, None]:
    """The mean of the model's verdicts; without one of them the rollout ends as JUDGE_UNAVAILABLE, its reward unset."""
    began, rollout_id = time.monotonic(), state.opened.rollout_id
    try:
        async with asyncio.TaskGroup() as group:
            samples = range(reward.samples_count)
            asked = [group.create_task(_verdict(runs, state, reward, instruction, sample)) for sample in samples]
    except BaseExceptionGroup as failed:
        raise failed.exceptions[0] from None
    given = [task.result() for task in asked]
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
    runs: Runs, state: State, reward: JudgeReward, instruction: str, sample: int
) -> tuple[str, Verdict | None]:
    """The verdict of one sample, and the rollout that gave it or was the last to fail to."""
    judge_id = ""
    for attempt in range(reward.attempts_max):
        judge_id = judge.judge_id(state.opened.rollout_id, sample, attempt)
        known = runs.ledger.rollouts.get(judge_id)
        if known is None:
            await runs.log(_opened(runs, state, instruction, judge_id, sample))
        elif known.phase is not Phase.DONE:
            await runs.log(RolloutResumed(judge_id, known.attempt + 1, known.tokens_count, runs.engine.info))
        if known is None or known.phase is not Phase.DONE:
            await runs.drive(judge_id, None, math.inf)
        ended = runs.ledger.rollouts[judge_id]
        if ended.phase is not Phase.DONE:
            why = ended.failure.message if ended.failure else "it was stopped"
            raise VerifierError(f"{judge_id} could not run: {why}")
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
