"""The asyncio face of the scheduler: what it decides becomes tasks, granted slots and stops.

Only what was started has a task; what is queued is a row of the scheduler's table.

Invariants:
1. Whoever samples has a slot, and nobody keeps one after the end of a turn.
2. A rollout that is to stop is interrupted at a token boundary if it samples, else where it waits; an engine that
   reaches no boundary within `GRACE_S` is not waited for any longer (what it drew was not logged, so nobody saw it).
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Collection, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial

from rollout.errors import EngineError, PreemptedError
from rollout.scheduling.claims import Claim, Grant, Preempt, Start, Yield
from rollout.scheduling.scheduler import Scheduler

GRACE_S = 10.0
_log = logging.getLogger(__name__)


@dataclass(slots=True)
class Order:
    """What a rollout that runs is told: to stop, and why (empty: to go on)."""

    cause: str = ""
    waited_s: float = 0.0
    """How long it waited for its turn."""
    is_aside: bool = False
    """It shall not go on before somebody says so."""
    is_under_way: bool = False
    """Set by who runs it: it may be cancelled where it waits.  Else it looks at the cause before it goes on."""
    has_stopped: bool = False
    """Set by who runs it: it was preempted, and did not end."""


@dataclass(slots=True)
class Slot:
    """An engine slot; who has it counts what was sampled."""

    tokens_count: int = 0
    waited_s: float = 0.0


@dataclass(slots=True)
class _Running:
    task: asyncio.Task[None]
    order: Order
    timer: asyncio.TimerHandle | None = None


@dataclass(kw_only=True)
class Callbacks:
    """How rollouts are run, and what is told about them."""

    run: Callable[[str, Order], Awaitable[None]]
    """Until the rollout has ended or stopped as ordered."""
    interrupt: Callable[[str], Awaitable[None]]
    """Have the engine end what it samples for it at the next token boundary."""
    rests: Callable[[str], None]
    """It neither runs nor waits to run any more."""
    failed: Callable[[BaseException], None]
    """Running one raised what ends the service."""


class Dispatcher:
    """Rollouts that wait to run, and that run."""

    def __init__(self, scheduler: Scheduler, callbacks: Callbacks) -> None:
        """Nothing starts before `open`."""
        self.scheduler = scheduler
        self._callbacks = callbacks
        self._running: dict[str, _Running] = {}
        self._waiting: dict[str, asyncio.Future[None]] = {}
        self._hosts: dict[str, str] = {}
        """Of who waits for a slot or samples: in whose name."""
        self._sampling: set[str] = set()
        self._interrupts: set[asyncio.Task[None]] = set()
        self._ending: set[str] = set()
        self._queued_at: dict[str, float] = {}
        self._is_open = False

    def open(self) -> None:
        """Start what waits."""
        self._is_open = True
        self.decide()

    async def close(self) -> None:
        """Start nothing more, and stop what runs where it is."""
        self._is_open = False
        await self.stop(list(self._running))
        await asyncio.gather(*self._interrupts, return_exceptions=True)

    @property
    def count(self) -> int:
        """Rollouts that run or wait to, those set aside included."""
        return self.scheduler.queued_count + len(self._running)

    def knows(self, rollout_id: str) -> bool:
        """Whether it runs, waits to run, is set aside, or is being ended."""
        return rollout_id in self._running or self.scheduler.is_queued(rollout_id) or self.is_ending(rollout_id)

    def is_ending(self, rollout_id: str) -> bool:
        """Whether it is being ended: it does not begin again."""
        return rollout_id in self._ending

    def enqueue(self, claims: Iterable[Claim], *, is_aside: bool = False) -> None:
        """Have rollouts run as soon as it is their turn; if they are set aside, not before `resume`."""
        now = time.monotonic()
        for claim in claims:
            self.scheduler.enqueue(claim, now)
            self._queued_at |= dict.fromkeys(claim.members, now)
            if is_aside:
                self.scheduler.set_aside(claim.members[0])
        self.decide()

    def decide(self) -> None:
        """Do what the scheduler says."""
        if not self._is_open:
            return
        for decision in self.scheduler.decide(time.monotonic()):
            match decision:
                case Start(members):
                    for member in members:
                        self._begin(member)
                case Grant(rollout_id):
                    if not (granted := self._waiting[rollout_id]).done():
                        granted.set_result(None)
                case Yield(rollout_id):
                    self._interrupt(rollout_id)
                case Preempt(rollout_id):
                    self._order(rollout_id, "priority", is_aside=False)

    @asynccontextmanager
    async def slot(self, rollout_id: str, host_id: str, tokens_count_max: int) -> AsyncGenerator[Slot, None]:
        """An engine slot for one turn of a rollout; a judge takes it in the name of the rollout that it judges.

        PreemptedError: that is to stop.
        """
        if host_id != rollout_id:
            self.scheduler.join(rollout_id, host_id)
        slot, began = Slot(), time.monotonic()
        self._hosts[rollout_id] = host_id
        granted = self._waiting[rollout_id] = asyncio.get_running_loop().create_future()
        self.scheduler.want_slot(rollout_id, tokens_count_max, began)
        try:
            self.decide()
            await granted
            if host_id in self._running and self._running[host_id].order.cause:
                raise PreemptedError(f"{host_id} is to stop")
            slot.waited_s = time.monotonic() - began
            self._sampling.add(rollout_id)
            yield slot
        finally:
            del self._waiting[rollout_id], self._hosts[rollout_id]
            self._sampling.discard(rollout_id)
            self.scheduler.leave_slot(rollout_id, slot.tokens_count)
            if host_id != rollout_id:
                self.scheduler.end(rollout_id)
            self.decide()

    async def preempt(self, rollout_ids: Collection[str], cause: str) -> list[str]:
        """Stop those that run, start none of those that wait, until `resume`; returns once they stand, and whom."""
        stopped: dict[str, None] = {}
        tasks = []
        for rollout_id in rollout_ids:
            stopped |= dict.fromkeys(self.scheduler.set_aside(rollout_id))
            if (running := self._running.get(rollout_id)) is not None:
                self._order(rollout_id, cause, is_aside=True)
                tasks.append(running.task)
                stopped[rollout_id] = None
        for rollout_id in stopped.keys() - self._running.keys():
            self._callbacks.rests(rollout_id)
        await _settle(tasks)
        return list(stopped)

    def resume(self, rollout_ids: Collection[str]) -> list[str]:
        """Let what was set aside, and is not being ended, wait for its turn again; whom that concerns."""
        resumed: dict[str, None] = {}
        for rollout_id in rollout_ids:
            resumed |= dict.fromkeys(self.scheduler.bring_back(rollout_id, time.monotonic()))
            if (running := self._running.get(rollout_id)) is not None and running.order.is_aside:
                running.order.is_aside = False  # it is on its way to a stop, and goes on after that
                resumed[rollout_id] = None
        self.decide()
        return list(resumed)

    @asynccontextmanager
    async def ending(self, rollout_ids: Collection[str]) -> AsyncGenerator[None, None]:
        """`stop`, and nothing of them begins again while their ends are logged."""
        self._ending.update(rollout_ids)
        try:
            await self.stop(rollout_ids)
            yield
        finally:
            self._ending.difference_update(rollout_ids)

    async def stop(self, rollout_ids: Collection[str]) -> None:
        """Forget rollouts, and return once none of them runs any more; they stand in the log as they are."""
        tasks = []
        for rollout_id in rollout_ids:
            for withdrawn in self.scheduler.withdraw(rollout_id):
                del self._queued_at[withdrawn]
                self._callbacks.rests(withdrawn)
            self.scheduler.set_aside(rollout_id)  # it must not start in the room that the others leave
            if (running := self._running.get(rollout_id)) is not None:
                running.order.is_aside = True  # if it is just being preempted, it must not start again
                running.task.cancel()
                tasks.append(running.task)
        await _settle(tasks)
        for rollout_id in rollout_ids:  # those that were preempted hold a sandbox
            if self.scheduler.is_queued(rollout_id):
                self.scheduler.end(rollout_id)
                self._callbacks.rests(rollout_id)
        self.decide()

    def _begin(self, rollout_id: str) -> None:
        now = time.monotonic()
        order = Order(waited_s=now - self._queued_at.pop(rollout_id, now))
        task = asyncio.ensure_future(self._callbacks.run(rollout_id, order))
        self._running[rollout_id] = _Running(task, order)
        task.add_done_callback(partial(self._ended, rollout_id))

    def _ended(self, rollout_id: str, task: asyncio.Task[None]) -> None:
        running = self._running.pop(rollout_id)
        if running.timer is not None:
            running.timer.cancel()
        if not task.cancelled() and (error := task.exception()) is not None:
            self._is_open = False
            self._callbacks.failed(error)
        order = running.order
        if order.has_stopped:
            self.scheduler.preempted(rollout_id, time.monotonic(), is_aside=order.is_aside)
        else:
            self.scheduler.end(rollout_id)
        if not order.has_stopped or order.is_aside:
            self._callbacks.rests(rollout_id)
        self.decide()

    def _order(self, rollout_id: str, cause: str, *, is_aside: bool) -> None:
        running = self._running[rollout_id]
        running.order.is_aside |= is_aside
        if running.order.cause:
            return
        running.order.cause = cause
        self.scheduler.stopping(rollout_id)
        hosted = [each for each, host_id in self._hosts.items() if host_id == rollout_id]
        if self._sampling.isdisjoint(hosted):
            if running.order.is_under_way:
                running.task.cancel()
            return
        running.timer = asyncio.get_running_loop().call_later(GRACE_S, _cut, running)
        for each in hosted:  # itself, or its judges
            if each in self._sampling:
                self._interrupt(each)
            elif not (granted := self._waiting[each]).done():
                granted.set_result(None)  # it looks at its host's order, and goes

    def _interrupt(self, rollout_id: str) -> None:
        task = asyncio.ensure_future(self._callbacks.interrupt(rollout_id))
        self._interrupts.add(task)
        task.add_done_callback(self._interrupted)

    def _interrupted(self, task: asyncio.Task[None]) -> None:
        self._interrupts.discard(task)
        if not task.cancelled() and isinstance(error := task.exception(), EngineError):
            _log.warning("a turn could not be interrupted: %s", error)  # it ends, or its rollout is cancelled


def _cut(running: _Running) -> None:
    if running.order.is_under_way:  # else it has reached a boundary, and is being set down
        running.task.cancel()


async def _settle(tasks: list[asyncio.Task[None]]) -> None:
    """Until all are done and their ends are told; what they raised, `failed` heard.  Who waits may go away."""
    if tasks:
        await asyncio.wait(tasks)
