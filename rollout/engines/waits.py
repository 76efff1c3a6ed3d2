"""A wait that somebody else may break off."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import TypeVar

T = TypeVar("T")


class Wait:
    """Waits for what a generator brings, one after the other; it ends where the wait is broken off."""

    def __init__(self) -> None:
        self._task: asyncio.Task[object] | None = None
        """Who waits."""
        self.is_broken = False

    @property
    def is_on(self) -> bool:
        """Somebody waits now."""
        return self._task is not None

    async def next(self, chunks: AsyncGenerator[T, None]) -> T | None:
        """The next one; None if there is none, or the wait was broken off."""
        self._task = task = asyncio.current_task()
        assert task is not None  # noqa: S101 - a coroutine runs in one
        cancelling = task.cancelling()
        try:
            return await anext(chunks, None)
        except asyncio.CancelledError:
            if self.is_broken and task.uncancel() <= cancelling:
                return None
            raise
        finally:
            self._task = None

    def break_off(self) -> None:
        """Somebody waits, and is to do so no longer."""
        if self._task is not None and not self.is_broken:
            self.is_broken = True
            self._task.cancel()
