"""Layers as the spawner has them: mounted once, by number, for as long as a sandbox uses them and a while longer.

The while is for the next sandbox of the same image: with the last mount goes what the kernel has cached of
a layer.  A mounted layer is held in its store, and its open file in the keeper, so that nobody removes it.

Invariants:
    1. A layer has one number, and a number one layer, from before its mount until after its unmount.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections import Counter
from collections.abc import Coroutine, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol

from dsec.edge.config import LAYERS_COUNT_MAX
from dsec.edge.keeper import Keeper
from dsec.edge.spawner import Spawner
from dsec.errors import NotFoundError, ResourceExhaustedError, SpawnError
from dsec.sandbox import Hold
from dsec.types import Composition, LayerId


class Layers(Protocol):
    """What is needed of a store of layers (`dsec.edge.images.store.LayerStore`)."""

    async def composed(self, references: Sequence[str]) -> Composition:
        """See `dsec.sandbox.Layered`."""
        ...

    def holding(self) -> AbstractContextManager[Hold]:
        """See `dsec.sandbox.Layered`."""
        ...

    def acquire(self, layer_ids: Iterable[LayerId]) -> None:
        """Hold these layers, all or none.  NotFoundError."""
        ...

    def release(self, layer_ids: Iterable[LayerId]) -> None:
        """Give back what was acquired."""
        ...

    def descriptor(self, layer_id: LayerId) -> int:
        """The open file of a held layer."""
        ...

    async def pack(
        self, disk: Path, first_uid: int, *, parents: tuple[LayerId, ...] = (), beneath: Sequence[str] = ()
    ) -> LayerId:
        """A layer of the upper directory of a sandbox that stands still; `first_uid` on it is 0 in the layer.

        What of `beneath` is not on the disk was removed.
        """
        ...


class LayerMounts:
    """The layers of one spawner; `idle_s` is how long an unused one stays mounted."""

    def __init__(self, spawner: Spawner, store: Layers | None, keeper: Keeper | None, idle_s: float) -> None:
        self._spawner = spawner
        self._store = store
        self._keeper = keeper
        self._idle_s: float | None = idle_s  # None: closed
        self._numbers: dict[LayerId, int] = {}
        self._free = list(range(LAYERS_COUNT_MAX - 1, -1, -1))
        self._users: Counter[LayerId] = Counter()
        self._timers: dict[LayerId, asyncio.TimerHandle] = {}
        self._changing = asyncio.Lock()
        self._tasks: set[asyncio.Task[None]] = set()

    async def acquire(self, layer_ids: Sequence[LayerId]) -> tuple[int, ...]:
        """Numbers of these layers, mounted, until `release`.  NotFoundError, SpawnError, ResourceExhaustedError."""
        self._users.update(layer_ids)  # from here on no timer unmounts one of them
        try:
            if any(layer_id not in self._numbers for layer_id in layer_ids):
                await asyncio.shield(self._start(self._mount_missing(layer_ids)))
        except BaseException:
            self.release(layer_ids)
            raise
        return tuple(self._numbers[layer_id] for layer_id in layer_ids)

    def release(self, layer_ids: Sequence[LayerId]) -> None:
        """A sandbox uses these no more."""
        self._users.subtract(layer_ids)
        for layer_id in set(layer_ids):
            if self._users[layer_id] <= 0:
                del self._users[layer_id]
                self._start_timer(layer_id)

    async def adopt(self, kept: Mapping[str, int], used: Iterable[Sequence[LayerId]]) -> None:
        """Go on with what an earlier process mounted: `kept` by our keys; `used` by each sandbox that lives."""
        for key, fd in kept.items():
            number, layer_id = _parse_key(key)
            try:
                if self._store is None or number not in self._spawner.mounted:
                    raise NotFoundError(f"layer {layer_id} cannot be used again")
                self._store.acquire([layer_id])
                self._numbers[layer_id] = number
                self._free.remove(number)
                if self._keeper is not None:
                    await self._keeper.put(key, self._store.descriptor(layer_id))
            except NotFoundError:  # sandboxes that have it keep it
                if self._keeper is not None:
                    await self._keeper.drop(key)
            os.close(fd)
        for number in self._spawner.mounted - set(self._numbers.values()):
            await self._spawner.unmount(number)
        for layer_ids in used:
            self._users.update(layer_ids)
        for layer_id in self._numbers:
            if not self._users[layer_id]:
                self._start_timer(layer_id)

    async def close(self, *, is_over: bool) -> None:
        """Let go of every layer: the spawner is to end (`is_over`), or is another process's from now on."""
        self._idle_s = None
        for timer in self._timers.values():
            timer.cancel()
        self._timers.clear()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._keeper is not None and is_over:
            for layer_id, number in self._numbers.items():
                await self._keeper.drop(_key(number, layer_id))
        if self._store is not None:
            self._store.release(list(self._numbers))
        self._numbers.clear()

    def _start(self, work: Coroutine[None, None, None]) -> asyncio.Task[None]:
        """Something that is not cut short when its caller is: a number must not be used for two things at once."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._forget_task)
        return task

    def _forget_task(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            task.exception()

    async def _mount_missing(self, layer_ids: Sequence[LayerId]) -> None:
        async with self._changing:
            for layer_id in layer_ids:
                if layer_id not in self._numbers:
                    await self._mount(layer_id)

    async def _mount(self, layer_id: LayerId) -> None:
        if self._store is None:
            raise NotFoundError(f"there is no layer {layer_id}: this substrate has no store of layers")
        if not self._free:
            await self._unmount_unused()
        if not self._free:
            raise ResourceExhaustedError(f"{LAYERS_COUNT_MAX} layers are in use")
        self._store.acquire([layer_id])
        number = self._free.pop()
        try:
            if self._keeper is not None:
                await self._keeper.put(_key(number, layer_id), self._store.descriptor(layer_id))
            await self._spawner.mount(number, self._store.descriptor(layer_id))
        except BaseException:
            if self._keeper is not None:
                await self._keeper.drop(_key(number, layer_id))
            self._store.release([layer_id])
            self._free.append(number)
            raise
        self._numbers[layer_id] = number

    def _start_timer(self, layer_id: LayerId) -> None:
        if self._idle_s is None:
            return
        loop = asyncio.get_running_loop()
        if layer_id in self._timers:
            self._timers.pop(layer_id).cancel()
        self._timers[layer_id] = loop.call_later(self._idle_s, self._on_idle, layer_id)

    def _on_idle(self, layer_id: LayerId) -> None:
        self._timers.pop(layer_id, None)
        self._start(self._unmount(layer_id))

    async def _unmount(self, layer_id: LayerId) -> None:
        async with self._changing:
            await self._unmount_one(layer_id)

    async def _unmount_unused(self) -> None:
        for layer_id in list(self._numbers):
            await self._unmount_one(layer_id)

    async def _unmount_one(self, layer_id: LayerId) -> None:
        if self._users[layer_id] > 0 or layer_id not in self._numbers or self._store is None:
            return
        number = self._numbers.pop(layer_id)
        try:
            with contextlib.suppress(SpawnError):  # then all mounts are gone
                await self._spawner.unmount(number)
            if self._keeper is not None:
                await self._keeper.drop(_key(number, layer_id))
        finally:
            self._store.release([layer_id])
        self._free.append(number)


def _key(number: int, layer_id: LayerId) -> str:
    return f"layer/{number}/{layer_id}"


def _parse_key(key: str) -> tuple[int, LayerId]:
    _, number, layer_id = key.split("/", 2)
    return int(number), LayerId(layer_id)
