"""The one loop that drives a rollout, and the only place where a rollout does I/O.

Law: append, then act.  Every event is durable in the log before it is folded, and an effect is
performed only when the fold asks for it; so whatever was acted on can be read back.

See: docs/architecture.md, "Runner".
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, aclosing
from dataclasses import dataclass, field

import msgspec

import wal
from dsec.errors import DsecError, OutcomeUnknownError, SandboxLostError
from rollout import machine
from rollout.bench.tasks import Task, setup_commands
from rollout.effects import ApplySolution, Effect, Finish, Force, Judge, Prepare, RunTool, Sample
from rollout.engine import Engine
from rollout.engines.guard import guarded
from rollout.engines.kv_files import KvFiles
from rollout.environment.sandboxes import PhasedSandbox, Sandboxes
from rollout.environment.tools import Place, use_tool
from rollout.errors import MachineError, PreemptedError, RolloutError, TaskError
from rollout.events import (
    AgentStopped,
    FinishReason,
    InfraFailed,
    Judged,
    KvBroke,
    Preempted,
    RolloutEvent,
    RolloutFinished,
    SandboxPrepared,
    SolutionApplied,
    Spent,
    TokensForced,
    ToolFinished,
    TopLogprobsFound,
)
from rollout.journal import Journal
from rollout.ledger import Ledger
from rollout.request import CallableReward, JudgeReward
from rollout.rewards.judging import call_judge, model_judge
from rollout.rewards.tests import RUN, ending, reward_from, solution_commands, verify_commands
from rollout.scheduling.dispatch import Order, Slot
from rollout.state import Phase, State
from wal.tokens import TokensAppended

SANDBOX_LOSSES_MAX = 3
"""How many sandboxes one rollout may lose in one process before that is an infrastructure failure."""

Events = AsyncGenerator[RolloutEvent, None]
SlotOf = Callable[[str, str, int], AbstractAsyncContextManager[Slot]]
"""An engine slot for a turn: of a rollout, in whose name, for how many tokens at most."""


@dataclass(slots=True)
class Rollout:
    """A rollout that runs in this process; everything durable about it is in the ledger."""

    id: str
    task: Task | None
    agent_left_s: float
    """What earlier processes left of the agent's time."""
    order: Order = field(default_factory=Order)
    host: Order | None = None
    """Of the rollout that this one judges, with which it stops."""
    spent: Spent = field(default_factory=Spent)
    tokens_told: asyncio.Future[int] | None = None
    """Done once the newest tokens are durable, folded and told."""

    def spend(self, **amounts: float) -> None:
        """Add to what this process spent; the names are those of `Spent`."""
        more = {name: getattr(self.spent, name) + value for name, value in amounts.items()}
        self.spent = msgspec.structs.replace(self.spent, **more)

    @property
    def cause(self) -> str:
        """Why it is to stop; empty: it goes on."""
        return (self.host or self.order).cause

    @property
    def environment(self) -> Task:
        """The task whose environment the rollout works in.  MachineError if it has none."""
        if self.task is None:
            raise MachineError(f"{self.id} has no environment")
        return self.task

    @property
    def is_out_of_time(self) -> bool:
        """True once the agent used up its time; what it waits for does not count."""
        return self.spent.agent_s > self.agent_left_s


class Runner:
    """Performs what rollouts want, one effect at a time for each rollout."""

    def __init__(
        self,
        journal: Journal,
        ledger: Ledger,
        engine: Engine,
        sandboxes: Sandboxes,
        kv_files: KvFiles,
        slot: SlotOf,
        engine_silence_s: float,
        take_up_judge: Callable[[State], Awaitable[bool]],
    ) -> None:
        """Everything is open already and closed by the owner."""
        self.journal = journal
        self.ledger = ledger
        self.engine = engine
        self.sandboxes = sandboxes
        self.kv_files = kv_files
        self.slot = slot
        self.engine_silence_s = engine_silence_s
        self.take_up_judge = take_up_judge

    async def run(self, rollout: Rollout) -> None:
        """Drive a rollout to its end, to an InfraFailed event, or (as ordered) to a Preempted one.

        wal.WalError if the log fails.
        """
        try:
            try:
                rollout.order.is_under_way = True
                await self.go_on(rollout)
            except asyncio.CancelledError:
                if not rollout.cause:
                    raise
                if (task := asyncio.current_task()) is not None:
                    task.uncancel()
            finally:
                rollout.order.is_under_way = False
            state = self.state(rollout)
            if rollout.cause and state.phase is not Phase.DONE and state.failure is None:
                await self.set_down(rollout)
        finally:
            if not rollout.order.has_stopped:
                await self.sandboxes.drop(rollout.id)
                await self.engine.release(rollout.id)

    async def go_on(self, rollout: Rollout) -> None:
        """Do what the rollout wants, one thing after the other, until it wants nothing more, or is told to stop."""
        losses = 0
        while (effect := machine.effect(self.state(rollout), self.ledger.tokenizer)) and not rollout.cause:
            try:
                await self.carry_out(effect, rollout)
            except PreemptedError:
                continue  # a turn was cut at a token boundary; the rest of it is what the rollout wants next
            except (RolloutError, DsecError, wal.RecordInvalidError, wal.RecordTooLargeError) as error:
                await self.sandboxes.drop(rollout.id)
                losses += 1
                if not isinstance(error, SandboxLostError | OutcomeUnknownError) or losses > SANDBOX_LOSSES_MAX:
                    failed = InfraFailed(rollout.id, error.code, error.fault, str(error), rollout.spent)
                    await self.record(rollout, failed)
                    return

    async def carry_out(self, effect: Effect, rollout: Rollout) -> None:
        """Perform an effect; what it led to is durable and folded when this returns or raises.

        While tokens become durable the next ones are awaited: nothing acts on them before the turn ends.
        """
        try:
            async with aclosing(self.perform(effect, rollout)) as events:
                async for event in events:
                    if isinstance(event, TokensAppended):
                        await self.gather(rollout, event)
                    else:
                        await self.record(rollout, event)
        finally:
            await self.gathered(rollout)

    async def gather(self, rollout: Rollout, event: TokensAppended) -> None:
        """Have tokens become durable, folded and told; those before them are when this returns."""
        await self.gathered(rollout)
        rollout.tokens_told = await self.journal.gather(event, self.ledger.lsns[rollout.id][0])

    async def gathered(self, rollout: Rollout) -> None:
        """Wait until the tokens that were gathered are durable, folded and told, also if cancelled.  wal.WalError."""
        told, rollout.tokens_told = rollout.tokens_told, None
        if told is None:
            return
        if told.done():
            told.result()
            return
        began = time.monotonic()
        await wal.settled(told)
        rollout.spend(log_s=time.monotonic() - began)

    async def set_down(self, rollout: Rollout) -> None:
        """Leave a rollout so that it can be taken up again here, and (with its log) anywhere."""
        await self.kv_files.save(rollout.id)
        await self.sandboxes.pause(rollout.id)
        await self.record(rollout, Preempted(rollout.id, rollout.cause, time.time(), rollout.spent))
        rollout.order.has_stopped = True

    def instruction(self, rollout: Rollout) -> str:
        """What the rollout was asked, for those who judge it."""
        if rollout.task is not None:
            return rollout.task.instruction
        prompt = self.state(rollout).opened.prompt
        return self.ledger.tokenizer.decode([token for segment in prompt for token in segment.token_ids])

    def state(self, rollout: Rollout) -> State:
        """The rollout as the ledger has it."""
        return self.ledger.rollouts[rollout.id]

    async def record(self, rollout: Rollout, event: RolloutEvent) -> None:
        """Append, then fold, then tell; a cancel waits until all three are done."""
        began = time.monotonic()
        await self.journal.append(event)
        rollout.spend(log_s=time.monotonic() - began)

    async def log(self, event: RolloutEvent) -> None:
        """The same for an event of another rollout: a judge's."""
        await self.journal.append(event)

    async def drive(self, rollout_id: str, host: Order) -> None:
        """Run a judge that is open; it stops with the rollout that it judges."""
        await self.run(Rollout(rollout_id, None, math.inf, host=host))

    def perform(self, effect: Effect, rollout: Rollout) -> Events:
        """The events that answer an effect."""
        if self.ledger.is_stale(self.state(rollout)):  # what drew its first token, the log heard after newer weights
            return self.finish(rollout, Finish(FinishReason.STALE))
        if isinstance(effect, Sample | RunTool) and rollout.is_out_of_time:
            return self.stop_agent(rollout)
        match effect:
            case Prepare():
                return self.prepare(rollout)
            case Sample():
                return self.sample(rollout, effect)
            case Force():
                return self.force(rollout, effect)
            case RunTool():
                return self.run_tool(rollout, effect)
            case ApplySolution():
                return self.apply_solution(rollout)
            case Judge():
                match self.state(rollout).job.reward:
                    case CallableReward() as reward:
                        return call_judge(self, self.state(rollout), reward)
                    case JudgeReward() as reward:
                        return model_judge(self, self.state(rollout), reward, self.instruction(rollout), rollout.order)
                return self.judge(rollout, effect)
            case Finish():
                return self.finish(rollout, effect)

    async def hold(self, rollout: Rollout) -> PhasedSandbox:
        """The rollout's sandbox, made or rebuilt if it has none."""
        return await self.sandboxes.hold(
            rollout.id,
            rollout.environment,
            lambda key: machine.is_current(self.state(rollout), key),
            lambda event: self.record(rollout, event),
        )

    async def get_back(self, rollout: Rollout) -> PhasedSandbox:
        """`hold`, of a sandbox that may have to be rebuilt first: that is a wait, and no work of the rollout's."""
        began = time.monotonic()
        sandbox = await self.hold(rollout)
        rollout.spend(queue_s=time.monotonic() - began)
        return sandbox

    async def stop_agent(self, rollout: Rollout) -> Events:
        """The agent's wall clock ran out."""
        yield AgentStopped(rollout.id, FinishReason.WALL_CLOCK)

    async def prepare(self, rollout: Rollout) -> Events:
        """Lay out the task's environment, and leave it with the agent's network."""
        began = time.monotonic()
        sandbox = await self.hold(rollout)
        for number, command in enumerate(setup_commands(rollout.environment)):
            result = await sandbox.exec(f"setup/{self.state(rollout).setup_try}/{number}", command)
            if result.exit_code != 0 or result.timed_out:
                said = (result.stderr.data or result.stdout.data)[-300:].decode(errors="replace").strip() or "no output"
                line = " ".join(command.argv)[:200]
                raise TaskError(
                    f"{rollout.environment.name}: environment step {line!r} exited {result.exit_code}: {said}"
                )
        await sandbox.enter("agent")
        yield SandboxPrepared(rollout.id, time.monotonic() - began)

    async def sample(self, rollout: Rollout, effect: Sample) -> Events:
        """Tokens until the turn ends; the engine runs ahead while a chunk becomes durable."""
        start = len(effect.request.token_ids)
        host = self.state(rollout).opened.judged_rollout_id or rollout.id
        async with self.slot(rollout.id, host, effect.request.tokens_count_max) as slot:
            rollout.spend(queue_s=slot.waited_s)
            began, is_first = time.monotonic(), True
            async with aclosing(guarded(self.engine, effect.request, self.engine_silence_s)) as chunks:
                async for chunk in chunks:
                    waited = time.monotonic() - began
                    rollout.spend(**{"prefill_s" if is_first else "decode_s": waited})
                    if chunk.cached_tokens_count:
                        rollout.spend(cached_tokens_count=chunk.cached_tokens_count)
                    is_first = False
                    slot.tokens_count += len(chunk.token_ids)
                    if chunk.kv and chunk.kv != "restored":  # that, the resume has said
                        yield KvBroke(rollout.id, start, chunk.kv)
                    if chunk.top_logprobs:
                        yield TopLogprobsFound(rollout.id, start, chunk.top_logprobs)
                    if chunk.masks or chunk.routes or chunk.hidden:
                        await self.gathered(rollout)  # what is told depends on what is logged
                        yield machine.side_channels(self.state(rollout), chunk)
                    yield TokensAppended(rollout.id, start, chunk.token_ids, chunk.logprobs, chunk.policy_version)
                    if rollout.is_out_of_time:
                        return
                    start += len(chunk.token_ids)
                    began = time.monotonic()

    async def force(self, rollout: Rollout, effect: Force) -> Events:
        """Tokens of the service's own, at a budget."""
        yield TokensForced(rollout.id, effect.start, effect.token_ids)

    async def run_tool(self, rollout: Rollout, effect: RunTool) -> Events:
        """One tool call, through durable commands keyed `call/<index>/<step>`."""
        sandbox = await self.get_back(rollout)
        place = Place(
            rollout.environment.workdir, rollout.environment.env, self.state(rollout).job.limits.tool_timeout_s
        )
        began = time.monotonic()
        try:
            seen = await use_tool(
                effect.call, place, lambda step, command: sandbox.exec(f"call/{effect.call_index}/{step}", command)
            )
        finally:
            spent = time.monotonic() - began
            rollout.spend(environment_s=spent)
        yield ToolFinished(
            rollout.id, effect.call_index, seen.text, seen.exit_code, seen.timed_out, seen.truncated_bytes, spent
        )

    async def apply_solution(self, rollout: Rollout) -> Events:
        """The oracle: the task's own solution."""
        sandbox = await self.get_back(rollout)
        began = time.monotonic()
        results = [
            await sandbox.exec(f"solution/{number}", command)
            for number, (_, command) in enumerate(solution_commands(rollout.environment))
        ]
        yield SolutionApplied(rollout.id, results[-1].exit_code, time.monotonic() - began, ending(results[-1]))

    async def judge(self, rollout: Rollout, effect: Judge) -> Events:
        """Upload the tests now that the agent has finished, run them, read the reward."""
        sandbox = await self.get_back(rollout)
        began = time.monotonic()
        commands = verify_commands(rollout.environment, effect.answer)
        prefix = f"judge/{self.state(rollout).judge_try}"
        results = [(name, await sandbox.exec(f"{prefix}/{n}", command)) for n, (name, command) in enumerate(commands)]
        reward = reward_from(rollout.environment, results)
        spent = time.monotonic() - began
        rollout.spend(judge_s=spent)
        output = ending(next(result for name, result in results if name == RUN))
        yield Judged(rollout.id, reward.value, reward.components, reward.verifier_digest, spent, output)

    async def finish(self, rollout: Rollout, effect: Finish) -> Events:
        """The last event, of a rollout that has left nothing behind."""
        await self.sandboxes.drop(rollout.id)
        yield RolloutFinished(rollout.id, effect.reason, rollout.spent)
