"""The sandbox of each running rollout: made when first needed, rebuilt when lost, freed at the end.

A rollout that only samples holds none: after a resume its sandbox is rebuilt when a tool call or the
verifier asks for it, not before.
"""

from __future__ import annotations

from collections.abc import Callable

from dsec.edge.exec_log import DurableSandbox
from dsec.replay import incarnate
from dsec.sandbox import Substrate
from dsec.trajectory import Append
from dsec.types import SandboxSpec
from rollout.ledger import Ledger


class Sandboxes:
    """Rollout id -> durable sandbox."""

    def __init__(self, substrate: Substrate, ledger: Ledger, append: Append) -> None:
        """The substrate is open already; `append` makes trajectory records durable."""
        self._substrate = substrate
        self._ledger = ledger
        self._append = append
        self._held: dict[str, DurableSandbox] = {}

    @property
    def count(self) -> int:
        """Sandboxes alive now."""
        return len(self._held)

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
            self._held[rollout_id] = await incarnate(self._substrate, spec, trajectory, append, is_wanted)
        return self._held[rollout_id]

    async def drop(self, rollout_id: str) -> None:
        """Free the rollout's sandbox, if it has one; its trajectory stays in the log."""
        if (sandbox := self._held.pop(rollout_id, None)) is not None:
            await sandbox.destroy()
