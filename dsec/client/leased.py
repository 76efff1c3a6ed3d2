"""Sandboxes of an Edge that live as long as a job that is run by one process after another: `LeasedSubstrate`.

The job's sandboxes have labels of its own: whoever opens the substrate with those takes up what the process before
left, and destroys it in the end; so two that live at once must never have the same.  Each process creates under a
lease of its own, and renews beside it those of what it took up, since no sandbox changes its lease.  When no process
comes back, all of it ends with the leases.

See: dsec/edge/leases.py, dsec/client/substrate.py.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Mapping

from dsec.client.connection import Patience
from dsec.client.substrate import RemoteSandbox, RemoteSubstrate, create_remote
from dsec.errors import DsecError, InvalidArgumentError, StateError, UnreachableError
from dsec.keyed import fresh_name
from dsec.pb.v1 import edge_pb2 as pb
from dsec.types import SandboxId, SandboxSpec
from dsec.views import CreateRequest

RENEWALS_PER_TTL = 3
ROOM = Patience(busy_s=60.0)
"""A host that many share may be full for a while."""
_log = logging.getLogger(__name__)


class LeasedSubstrate:
    """The sandboxes of one job at an Edge.  Implements `dsec.sandbox.Substrate`."""

    def __init__(self, url: str, labels: Callable[[], dict[str, str]], ttl_s: float, token: str = "") -> None:
        """`labels` is asked at `open`; what a killed process left ends `ttl_s` seconds after it last renewed."""
        self._url, self._token = url, token
        self._labels_of_job = labels
        self._labels: dict[str, str] = {}
        self._ttl_s = ttl_s
        self._remote = RemoteSubstrate()
        self._owner = ""
        self._owners: set[tuple[str, int]] = set()
        self._renewing: asyncio.Task[None] | None = None

    async def open(self) -> None:
        """Connect, take up what an earlier process left, and begin to renew.  UnreachableError."""
        self._labels = self._labels_of_job()
        self._remote = RemoteSubstrate(self._url, self._token, self._labels)
        await self._remote.open()
        views = [await sandbox.view() for sandbox in self._remote.adopted().values()]
        self._owners = {(view.owner, view.epoch) for view in views if view.owner}
        await self._renew()
        self._renewing = asyncio.create_task(self._renew_for_ever(), name="renew leases")

    async def create(self, spec: SandboxSpec, sandbox_id: SandboxId | None = None) -> RemoteSandbox:
        """See `dsec.sandbox.Substrate.create`; the Edge alone gives ids.  Waits a while for room."""
        if sandbox_id is not None:
            raise InvalidArgumentError("an Edge gives its sandboxes their ids: leave sandbox_id out")
        try:
            return await self._create(spec)
        except StateError:  # the Edge was out of reach for so long that our lease lapsed
            await self._renew()
            return await self._create(spec)

    async def _create(self, spec: SandboxSpec) -> RemoteSandbox:
        request = CreateRequest(spec=spec, labels=self._labels, owner=self._owner)
        return await create_remote(self._remote.connection, request, ROOM)

    def adopted(self) -> Mapping[SandboxId, RemoteSandbox]:
        """What was there at `open`."""
        return self._remote.adopted()

    async def detach(self) -> None:
        """Disconnect; the Edge keeps the sandboxes for as long as their leases last."""
        await self._stop()
        await self._remote.detach()

    async def close(self) -> None:
        """Destroy what is the job's, and disconnect; an Edge that is away does so when the leases lapse."""
        await self._stop()
        has_any = bool(self._owners)
        try:
            while self._owners:
                owner, epoch = self._owners.pop()
                with contextlib.suppress(StateError):  # the Edge knows of it no more
                    await self._remote.connection.call("EndLease", pb.EndLeaseRequest(owner=owner, epoch=epoch))
            await self._remote.close()
        except UnreachableError as error:
            if has_any:
                _log.warning("the sandboxes at the Edge are left to their leases: %s", error)
            await self._remote.detach()

    async def _stop(self) -> None:
        renewing, self._renewing = self._renewing, None
        if renewing is not None:
            renewing.cancel()
            await asyncio.gather(renewing, return_exceptions=True)

    async def _renew_for_ever(self) -> None:
        while True:
            await asyncio.sleep(self._ttl_s / RENEWALS_PER_TTL)
            try:
                await self._renew()
            except DsecError as error:
                _log.warning("the leases of this run's sandboxes could not be renewed: %s", error)

    async def _renew(self) -> None:
        """Renew every lease; one that has lapsed is let go, and ours begins anew."""
        for owner, epoch in list(self._owners):
            try:
                await self._grant(owner, epoch)
            except StateError:
                self._owners.discard((owner, epoch))
        if (self._owner, 0) not in self._owners:
            owner = fresh_name()
            await self._grant(owner, 0)
            self._owners.add((owner, 0))
            self._owner = owner

    async def _grant(self, owner: str, epoch: int) -> None:
        request = pb.GrantLeaseRequest(owner=owner, epoch=epoch, ttl_s=self._ttl_s)
        await self._remote.connection.call("GrantLease", request)
