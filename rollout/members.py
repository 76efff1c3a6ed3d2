"""The members of jobs, from outside: how each is opened or taken up again, and ended when nobody wants it any more."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Awaitable, Callable, Sequence

from rollout import context
from rollout.dispatch import Order
from rollout.engine import Engine
from rollout.errors import JournalError
from rollout.events import Event, FinishReason, RolloutFinished, RolloutOpened, RolloutResumed
from rollout.kv_files import KvFiles
from rollout.ledger import Ledger
from rollout.runner import Rollout
from rollout.sandboxes import Sandboxes

_ENDS_IN_FLIGHT_MAX = 256
"""Rollouts whose last events are written together."""


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

    async def take_up(self, rollout_id: str, order: Order) -> Rollout:
        """Open a rollout, or go on with one that was preempted or left by an earlier process; it can be run then."""
        state = self._ledger.rollouts.get(rollout_id)
        if state is None:
            await self._open(rollout_id)
        elif state.opened.engine.weights_digest != self._engine.info.weights_digest:
            raise JournalError(f"{rollout_id} was begun with other weights; resume it with the same checkpoint")
        else:
            is_restored = await self._kv_files.restore(rollout_id)
            await self._sandboxes.wake(rollout_id)
            stood_s = max(0.0, time.time() - state.preempted.at_s) if state.preempted else 0.0
            await self._record(
                RolloutResumed(
                    rollout_id,
                    state.attempt + 1,
                    state.tokens_count,
                    self._engine.info,
                    "restored" if is_restored else "rebuilt",
                    stood_s,
                )
            )
        job, group, _ = self._ledger.member(rollout_id)
        task = self._ledger.tasks.get(group.task_digest)
        bounds = [job.limits.wall_clock_s, task.agent_timeout_s if task else 0.0]
        return Rollout(rollout_id, task, min((bound for bound in bounds if bound > 0), default=math.inf), order)

    async def _open(self, rollout_id: str) -> None:
        job, group, index = self._ledger.member(rollout_id)
        task, tokenizer = self._ledger.tasks.get(group.task_digest), self._ledger.tokenizer
        if task is not None:
            prompt = context.prompt(task.instruction, tokenizer, job.thinking)
        else:
            conversation = self._ledger.conversations[group.task_digest]
            prompt = context.conversation_prompt(conversation, tokenizer, job.thinking)
        await self._record(
            RolloutOpened(
                rollout_id,
                job.request_id,
                group.group_id,
                index,
                prompt,
                tokenizer.digest,
                self._engine.info,
                has_environment=task is not None,
            )
        )

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
        self._kv_files.drop(rollout_id)
        for ended in (*self._ledger.judges(rollout_id), rollout_id):
            await self._record(RolloutFinished(ended, reason))
