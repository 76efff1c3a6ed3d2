"""Between the stepping thread and the disk: what is evicted goes to a `StateCache`, what a request lacks comes from it.

Both sides only leave word with the other.  A request waits for its state, and nothing else does; however that
reading ends, the request begins.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable

from rollout.engines.embedded.stepping import SteppingThread
from rollout.engines.kept_state import TOKEN_BYTES, KeptState
from rollout.engines.state_cache import StateCache


class DiskTier:
    """Belongs to the event loop that opened it, but for `wanted`."""

    def __init__(self, cache: StateCache) -> None:
        self._cache = cache
        self._loop = asyncio.get_running_loop()
        self._reading: set[asyncio.Task[None]] = set()
        self.thread: SteppingThread | None = None
        self.evicted: Callable[[KeptState], None] = cache.store

    async def open(self) -> None:
        """Find what is on disk.  RequestError, as StateCache has it."""
        await self._cache.open()

    def stored(self, tokens: bytes, weights_digest: str) -> bytes:
        """The longest proper prefix that there is a state of."""
        return tokens[: self._cache.longest(tokens, weights_digest) * TOKEN_BYTES]

    def wanted(self, tokens: bytes, weights_digest: str) -> None:
        """Have the state of these tokens admitted; called by the stepping thread."""
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._begin, tokens, weights_digest)

    def _begin(self, tokens: bytes, weights_digest: str) -> None:
        task = asyncio.create_task(self._read(tokens, weights_digest))
        self._reading.add(task)
        task.add_done_callback(self._reading.discard)

    async def _read(self, tokens: bytes, weights_digest: str) -> None:
        entry = None
        try:
            entry = await self._cache.fetch(tokens, weights_digest)
        finally:
            if self.thread is not None:
                self.thread.post(lambda versions: versions.admit(tokens, entry))

    async def close(self, states: Iterable[KeptState]) -> None:
        """Write these states and what was evicted; the thread has ended."""
        for task in self._reading:
            task.cancel()
        await asyncio.gather(*self._reading, return_exceptions=True)
        await self._cache.close(states)
