"""Which weights draw: a trainer's updates, what they end, and the same weights again after a restart.

Append, then act: an update is in the log before the new weights draw, so no token of the log has a version that the
log does not know.

See: docs/architecture.md, "Engine"; proto/rollout/pb/v1/rollout.proto, "UpdatePolicy".
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Iterable
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

import wal
from rollout.engine import Engine, EngineInfo
from rollout.errors import EngineError, RequestError
from rollout.events import FinishReason, PolicyUpdated
from rollout.ledger import Ledger
from rollout.scheduling.claims import Claim
from rollout.scheduling.dispatch import Dispatcher

if TYPE_CHECKING:
    from rollout.service import RolloutService


async def load_policy(service: RolloutService, open_rollouts: Iterable[str]) -> None:
    """Have an engine with older weights draw with those that the log names last, or the operator's, if newer.

    Newer ones that it has already, the log names from here on.  EngineError, also if none of that would let these
    rollouts go on.
    """
    engine, named = service.engine, service.ledger.policy
    version = named.engine.policy_version if named is not None else 0
    if newer := service.config.newer_than(max(version, engine.info.policy_version)):
        version, checkpoint = newer
        await engine.update(checkpoint, version, lambda new: service.note(PolicyUpdated(new, str(checkpoint))))
    elif engine.info.policy_version > version and engine.checkpoint is not None:
        await service.note(PolicyUpdated(engine.info, str(engine.checkpoint)))
    elif named is not None:
        await follow(engine, named.checkpoint, version, named.engine.weights_digest)
    service.members.check_weights(open_rollouts)


async def follow(engine: Engine, checkpoint: str, policy_version: int, weights_digest: str) -> None:
    """Have an engine with older weights draw with these, which a log names.

    EngineError, which says what to do, also if the path holds others by now.
    """
    if policy_version <= engine.info.policy_version:
        return

    async def check(found: EngineInfo) -> None:
        if found.weights_digest != weights_digest:
            raise EngineError("it holds other weights by now: give each version a path of its own")

    try:
        await engine.update(Path(checkpoint), policy_version, check)
    except EngineError as error:
        raise EngineError(
            f"{checkpoint}, weights {weights_digest[:12]}, is version {policy_version} of the log and cannot be used: "
            f"{error}; put it back, or begin with newer ones: DSEC_NEWER_WEIGHTS={policy_version + 1}:DIR"
        ) from error


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
        found = await asyncio.to_thread(_find, checkpoint, self._service.config.checkpoints_root)
        return await wal.settled(self._update(found, policy_version))

    async def _update(self, checkpoint: Path, policy_version: int) -> tuple[EngineInfo, list[str]]:
        service = self._service
        async with self._lock:
            info = await service.engine.update(
                checkpoint, policy_version, lambda new: service.note(PolicyUpdated(new, str(checkpoint)))
            )
            return info, await catch_up(service)


class Awaiting:
    """Rollouts that are not begun because their job wants newer weights: set aside in the queue until those are there.

    One that is preempted meanwhile stands like any other that was queued: not until Resume does it wait again.
    """

    def __init__(self, ledger: Ledger, engine: Engine, dispatcher: Dispatcher, rests: Callable[[str], None]) -> None:
        """Those of one service; `rests` hears of one that was preempted."""
        self._ledger = ledger
        self._engine = engine
        self._dispatcher = dispatcher
        self._rests = rests
        self._held: dict[str, None] = {}

    def enqueue(self, claims: Iterable[Claim]) -> None:
        """Queue rollouts, or have them wait for their weights."""
        for is_early, part in groupby(claims, key=lambda claim: self._is_early(claim.members[0])):
            queued = list(part)
            self._held |= dict.fromkeys(member for claim in queued for member in claim.members if is_early)
            self._dispatcher.enqueue(queued, is_aside=is_early)

    def resume(self, rollout_ids: Iterable[str]) -> list[str]:
        """Let what was set aside wait for its turn, or for its weights; whom that concerns."""
        held: list[str] = []
        ready: list[str] = []
        for rollout_id in rollout_ids:
            if not self._dispatcher.is_ending(rollout_id):
                (held if self._is_early(rollout_id) else ready).append(rollout_id)
        new = [rollout_id for rollout_id in held if rollout_id not in self._held]
        self._held |= dict.fromkeys(new)
        return [*new, *self._dispatcher.resume(ready)]

    async def preempt(self, rollout_ids: Collection[str], cause: str) -> list[str]:
        """Stop these; a group that waits for its weights does not begin when they come.  Whom that concerns."""
        members = (member for each in rollout_ids for member in self._ledger.member(each)[1].members)
        stopped = [each for each in dict.fromkeys(members) if each in self._held and self._is_early(each)]
        for rollout_id in stopped:
            del self._held[rollout_id]
            self._rests(rollout_id)
        return [*stopped, *await self._dispatcher.preempt(rollout_ids, cause)]

    def forget(self, rollout_ids: Iterable[str]) -> None:
        """They are being ended."""
        for rollout_id in rollout_ids:
            self._held.pop(rollout_id, None)

    def look_again(self) -> None:
        """The engine may have other weights: queue those that waited for them."""
        ready = [each for each in self._held if not self._is_early(each)]
        for rollout_id in ready:
            del self._held[rollout_id]
        self._dispatcher.resume(ready)

    def _is_early(self, rollout_id: str) -> bool:
        job, _, _ = self._ledger.member(rollout_id)
        return rollout_id not in self._ledger.rollouts and job.policy.min_version > self._engine.info.policy_version


def _find(checkpoint: str, root: Path | None) -> Path:
    """Where a checkpoint really is.  RequestError unless it, and all that it links to, is below the operator's root.

    What is not there and what is elsewhere are told alike: nobody learns here which files the host has.
    """
    if root is None:
        raise RequestError(
            "this service takes no weights: its operator says by DSEC_CHECKPOINTS_ROOT where they may lie"
        )
    try:
        allowed, found = root.resolve(strict=True), Path(checkpoint).resolve(strict=True)
        parts = [found, *(each.resolve(strict=True) for each in (found.iterdir() if found.is_dir() else ()))]
        is_allowed = Path(checkpoint).is_absolute() and all(each.is_relative_to(allowed) for each in parts)
    except (OSError, ValueError, RuntimeError):  # a name that can be none; links in a ring
        is_allowed = False
    if not is_allowed:
        raise RequestError(
            f"checkpoint {checkpoint[:200]!r}: no such absolute path below DSEC_CHECKPOINTS_ROOT ({root}) of the "
            "server's host"
        )
    if not found.is_dir():
        raise RequestError(f"checkpoint {checkpoint[:200]!r}: give the folder of the weights, not a file in it")
    return found


async def catch_up(service: RolloutService) -> list[str]:
    """Once other weights draw: begin what waited for them, end as STALE what they leave too far behind (the answer)."""
    service.awaiting.look_again()
    stale = _stale_rollouts(service.ledger)
    for request_id, rollout_ids in stale.items():
        await service.finish(request_id, rollout_ids, FinishReason.STALE)
    return [rollout_id for rollout_ids in stale.values() for rollout_id in rollout_ids]


def _stale_rollouts(ledger: Ledger) -> dict[str, list[str]]:
    """Job -> its rollouts that have not ended and whose oldest token is too far behind the newest weights."""
    stale: dict[str, list[str]] = {}
    for rollout_id, state in ledger.rollouts.items():
        if ledger.is_stale(state) and not ledger.is_done(rollout_id):
            stale.setdefault(state.opened.request_id, []).append(rollout_id)
    return stale
