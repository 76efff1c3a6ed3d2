"""The engines of a pool and the requests that they draw: how they are opened, and what two of them must share."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence

from rollout.engine import Engine, EngineInfo
from rollout.errors import EngineError

AGAIN_S_MIN = 1.0
_log = logging.getLogger(__name__)


class PoolMember:
    """An engine; `fault` is why it is left out, None while it is not."""

    def __init__(self, name: str, engine: Engine) -> None:
        self.name, self.engine = name, engine
        self.fault: str | None = "it was not opened yet"
        self.mending: asyncio.Task[None] | None = None

    async def reopen(self) -> None:
        """End all that it draws, and begin anew.  EngineError."""
        await self.engine.close()
        await self.engine.open()

    async def stop_mending(self) -> None:
        """Nobody opens or closes it any more."""
        task, self.mending = self.mending, None
        if task is not None:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


class PoolRun:
    """A request, wherever it is drawn."""

    def __init__(self, session: str) -> None:
        self.session = session
        self.member: PoolMember | None = None
        """Who draws it, and has handed tokens over."""
        self.end: EngineError | None = None
        """Why it is not to go on elsewhere."""


async def open_all(members: Sequence[PoolMember], start_s_max: float) -> list[BaseException | None]:
    """Open each; what went wrong with it.  While nobody answers anywhere all are asked again, for so long at most."""
    until, told = time.monotonic() + start_s_max, ""
    while True:
        opened = await asyncio.gather(*(each.engine.open() for each in members), return_exceptions=True)
        absent = [str(error) for error in opened if isinstance(error, EngineError) and error.is_absent]
        left_s = until - time.monotonic()
        if len(absent) < len(members) or left_s <= 0:
            return opened
        if (why := "; ".join(absent)) != told:
            _log.warning("no engine is there yet, asked again for %.0f s: %s", left_s, why)
            told = why
        await asyncio.sleep(AGAIN_S_MIN)


def difference(info: EngineInfo, other: EngineInfo, *, is_whole: bool = False) -> str:
    """Why two engines cannot draw the same rollouts, or nothing; `is_whole`: not even for a while."""
    names = ["build", "vocab_count", "routing", "hidden_dim"]
    if is_whole or info.policy_version == other.policy_version:
        names += ["policy_version", "weights_digest"]
    if is_whole and info.context_tokens_max < other.context_tokens_max:
        names.append("context_tokens_max")
    differing = [name for name in names if getattr(info, name) != getattr(other, name)]
    return "; ".join(f"{name} {getattr(info, name)!s}, not {getattr(other, name)!s}" for name in differing)
