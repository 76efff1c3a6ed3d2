"""Leases: sandboxes that live only while the job that owns them says so.

An owner is a name; its epoch rises when a new process of the job takes the place of an older one that
may still be running somewhere.  A lease is (owner, epoch): it is renewed under the same epoch, and ended by
a higher one.  What was created under a lease ends with it, exactly that.

Invariants:
1. The newest epoch of an owner never goes down, and a lease that ended is never renewed.
2. Nothing is created under a lease that is not live.
3. A lease lapses only if the Edge was there to renew it: one that was away, or stood still, gives its owner a moment.
"""

from __future__ import annotations

import asyncio

from dsec.edge.deadlines import Deadlines
from dsec.edge.journal import Lease, LeaseEnded, LeaseGranted
from dsec.edge.live import LiveSandbox, check_text
from dsec.edge.registry import Registry
from dsec.errors import InvalidArgumentError, ResourceExhaustedError, StateError
from dsec.lifecycle import EndReason

LATE_S_MAX = 0.5
"""An end that is found later than this was found by an Edge that stood still: renewals may wait in its sockets."""
OWNER_BYTES_MAX = 256
EPOCH_MAX = (1 << 63) - 1


class Leases:
    """The leases of one Edge."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry
        self._ledger = registry.ledger
        self._lock = asyncio.Lock()
        self._not_before: dict[str, float] = {}
        """Owner -> when its lease may lapse at the earliest, where no Edge was there to renew it, or it stood still."""
        self.deadlines = Deadlines(registry.clock, registry.now, self._on_due)

    def start(self) -> None:
        """Watch those of the journal; owners get a moment to renew what ran out while no Edge was there."""
        grace_until_s = self._registry.now() + self._registry.config.lease_grace_s
        for owner, lease in self._ledger.leases.items():
            if lease.is_live:
                self._not_before[owner] = grace_until_s
                self.deadlines.put(owner, self._end_of(owner, lease))
        self.deadlines.start()

    def _end_of(self, owner: str, lease: Lease) -> float:
        return max(lease.expires_at_s, self._not_before.get(owner, 0.0))

    def require(self, owner: str, epoch: int) -> None:
        """StateError unless this lease is live."""
        if not owner:
            return
        lease = self._ledger.leases.get(owner)
        if lease is None:
            raise StateError(f"owner {owner!r} has no lease: grant one first")
        if epoch != lease.epoch:
            raise StateError(f"epoch {epoch} of owner {owner!r} is not the newest, which is {lease.epoch}")
        if not lease.is_live:
            raise StateError(f"the lease of owner {owner!r}, epoch {epoch}, has ended")

    async def grant(self, owner: str, epoch: int, ttl_s: float) -> None:
        """Grant or renew.  StateError for an epoch that is not the newest, or has ended."""
        check_lease(owner, epoch)
        if not 0 < ttl_s <= self._registry.config.lease_ttl_s_max:
            raise InvalidArgumentError(f"ttl_s {ttl_s} is not in (0, {self._registry.config.lease_ttl_s_max}]")
        async with self._lock:
            lease = self._ledger.leases.get(owner)
            if lease is not None and epoch <= lease.epoch:
                self.require(owner, epoch)
            count_max = self._registry.config.leases_count_max
            if lease is None and len(self._ledger.leases) >= count_max:
                raise ResourceExhaustedError(f"the Edge keeps {count_max} leases already")
            record = LeaseGranted(owner, epoch, self._registry.now() + ttl_s)
            await self._registry.log.append(record, is_refusable=lease is None)
            self._not_before.pop(owner, None)
            self.deadlines.put(owner, record.expires_at_s)
        if lease is not None and lease.epoch < epoch:
            self._reap(owner, f"epoch {epoch} took its place")

    async def end(self, owner: str, epoch: int) -> None:
        """End a lease, and what lives under it; done when nothing of it is left.  Ending twice is fine."""
        check_lease(owner, epoch)
        async with self._lock:
            lease = self._ledger.leases.get(owner)
            if lease is None or epoch > lease.epoch:
                raise StateError(f"owner {owner!r} has no lease of epoch {epoch}")
            if lease.is_live and epoch == lease.epoch:
                await self._registry.log.append(LeaseEnded(owner, epoch, self._registry.now()))
        await asyncio.gather(*(asyncio.shield(end) for end in self._reap(owner, "its lease was ended")))

    def _on_due(self, owner: str) -> float | None:
        lease = self._ledger.leases.get(owner)
        if lease is None or not lease.is_live:
            return None
        late_s = self._registry.now() - self._end_of(owner, lease)
        if late_s > LATE_S_MAX:
            self._not_before[owner] = self._registry.now() + self._registry.config.lease_grace_s
        if late_s < 0 or late_s > LATE_S_MAX:
            return self._end_of(owner, lease)
        self._registry.spawn(self._lapse(owner), f"lease of {owner} lapses")
        return None

    async def _lapse(self, owner: str) -> None:
        async with self._lock:
            lease = self._ledger.leases.get(owner)
            if lease is None or not lease.is_live or self._end_of(owner, lease) > self._registry.now():
                return  # it was renewed at the last moment
            await self._registry.log.append(LeaseEnded(owner, lease.epoch, self._registry.now()))
        self._reap(owner, "its lease was not renewed")

    def _reap(self, owner: str, why: str) -> list[asyncio.Task[None]]:
        """End what has no live lease any more; a create under way sees for itself."""
        return [
            self._registry.end(live, EndReason.LEASE_LAPSED, why)
            for live in self._registry.living()
            if live.known.requested.request.owner == owner and not self.covers(live)
        ]

    def covers(self, live: LiveSandbox) -> bool:
        """Whether a sandbox may live, as far as leases go."""
        return not live.known.requested.request.owner or self._ledger.lease_of(live.known) is not None


def check_lease(owner: str, epoch: int) -> None:
    """InvalidArgumentError for a name or an epoch that cannot be."""
    check_text("owner", owner, OWNER_BYTES_MAX)
    if not 0 <= epoch <= EPOCH_MAX:
        raise InvalidArgumentError(f"epoch {epoch} is not in [0, {EPOCH_MAX}]")
