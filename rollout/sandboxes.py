"""The sandbox of each running rollout: made when first needed, rebuilt when lost, freed at the end.

A rollout that only samples holds none: after a resume its sandbox is taken up, or rebuilt, when a tool call
or the verifier asks for it, not before.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable

from dsec.edge.exec_log import DurableSandbox
from dsec.errors import DsecError
from dsec.replay import incarnate
from dsec.sandbox import Sandbox, Substrate
from dsec.trajectory import Append
from dsec.types import SandboxSpec
from rollout.ledger import Ledger

_log = logging.getLogger(__name__)


class Sandboxes:
    """Rollout id -> durable sandbox."""

    def __init__(self, substrate: Substrate, ledger: Ledger, append: Append) -> None:
        """The substrate is open already; `append` makes trajectory records durable."""
        self._substrate = substrate
        self._ledger = ledger
        self._append = append
        self._held: dict[str, DurableSandbox] = {}
        self._survivors: dict[str, Sandbox] = {}

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

    async def hold(self, rollout_id: str, spec: SandboxSpec, is_wanted: Callable[[str], bool]) -> DurableSandbox:
        """The rollout's sandbox, in the state that its trajectory describes.

        A rebuild replays the keys that are wanted: what an attempt at the set-up or at the verdict did
        that failed is left out.  Raises DivergedError (a replay did not give the logged results), SpawnError and
        ResourceExhaustedError.
        """

        async def append(kind: int, payload: bytes) -> int:
            lsn = await self._append(kind, payload)
            self._ledger.extend(rollout_id, lsn)
            return lsn

        if rollout_id not in self._held:
            trajectory = self._ledger.trajectory(rollout_id)
            survivor = self._survivors.pop(rollout_id, None)
            self._held[rollout_id] = await incarnate(self._substrate, spec, trajectory, append, is_wanted, survivor)
        return self._held[rollout_id]

    async def drop(self, rollout_id: str) -> None:
        """Free the rollout's sandbox, if it has one; its trajectory stays in the log."""
        for kept in (self._held, self._survivors):
            if (sandbox := kept.pop(rollout_id, None)) is not None:
                await _destroy(sandbox)


async def _destroy(sandbox: Sandbox | DurableSandbox) -> None:
    """What cannot be destroyed is its host's to end: a rollout has nothing to do with that."""
    try:
        await sandbox.destroy()
    except DsecError as error:
        _log.warning("a sandbox could not be destroyed: %s", error)
