"""The living sandboxes of a host, and the one way in which each of them ends.

An end has three parts that all happen, whatever became of the others: the journal says it, the
sandbox is destroyed, the promise made for it is taken back.  A new Edge compares journal and
substrate, so that a crash between them leaves nothing.

Invariants:
1. A sandbox ends once; everybody who wants it ended waits for the same end.
2. What is promised is what lives: `admission.used` is the sum over `live`.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import msgspec

import wal
from dsec.edge.admission import Admission, Amounts
from dsec.edge.clock import Clock
from dsec.edge.deadlines import Deadlines
from dsec.edge.edge_config import EdgeConfig
from dsec.edge.edge_log import EdgeLog
from dsec.edge.exec_log import DurableSandbox
from dsec.edge.history import History
from dsec.edge.journal import JournalRecord, Known, Ledger, NetworkDecided, SandboxEnded
from dsec.edge.live import LiveSandbox, Processes
from dsec.edge.retention import LOOK_S, JournalRetention
from dsec.errors import DsecError, NotFoundError, SandboxLostError
from dsec.lifecycle import EndReason, State
from dsec.sandbox import Process, Sandbox, Substrate, Watched
from dsec.trajectory import CommandFinished, CommandStarted, TrajectoryRecord
from dsec.types import Command, SandboxId
from dsec.views import SandboxView

JOURNAL = "the journal"
"""A name among the deadlines that no sandbox has."""
NOTES_WAITING_COUNT_MAX = 1000
_log = logging.getLogger(__name__)


class Registry:
    """What the parts of an Edge share."""

    def __init__(
        self, directory: Path, substrate: Substrate, config: EdgeConfig, clock: Clock, storage: wal.Storage | None
    ) -> None:
        self.config = config
        self.clock = clock
        self.substrate = substrate
        self.ledger = Ledger(config.ended_count_max)
        self.history = History(directory, config.results_bytes_max, config.scans_count_max, storage)
        self.log = EdgeLog(directory, config, clock, self._apply, storage)
        self.retention = JournalRetention(directory, self.ledger, self.log, config.log_bytes_max)
        self.admission = Admission(directory, config, clock)
        self.deadlines = Deadlines(clock, self.now, self._on_due)
        self.live: dict[SandboxId, LiveSandbox] = {}
        self.ended_processes: Processes = Processes()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._notes_waiting_count = 0
        self._untold_count = 0

    def now(self) -> float:
        """This moment, on the journal's axis."""
        opened = self.ledger.opened
        return self.clock.boot_s() + (opened.anchor_s if opened else 0.0)

    def _apply(self, record: JournalRecord, lsn: int) -> None:
        self.ledger.apply(record, lsn)
        if isinstance(record, CommandFinished):
            self.history.remember(lsn, record)

    def known(self, sandbox_id: str) -> Known:
        """What the journal says of a sandbox.  NotFoundError."""
        known = self.ledger.sandboxes.get(SandboxId(sandbox_id))
        if known is None or known.reason is EndReason.FAILED:
            raise NotFoundError(f"no sandbox {sandbox_id[:80]!r}")
        return known

    def find(self, sandbox_id: str) -> LiveSandbox:
        """A living sandbox.  NotFoundError, SandboxLostError (it has ended, or is ending)."""
        known = self.known(sandbox_id)
        live = self.live.get(known.id)
        if live is None or known.ready_at_s is None:
            why = f" ({known.reason}: {known.message})" if known.message else f" ({known.reason or 'not ready'})"
            raise SandboxLostError(f"sandbox {sandbox_id} has ended{why}")
        return live

    def view(self, known: Known) -> SandboxView:
        """A sandbox as people see it; one that is being freed is still stopping."""
        live = self.live.get(known.id)
        if live is None:
            return known.view(known.trajectory.last_number, None)
        view = known.view(live.commands_count, self.expiry_of(live))
        return msgspec.structs.replace(view, state=live.state) if view.state != live.state else view

    def living(self) -> Iterator[LiveSandbox]:
        """Those that somebody may use, in the order of their creation."""
        return (live for live in list(self.live.values()) if live.end is None and live.known.ready_at_s is not None)

    def adopt(self, known: Known, sandbox: Sandbox, asked: Amounts) -> LiveSandbox:
        """Take charge of a sandbox that is there, and whose promise was made."""

        async def wake() -> None:
            if live.state is State.PAUSED:  # goes on if who asked is killed meanwhile
                await asyncio.shield(self.spawn(live.wake(), f"wake {known.id}"))
            else:
                await live.wake()

        durable = DurableSandbox(
            sandbox,
            known.trajectory,
            self._record,
            recall=self.history.record,
            wake=wake,
            on_lost=lambda: self.lose(known.id),
            now=self.now,
            shape=self._shape,
            keep=partial(self._keep, known.id),
        )
        live = LiveSandbox(known, sandbox, durable, asked, self.log, self.config)
        self.live[known.id] = live
        if isinstance(sandbox, Watched):
            sandbox.watch(partial(self.lose, known.id))
        return live

    def watch(self, live: LiveSandbox) -> None:
        """Begin to count the time of a sandbox that is ready."""
        if (due_s := self._next_look(live)) is not None:
            self.deadlines.put(live.known.id, due_s)

    def start(self) -> None:
        """Begin to look at the clock."""
        self.deadlines.put(JOURNAL, self.now() + LOOK_S)
        self.deadlines.start()

    async def _record(self, record: TrajectoryRecord) -> None:
        await self.log.append(record, is_refusable=isinstance(record, CommandStarted))

    def _shape(self, command: Command) -> Command:
        limit = self.config.inline_bytes_max
        return (
            command if command.output_bytes_max <= limit else msgspec.structs.replace(command, output_bytes_max=limit)
        )

    def _keep(self, sandbox_id: SandboxId, process: Process) -> None:
        self.ended_processes[sandbox_id, process.number] = process
        while len(self.ended_processes) > self.config.processes_kept_count_max:
            self.ended_processes.popitem(last=False)

    def lose(self, sandbox_id: SandboxId) -> None:
        """It died by itself."""
        if (live := self.live.get(sandbox_id)) is not None:
            self.end(live, EndReason.LOST, "it died")

    def end(self, live: LiveSandbox, reason: EndReason, message: str = "") -> asyncio.Task[None]:
        """End a sandbox; the task is done when nothing of it is left."""
        if live.end is None:
            live.end = self.spawn(self._end(live, reason, message), f"end {live.known.id}")
        return live.end

    async def _end(self, live: LiveSandbox, reason: EndReason, message: str) -> None:
        sandbox_id = live.known.id
        self.deadlines.drop(sandbox_id)

        async def destroy() -> None:
            try:
                await live.sandbox.destroy()
            except DsecError as error:
                _log.error("sandbox %s could not be destroyed: %s", sandbox_id, error)
            self.admission.leave(live.asked)

        # Together: a journal on a full disk must not keep alive what would free that disk.
        written = self.log.append(SandboxEnded(sandbox_id, reason, self.now(), message[:1000]))
        await asyncio.gather(destroy(), written)
        del self.live[sandbox_id]
        for key in [key for key in self.ended_processes if key[0] == sandbox_id]:
            del self.ended_processes[key]

    def expiry_of(self, live: LiveSandbox) -> float | None:
        """When it will end by itself, as things stand; None if it will not."""
        return min((at_s for at_s, _ in self._ends(live)), default=None)

    def _ends(self, live: LiveSandbox) -> Iterator[tuple[float, EndReason]]:
        request = live.known.requested.request
        if request.lifetime_s is not None:
            yield live.known.requested.at_s + request.lifetime_s, EndReason.EXPIRED_LIFETIME
        if request.idle_timeout_s is not None and not live.is_busy and live.state is State.RUNNING:
            yield live.known.used_at_s + request.idle_timeout_s, EndReason.EXPIRED_IDLE

    def _next_look(self, live: LiveSandbox) -> float | None:
        """When to look again: at its end, or, of one that is in use now, no later than it may be idle for too long."""
        request = live.known.requested.request
        looks = [at_s for at_s, _ in self._ends(live)]
        if request.idle_timeout_s is not None and (live.is_busy or live.state is not State.RUNNING):
            looks.append(self.now() + request.idle_timeout_s)
        return min(looks, default=None)

    def _on_due(self, name: str) -> float | None:
        if name == JOURNAL:
            if self.retention.is_due:
                self.spawn(self.retention.run_pass(), "retention of the journal")
            return self.now() + LOOK_S
        live = self.live.get(SandboxId(name))
        if live is None or live.end is not None:
            return None
        at_s, reason = min(self._ends(live), default=(float("inf"), EndReason.EXPIRED_IDLE))
        if at_s <= self.now():
            self.end(live, reason)
            return None
        return self._next_look(live)

    def note(self, record: NetworkDecided) -> None:
        """Write down what nobody waits for, as long as the journal keeps up; what was left out is counted."""
        if self._notes_waiting_count >= NOTES_WAITING_COUNT_MAX:
            self._untold_count += 1 + record.untold_count
            return
        self._notes_waiting_count += 1
        told, self._untold_count = self._untold_count, 0
        self.spawn(self._write_note(msgspec.structs.replace(record, untold_count=record.untold_count + told)), "note")

    async def _write_note(self, record: NetworkDecided) -> None:
        try:
            await self.log.append(record, is_refusable=True)
        except DsecError:
            self._untold_count += 1 + record.untold_count
        finally:
            self._notes_waiting_count -= 1

    def spawn(self, work: Coroutine[Any, Any, Any], name: str) -> asyncio.Task[Any]:
        """Work that belongs to the Edge, not to a caller."""
        task = asyncio.create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._on_done)
        return task

    def _on_done(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None and not isinstance(error, DsecError):
            _log.error("%s failed", task.get_name(), exc_info=error)

    async def settle(self) -> None:
        """Wait for what was begun; a journal that cannot be written does not hold this up for ever."""
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=self.config.close_wait_s)

    async def abandon(self) -> None:
        """Stop everything where it is, and touch no sandbox."""
        await self.deadlines.stop()
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.gather(*(live.durable.stop() for live in self.live.values()))
