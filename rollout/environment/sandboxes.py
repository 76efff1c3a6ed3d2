"""The sandbox of each running rollout: made when first needed, rebuilt when lost, freed at the end.

A rollout that only samples holds none: after a resume its sandbox is taken up, or rebuilt, when a tool call
or the verifier asks for it, not before.  Where a task asks for a network, each command runs under that of its phase.

Invariants:
1. No command starts before its sandbox has the network of the command's phase.
2. A switch that failed is an error of the rollout, whose sandbox goes: a network is never left as it was.
3. What could reach the outside is not run again on another sandbox, but for the task's set-up.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Iterable

from dsec.edge.exec_log import DurableSandbox
from dsec.errors import DsecError, StateError
from dsec.replay import incarnate
from dsec.sandbox import Sandbox, Substrate
from dsec.trajectory import Append
from dsec.types import Command, ExecResult, NetworkPolicy
from rollout.bench.tasks import Task, check_networks
from rollout.environment.network import Networks, TaskPhase, phase_of
from rollout.events import NetworkSwitched
from rollout.ledger import Ledger
from rollout.recovery import Pending, Run, decide_run

_log = logging.getLogger(__name__)
Tell = Callable[[NetworkSwitched], Awaitable[None]]
"""Makes the event durable."""


class PhasedSandbox:
    """A rollout's sandbox, whose network follows the phases of the task."""

    def __init__(self, rollout_id: str, networks: Networks, tell: Tell) -> None:
        """Without a sandbox yet: `durable` is set as soon as there is one."""
        self.durable: DurableSandbox
        self._rollout_id = rollout_id
        self._networks = networks
        self._tell = tell
        self._has: NetworkPolicy | None = None  # unknown: an earlier process may have died between word and deed

    async def exec(self, key: str, command: Command) -> ExecResult:
        """As `DurableSandbox.exec`, under the network of the key's phase.

        StateError if it had begun on a sandbox that was lost, and could reach the outside.
        """
        run = decide_run(self._pending(key))
        if run is Run.REFUSE:
            self._require_repeatable(key)
        if run is not Run.ANSWER:
            await self.enter(phase_of(key))
        return await self.durable.exec(key, command)

    def _pending(self, key: str) -> Pending:
        trajectory = self.durable.trajectory
        entry = trajectory.entries.get(key)
        if entry is None or entry.state == "refused":
            return Pending.NEW
        if entry.state == "finished":
            return Pending.FINISHED
        if entry.incarnation != trajectory.incarnation:
            return Pending.LOST if self._networks.may_repeat(key) else Pending.LOST_OUTSIDE
        return Pending.UNKNOWN if entry.state == "unknown" else Pending.RUNNING

    async def enter(self, phase: TaskPhase) -> None:
        """Give the sandbox the network of a phase: said in the log first, then done."""
        policy = self._networks.of(phase)
        if self._networks.are_off or policy == self._has:
            return
        self._has = None
        await self._tell(NetworkSwitched(self._rollout_id, phase, policy))
        await self.durable.sandbox.update_network(policy)
        self._has = policy

    async def enter_again(self, durable: DurableSandbox, key: str) -> None:
        """Before a replay of the command.  StateError if it could reach the outside."""
        self.durable = durable
        self._require_repeatable(key)
        await self.enter(phase_of(key))

    def _require_repeatable(self, key: str) -> None:
        if not self._networks.may_repeat(key):
            raise StateError(
                f"{self._rollout_id}: its sandbox is lost, and {key!r}, which had a network, is not run again: what it "
                "did outside would be done twice; cancel the rollout and submit it anew"
            )


class Sandboxes:
    """Rollout id -> its sandbox."""

    def __init__(self, substrate: Substrate, ledger: Ledger, append: Append, allowed: Networks) -> None:
        """The substrate is open; `append` makes trajectory records durable; more than `allowed` no task gets."""
        self._substrate = substrate
        self._ledger = ledger
        self._append = append
        self._allowed = allowed
        self._held: dict[str, PhasedSandbox] = {}
        self._survivors: dict[str, Sandbox] = {}
        self._are_left = False

    @property
    def count(self) -> int:
        """Sandboxes alive now."""
        return len(self._held)

    async def adopt(self, rollout_ids: Iterable[str]) -> None:
        """Keep for each of these rollouts what it left alive in an earlier process; destroy all else that lives on."""
        living = dict(self._substrate.adopted())
        for rollout_id in rollout_ids:
            known = self._ledger.trajectories.get(rollout_id)
            if known is not None and (survivor := living.pop(known.sandbox_id, None)) is not None:
                self._survivors[rollout_id] = survivor
        await asyncio.gather(*map(_destroy, living.values()))

    async def hold(self, rollout_id: str, task: Task, is_wanted: Callable[[str], bool], tell: Tell) -> PhasedSandbox:
        """The rollout's sandbox, in the state that its trajectory describes.

        A rebuild replays the keys that are wanted: what an attempt at the set-up or at the verdict did
        that failed is left out.  Raises DivergedError (a replay did not give the logged results), StateError (it may
        not be replayed), SpawnError, ResourceExhaustedError and TaskError (a network that is not allowed any more).
        """

        async def append(kind: int, payload: bytes) -> int:
            lsn = await self._append(kind, payload)
            self._ledger.extend(rollout_id, lsn)
            return lsn

        if rollout_id not in self._held:
            check_networks([task], self._allowed)
            trajectory = self._ledger.trajectory(rollout_id)
            survivor = self._survivors.pop(rollout_id, None)
            held = PhasedSandbox(rollout_id, task.network, tell)
            held.durable = await incarnate(
                self._substrate, task.sandbox, trajectory, append, is_wanted, survivor, held.enter_again
            )
            self._held[rollout_id] = held
        return self._held[rollout_id]

    async def pause(self, rollout_id: str) -> None:
        """Put the rollout's sandbox to sleep, with what runs in it; one that cannot is given up, and built anew."""
        if (held := self._held.get(rollout_id)) is not None:
            try:
                await held.durable.sandbox.pause()
            except DsecError as error:
                _log.warning("%s: its sandbox cannot sleep, and goes: %s", rollout_id, error)
                await self.drop(rollout_id)

    async def wake(self, rollout_id: str) -> None:
        """Let the rollout's sandbox, and what runs in it, go on; one that cannot is given up, and built anew."""
        held, survivor = self._held.get(rollout_id), self._survivors.get(rollout_id)
        if (sandbox := held.durable.sandbox if held else survivor) is not None:
            try:
                await sandbox.resume()
            except DsecError as error:
                _log.warning("%s: its sandbox does not wake, and goes: %s", rollout_id, error)
                await self.drop(rollout_id)

    async def close(self) -> None:
        """Drop every sandbox that is still held."""
        await asyncio.gather(*map(self.drop, {*self._held, *self._survivors}))

    def leave(self) -> None:
        """From now on sandboxes that are dropped live on, with what runs in them: another process takes them up."""
        self._are_left = True

    async def drop(self, rollout_id: str) -> None:
        """Free the rollout's sandbox, if it has one; its trajectory stays in the log."""
        held, survivor = self._held.pop(rollout_id, None), self._survivors.pop(rollout_id, None)
        if held is not None:
            await (_let_go if self._are_left else _destroy)(held.durable)
        if survivor is not None and not self._are_left:
            await _destroy(survivor)


async def _let_go(durable: DurableSandbox) -> None:
    """A command that is being started is started first: to give it up now would kill it."""
    for running in list(durable.running.values()):
        with contextlib.suppress(DsecError):
            await running.started()
    await durable.stop()


async def _destroy(sandbox: Sandbox | DurableSandbox) -> None:
    """What cannot be destroyed is its host's to end: a rollout has nothing to do with that."""
    try:
        await sandbox.destroy()
    except DsecError as error:
        _log.warning("a sandbox could not be destroyed: %s", error)
