"""The engines of a pool and the requests that they draw: how they are opened, and what two of them must share."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Protocol

import msgspec

from rollout.engine import Engine, EngineInfo
from rollout.errors import EngineError, ForeignWeightsError, PreemptedError, RolloutError

AGAIN_S_MIN = 1.0
_log = logging.getLogger(__name__)


class PoolEngine(Engine, Protocol):
    """An Engine that others than its pool may give weights, and a pause."""

    async def vouch(self, within_s: float) -> None:
        """ForeignWeightsError if it says so soon that it has others than `info` names, which it may have drawn with."""
        ...

    async def close(self, *, keeps_pause: bool = False) -> None:
        """See Engine; a pause that is kept lasts meanwhile, and `open` finds it."""
        ...


class PoolMember:
    """An engine; `fault` is why it is left out, None while it is not."""

    def __init__(self, name: str, engine: PoolEngine) -> None:
        self.name, self.engine = name, engine
        self.fault: str | None = "it was not opened yet"
        self.mending: asyncio.Task[None] | None = None
        self.is_in_doubt = False
        """It failed, and is being asked whose weights it has: until that is known nothing that it drew goes on."""

    async def reopen(self, *, keeps_pause: bool) -> None:
        """End all that it draws, and begin anew.  EngineError."""
        await self.engine.close(keeps_pause=keeps_pause)
        await self.engine.open()

    async def stop_mending(self) -> None:
        """Nobody opens or closes it any more."""
        task, self.mending = self.mending, None
        self.is_in_doubt = False
        if task is not None:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


class PoolMembers(dict[str, PoolMember]):
    """All of a pool, by name."""

    @property
    def living(self) -> list[PoolMember]:
        """Those that draw."""
        return [each for each in self.values() if each.fault is None]

    @property
    def names(self) -> list[str]:
        """Of those."""
        return [each.name for each in self.living]

    @property
    def faults(self) -> dict[str, str]:
        """Those that are left out, and why."""
        return {name: each.fault for name, each in self.items() if each.fault is not None}

    @property
    def failure(self) -> str:
        """Why none of them draws; nothing while one does."""
        faults = {} if self.living else self.faults
        return "; ".join(f"{name}: {why.removeprefix(f'{name}: ')}" for name, why in faults.items())


class PoolRun:
    """A request, wherever it is drawn; of no session if it is a score."""

    def __init__(self, session: str | None) -> None:
        self.session = session
        self.member: PoolMember | None = None
        """Who draws it, and has handed tokens over."""
        self.end: EngineError | None = None
        """Why it is not to go on elsewhere."""


class PoolRuns(set[PoolRun]):
    """Those that there are."""

    def preempt(self, session: str | None) -> None:
        """End a session's, or all."""
        for run in self:
            if session in (None, run.session):
                run.end = run.end or PreemptedError("the request was preempted")

    async def settle(self, member: PoolMember, within_s: float) -> None:
        """Have what an engine drew go on, or end, as it says whose weights it has; whatever else it says is raised."""
        if not member.is_in_doubt:
            return
        try:
            await member.engine.vouch(within_s)
        except ForeignWeightsError as error:
            self.disown(member, error)
        finally:
            member.is_in_doubt = False

    def disown(self, member: PoolMember, error: ForeignWeightsError) -> None:
        """End all that have tokens of an engine whose weights are nobody knows whose."""
        for run in self:
            run.end = error if run.member is member else run.end


async def failures_of(
    members: Sequence[PoolMember], call: Callable[[PoolMember], Awaitable[object]]
) -> list[tuple[PoolMember, RolloutError]]:
    """Who cannot do it, and why, of those that try at once; what nobody foresaw is raised."""
    results = await asyncio.gather(*map(call, members), return_exceptions=True)
    for error in results:
        if isinstance(error, BaseException) and not isinstance(error, RolloutError):
            raise error
    return [(each, error) for each, error in zip(members, results, strict=True) if isinstance(error, RolloutError)]


async def open_all(members: Sequence[PoolMember], start_s_max: float) -> list[EngineError | None]:
    """Open each; what went wrong with it.  While nobody answers anywhere all are asked again, for so long at most."""
    until, told = time.monotonic() + start_s_max, ""
    while True:
        opened: list[EngineError | None] = []
        for error in await asyncio.gather(*(each.engine.open() for each in members), return_exceptions=True):
            if error is not None and not isinstance(error, EngineError):
                raise error
            opened.append(error)
        absent = [str(error) for error in opened if error is not None and error.is_absent]
        left_s = until - time.monotonic()
        if len(absent) < len(members) or left_s <= 0:
            return opened
        if (why := "; ".join(absent)) != told:
            _log.warning("no engine is there yet, asked again for %.0f s: %s", left_s, why)
            told = why
        await asyncio.sleep(AGAIN_S_MIN)


def joined(members: Sequence[PoolMember]) -> tuple[EngineInfo, Path | None]:
    """What engines have in common, with the newest of their weights, and where those are.  EngineError: they differ."""
    newest = max(members, key=lambda each: each.engine.info.policy_version)
    for each in members:
        if problem := difference(each.engine.info, newest.engine.info):
            raise EngineError(f"{each.name} and {newest.name} cannot be one pool: {problem}")
    shortest = min(each.engine.info.context_tokens_max for each in members)
    return msgspec.structs.replace(newest.engine.info, context_tokens_max=shortest), newest.engine.checkpoint


def difference(info: EngineInfo, other: EngineInfo, *, is_whole: bool = False) -> str:
    """Why two engines cannot draw the same rollouts, or nothing; `is_whole`: not even for a while."""
    names = ["build", "vocab_count", "routing", "hidden_dim"]
    if is_whole or info.policy_version == other.policy_version:
        names += ["policy_version", "weights_digest"]
    if is_whole and info.context_tokens_max < other.context_tokens_max:
        names.append("context_tokens_max")
    differing = [name for name in names if getattr(info, name) != getattr(other, name)]
    return "; ".join(f"{name} {getattr(info, name)!s}, not {getattr(other, name)!s}" for name in differing)
