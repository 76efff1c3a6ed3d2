"""The members of jobs, from outside: how each is opened or taken up again, and ended when nobody wants it any more."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from functools import lru_cache

from dsec.terminal import counted
from rollout import context, recovery
from rollout.engine import Engine
from rollout.engines.kv_files import KvFiles
from rollout.environment.sandboxes import Sandboxes
from rollout.errors import EngineError, ForeignWeightsError
from rollout.events import (
    Event,
    FinishReason,
    InfraFailed,
    PromptSegment,
    RolloutFinished,
    RolloutOpened,
    RolloutResumed,
    Spent,
)
from rollout.ledger import Ledger
from rollout.recovery import UNOPENED, Action, Found, Kv, Weights
from rollout.request import Thinking
from rollout.runner import Rollout
from rollout.scheduling.dispatch import Order
from rollout.state import State, weights_at
from wal.tokens import Cause

_ENDS_IN_FLIGHT_MAX = 256
"""Rollouts whose last events are written together."""
_PROMPTS_KEPT_MAX = 32


class Members:
    """Rollouts that jobs asked for."""

    def __init__(
        self,
        ledger: Ledger,
        engine: Engine,
        sandboxes: Sandboxes,
        kv_files: KvFiles,
        record: Callable[[Event], Awaitable[None]],
    ) -> None:
        """`record` makes an event durable, folds it and tells it."""
        self._ledger = ledger
        self._engine = engine
        self._sandboxes = sandboxes
        self._kv_files = kv_files
        self._record = record
        self._spent: dict[str, Spent] = {}
        """By those that were cut off, until their ends are logged."""
        self._prompt = lru_cache(_PROMPTS_KEPT_MAX)(self._encode)  # a group's members begin alike

    async def take_up(self, rollout_id: str, order: Order) -> Rollout | None:
        """Open a rollout, or go on with one that was preempted or left by an earlier process, so that it can be run.

        None if `recovery.decide` has it end, or stand, where it is.
        """
        state = self._ledger.rollouts.get(rollout_id)
        if state is not None:
            if not await self.go_on(state):
                return None
        elif recovery.decide(self._found(rollout_id)).action is Action.OPEN:
            await self._open(rollout_id)
        else:
            return None
        job, group, _ = self._ledger.member(rollout_id)
        task = self._ledger.tasks.get(group.task_digest)
        bounds = [job.limits.wall_clock_s, task.agent_timeout_s if task else 0.0]
        bound_s = min((bound for bound in bounds if bound > 0), default=math.inf)
        worked_s = sum(each.agent_s for each in state.spent) if state else 0.0
        waited_s = 0.0 if state and state.preempted else order.waited_s  # that, the resume has said
        return Rollout(rollout_id, task, bound_s - worked_s, order, spent=Spent(queue_s=waited_s))

    def check_weights(self, rollout_ids: Iterable[str]) -> None:
        """EngineError if some of these could not go on: other weights drew them, and the engine's are no newer."""
        states = [self._ledger.rollouts[each] for each in rollout_ids if self._ledger.asks_for(each)]
        found = ((state, self._found(state.opened.rollout_id, state)) for state in states)
        refused = [state for state, each in found if recovery.decide(each).action is Action.REFUSE]
        if refused:
            state, now = refused[0], self._engine.info
            version, drew = weights_at(state, state.tokens_count - 1, self._ledger.weights)
            raise EngineError(
                f"{counted(len(refused), 'unfinished rollout')} of this log cannot go on: {state.opened.rollout_id} "
                f"was drawn by {state.engines[-1][1].name}, weights {drew[:12]}, and this is {now.name}, weights "
                f"{now.weights_digest[:12]}, no newer version: serve it with the --engine that it had, or have other "
                f"weights go on with it: DSEC_NEWER_WEIGHTS={version + 1}:DIR"
            )

    def cut_off(self, rollout: Rollout) -> None:
        """It was stopped for good, and could not tell what it had spent: `finish` does."""
        state = self._ledger.rollouts[rollout.id]
        if state.finished is None and state.preempted is None:
            self._spent[rollout.id] = rollout.spent

    async def go_on(self, state: State) -> bool:
        """Have a rollout, a judge's too, that was preempted or left go on where it stands; False as in `take_up`."""
        rollout_id = state.opened.rollout_id
        plan = recovery.decide(self._found(rollout_id, state))
        if plan.action is Action.GO_ON:
            await self._resume(state, plan.kv)
        elif plan.action is Action.END_STALE:
            await self.finish([rollout_id], FinishReason.STALE)
        elif plan.action is Action.REFUSE:
            why = "was drawn with other weights, and these are no newer version: serve it with the engine it had"
            await self._record(InfraFailed(rollout_id, EngineError.code, EngineError.fault, f"{rollout_id} {why}"))
        return plan.action is Action.GO_ON

    def _found(self, rollout_id: str, state: State | None = None) -> Found:
        """What the log and the engine say; the command under way is found out when it is asked for."""
        if state is None:
            return Found(UNOPENED, self._ledger.member(rollout_id)[0].request_id in self._ledger.cancelled)
        weights, now = Weights.SAME, self._engine.info
        if state.failure is not None and state.failure.code == ForeignWeightsError.code:
            weights = Weights.UNKNOWN
        elif state.versions:
            version, drew = weights_at(state, state.tokens_count - 1, self._ledger.weights)
            others = Weights.UPDATED if now.policy_version > version else Weights.OTHER
            weights = Weights.SAME if now.weights_digest == drew else others
        is_cancelled = state.opened.request_id in self._ledger.cancelled
        return Found(state.phase, is_cancelled, weights, state.job.policy.on_update, self._kv_files.holds(rollout_id))

    async def _resume(self, state: State, kv: Kv) -> None:
        rollout_id = state.opened.rollout_id
        is_restored = kv is Kv.RESTORE and await self._kv_files.restore(rollout_id)
        self._kv_files.drop(rollout_id)
        await self._sandboxes.wake(rollout_id)
        stood_s = max(0.0, time.time() - state.preempted.at_s) if state.preempted else 0.0
        made_of: Cause = "restored" if is_restored else "rebuilt"
        await self._record(
            RolloutResumed(rollout_id, state.attempt + 1, state.tokens_count, self._engine.info, made_of, stood_s)
        )

    async def _open(self, rollout_id: str) -> None:
        job, group, index = self._ledger.member(rollout_id)
        await self._record(
            RolloutOpened(
                rollout_id,
                job.request_id,
                group.group_id,
                index,
                self._prompt(group.task_digest, job.thinking),
                self._ledger.tokenizer.digest,
                self._engine.info,
                has_environment=group.task_digest in self._ledger.tasks,
            )
        )

    def _encode(self, digest: str, thinking: Thinking) -> tuple[PromptSegment, ...]:
        task = self._ledger.tasks.get(digest)
        if task is not None:
            return context.prompt(task.instruction, self._ledger.tokenizer, thinking)
        return context.conversation_prompt(self._ledger.conversations[digest], self._ledger.tokenizer, thinking)

    async def finish(self, rollout_ids: Sequence[str], reason: FinishReason) -> int:
        """End those that have not ended, none of which runs; returns how many that were.

        One that waited for its turn is opened first: a group is whole in the log, also when cancelled.
        """
        unfinished = [rollout_id for rollout_id in rollout_ids if not self._ledger.is_done(rollout_id)]
        for start in range(0, len(unfinished), _ENDS_IN_FLIGHT_MAX):
            batch = unfinished[start : start + _ENDS_IN_FLIGHT_MAX]
            await asyncio.gather(*(self._finish(rollout_id, reason) for rollout_id in batch))
        return len(unfinished)

    async def _finish(self, rollout_id: str, reason: FinishReason) -> None:
        if rollout_id not in self._ledger.rollouts:
            await self._open(rollout_id)
        await self._sandboxes.drop(rollout_id)
        for ended in (*self._ledger.judges(rollout_id), rollout_id):
            self._kv_files.drop(ended)
            await self._record(RolloutFinished(ended, reason, self._spent.pop(ended, Spent())))
