"""Which weights draw: a trainer's updates, what they end, and the same weights again after a restart.

Append, then act: an update is in the log before the new weights draw, so no token of the log has a version that the
log does not know.

See: docs/architecture.md, "Engine"; proto/rollout/pb/v1/rollout.proto, "UpdatePolicy".
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING

import wal
from rollout.engine import Engine, EngineInfo
from rollout.errors import RequestError
from rollout.events import FinishReason, PolicyUpdated
from rollout.ledger import Ledger

if TYPE_CHECKING:
    from rollout.service import RolloutService


async def load_policy(engine: Engine, ledger: Ledger) -> None:
    """Have an engine that was just opened draw with the weights that the log names last.  EngineError."""
    if ledger.policy is not None and ledger.policy.engine.policy_version > engine.info.policy_version:
        await engine.update(Path(ledger.policy.checkpoint), ledger.policy.engine.policy_version)


class Policy:
    """The weights of one service; one update at a time."""

    def __init__(self, service: RolloutService) -> None:
        """The service is open."""
        self._service = service
        self._lock = asyncio.Lock()

    async def update(self, checkpoint: str, policy_version: int) -> tuple[EngineInfo, list[str]]:
        """Draw with other weights from here on; the engine that does, and the rollouts that this ended as STALE.

        When it returns, all of it is durable; it is carried out to its end even if the caller goes away.
        RequestError, EngineError: nothing changed.
        """
        if not await asyncio.to_thread(_exists, checkpoint):
            raise RequestError(f"checkpoint {checkpoint!r}: no such absolute path on the server's host")
        return await wal.settled(self._update(checkpoint, policy_version))

    async def _update(self, checkpoint: str, policy_version: int) -> tuple[EngineInfo, list[str]]:
        service = self._service
        async with self._lock:
            info = await service.engine.update(
                Path(checkpoint), policy_version, lambda new: service.note(PolicyUpdated(new, checkpoint))
            )
            stale = stale_rollouts(service.ledger)
            for request_id, rollout_ids in stale.items():
                await service.finish(request_id, rollout_ids, FinishReason.STALE)
        return info, [rollout_id for rollout_ids in stale.values() for rollout_id in rollout_ids]


def _exists(checkpoint: str) -> bool:
    try:
        return Path(checkpoint).is_absolute() and Path(checkpoint).exists()
    except (OSError, ValueError):  # a name that can be none
        return False


def stale_rollouts(ledger: Ledger) -> dict[str, list[str]]:
    """Job -> its rollouts that have not ended and whose oldest token is too far behind the newest weights."""
    stale: dict[str, list[str]] = {}
    if ledger.policy is None:
        return stale
    for rollout_id, state in ledger.rollouts.items():
        lag_max = state.job.policy.max_lag
        if lag_max is None or not state.versions or ledger.is_done(rollout_id) or state.opened.judged_rollout_id:
            continue
        if ledger.policy.engine.policy_version - state.versions[0][1] > lag_max:
            stale.setdefault(state.opened.request_id, []).append(rollout_id)
    return stale
