"""One engine among those of a pool: what it must be able to tell, and what two of them must have in common."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Protocol

from rollout.engine import Engine, EngineInfo


class Member(Engine, Protocol):
    """An engine that knows where its weights came from, so that others can be brought to them."""

    @property
    def checkpoint(self) -> Path | None:
        """The folder of the weights that draw, where this host sees it."""
        ...


class PoolMember:
    """An engine; `fault` is why it is left out, None while it is not."""

    def __init__(self, name: str, engine: Member) -> None:
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


def difference(info: EngineInfo, other: EngineInfo, *, is_whole: bool = False) -> str:
    """Why two engines cannot draw the same rollouts, or nothing; `is_whole`: not even for a while."""
    names = ["build", "vocab_count", "routing", "hidden_dim"]
    if is_whole or info.policy_version == other.policy_version:
        names += ["policy_version", "weights_digest"]
    if is_whole and info.context_tokens_max < other.context_tokens_max:
        names.append("context_tokens_max")
    differing = [name for name in names if getattr(info, name) != getattr(other, name)]
    return "; ".join(f"{name} {getattr(info, name)!s}, not {getattr(other, name)!s}" for name in differing)
