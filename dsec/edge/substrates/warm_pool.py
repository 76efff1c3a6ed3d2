"""Sandboxes made ahead, for whoever asks for one that they can become (`kind_of`).

They are made one at a time, and only while nobody waits for a sandbox, as what was asked for last, so that a series
of one spec finds nothing left to attach.  Another kind is made when it was asked for twice in a row, so that two kinds
that alternate do not undo each other.
They are nobody's until they are handed out: they have no network, and die with this process.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Iterator

import msgspec

from dsec.edge.substrates.container_sandbox import ContainerSandbox, kind_of
from dsec.errors import DsecError
from dsec.types import NetworkPolicy, SandboxSpec

log = logging.getLogger(__name__)


class WarmPool:
    """At most `count_max` sandboxes that `make` has made."""

    def __init__(self, count_max: int, make: Callable[[SandboxSpec], Awaitable[ContainerSandbox]]) -> None:
        self._count_max = count_max
        self._make = make
        self._ready: list[ContainerSandbox] = []
        self._spec: SandboxSpec | None = None
        self._asked: SandboxSpec | None = None
        self._asking_count = 0
        self._filling: asyncio.Task[None] | None = None

    @property
    def count(self) -> int:
        """How many are ready."""
        return len(self._ready)

    @contextlib.contextmanager
    def asking(self) -> Iterator[None]:
        """While somebody waits for a sandbox, none is made ahead; afterwards what was taken is made again."""
        self._asking_count += 1
        try:
            yield
        finally:
            self._asking_count -= 1
            if self._asking_count == 0 and self._count_max > 0 and (self._filling is None or self._filling.done()):
                self._filling = asyncio.create_task(self._fill(), name="make sandboxes ahead")

    def take(self, spec: SandboxSpec) -> ContainerSandbox | None:
        """One that can become `spec`; it may have died meanwhile."""
        kind = kind_of(spec)
        if self._spec is None or kind in (self._asked, kind_of(self._spec)):
            self._spec = msgspec.structs.replace(spec, network=NetworkPolicy())
        self._asked = kind
        return self._ready.pop() if self._ready and kind_of(self._ready[-1].spec) == kind else None

    async def evict(self) -> bool:
        """Make room: destroy one, if there is one."""
        if not self._ready:
            return False
        await self._ready.pop().destroy()
        return True

    async def close(self) -> None:
        """Destroy them all, and make no more."""
        self._count_max = 0
        filling, self._filling = self._filling, None
        if filling is not None:
            filling.cancel()
            await asyncio.wait([filling])
        while await self.evict():
            pass

    def forget(self) -> None:
        """The spawner died, and they with it."""
        self._ready.clear()

    async def _fill(self) -> None:
        while self._spec is not None and self._ready and kind_of(self._ready[-1].spec) != kind_of(self._spec):
            await self.evict()
        while self._spec is not None and len(self._ready) < self._count_max and self._asking_count == 0:
            try:
                self._ready.append(await self._make(self._spec))
            except DsecError as error:
                log.info("no sandbox was made ahead: %s", error)
                return
