"""Sandboxes made ahead, for whoever asks for one that they can become (`kind_of`).

They are made one at a time, and only while nobody waits for a sandbox: of each kind in proportion to what was asked for
lately, and as it was asked for last, so that a series of one spec finds nothing left to attach.  One is ended for
another kind only where two too many wait, or nobody asked for it lately, so that kinds which alternate do not undo
each other.  They are nobody's until they are handed out: they have no network, and die with this process.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Iterator
from typing import Generic, Protocol, TypeVar

import msgspec

from dsec.edge.substrates.container_sandbox import Kind, kind_of
from dsec.errors import DsecError
from dsec.types import NetworkPolicy, SandboxSpec

_SURPLUS_MAX = 1
log = logging.getLogger(__name__)


class Waiting(Protocol):
    """What is made ahead."""

    @property
    def spec(self) -> SandboxSpec:
        """What it is."""
        ...

    async def destroy(self) -> None:
        """End it."""
        ...


_W = TypeVar("_W", bound=Waiting)


class WarmPool(Generic[_W]):
    """At most `count_max` sandboxes that `make` has made."""

    def __init__(self, count_max: int, make: Callable[[SandboxSpec], Awaitable[_W]]) -> None:
        self._count_max = count_max
        self._make = make
        self._ready: list[_W] = []
        self._asked: deque[SandboxSpec] = deque(maxlen=count_max + 1)
        self._asking_count = 0
        self._filling: asyncio.Task[None] | None = None

    @property
    def ready(self) -> tuple[_W, ...]:
        """Those that wait."""
        return tuple(self._ready)

    async def filled(self) -> None:
        """Wait until no more is being made."""
        if self._filling is not None:
            await asyncio.wait([self._filling])

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

    def ask(self, spec: SandboxSpec) -> None:
        """Somebody wants such a one: more are made of what is asked for more."""
        self._asked.append(msgspec.structs.replace(spec, network=NetworkPolicy()))

    def take(self, spec: SandboxSpec) -> _W | None:
        """One that can become `spec`; it may have died meanwhile."""
        for index in range(len(self._ready) - 1, -1, -1):
            if kind_of(self._ready[index].spec) == kind_of(spec):
                return self._ready.pop(index)
        return None

    async def evict(self) -> bool:
        """Make room: destroy one, of a kind of which too many wait, if there is one."""
        if not self._ready:
            return False
        surplus = self._surplus()
        await self._evict(max((kind_of(one.spec) for one in self._ready), key=lambda kind: surplus[kind]))
        return True

    async def _evict(self, kind: Kind) -> None:
        index = next(index for index, one in enumerate(self._ready) if kind_of(one.spec) == kind)
        await self._ready.pop(index).destroy()

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

    def _surplus(self) -> dict[Kind, int]:
        """How many too many wait of each kind that waits or was asked for lately; below 0 where some lack."""
        asked = Counter(map(kind_of, self._asked))
        ready = Counter(kind_of(one.spec) for one in self._ready)
        shares = {kind: self._count_max * count // len(self._asked) for kind, count in asked.items()}
        if asked:
            most = max(asked, key=lambda kind: (asked[kind], ready[kind]))
            shares[most] += self._count_max - sum(shares.values())
        return {kind: ready[kind] - shares.get(kind, 0) for kind in ready | asked}

    async def _fill(self) -> None:
        while self._asking_count == 0:
            surplus, asked = self._surplus(), {kind_of(spec): spec for spec in self._asked}
            vain = [kind for kind, count in surplus.items() if count > (_SURPLUS_MAX if kind in asked else 0)]
            if vain:
                await self._evict(vain[0])
                continue
            if len(self._ready) >= self._count_max or not asked:
                return
            try:
                self._ready.append(await self._make(asked[min(asked, key=lambda kind: surplus[kind])]))
            except DsecError as error:
                log.info("no sandbox was made ahead: %s", error)
                return
