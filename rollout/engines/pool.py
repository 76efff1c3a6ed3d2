"""Several engines as one: a session stays where its prefix is, and goes on elsewhere when its engine fails.

An engine that breaks the port or goes silent is left out: it is asked whether its weights are still the pool's, closed
(what runs there goes on elsewhere, from the prompt and what was drawn), opened again after a while, brought to the
others' weights, and only then taken back.  So one that missed an update, or came back with others, draws nothing.

Invariants:
1. Who draws has the weights of `info`, or, during an update, those before it.
2. No token is handed over twice, and none that an engine drew after its failure.

See: docs/adr/0027-engines-over-http.md.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing
from pathlib import Path
from typing import Any, Literal

import msgspec

from rollout.engine import (
    Announce,
    Engine,
    EngineInfo,
    PauseMode,
    Sampled,
    SampleRequest,
    Scored,
    check_request,
    check_version,
)
from rollout.engines.guard import guarded
from rollout.engines.homes import Homes
from rollout.engines.members import (
    AGAIN_S_MIN,
    PoolEngine,
    PoolMember,
    PoolMembers,
    PoolRun,
    PoolRuns,
    difference,
    failures_of,
    joined,
    open_all,
)
from rollout.errors import EngineError, ForeignWeightsError, PreemptedError, RolloutError

FAILURES_MAX = 3
"""How many engines in a row may be left out for a request before it gets a token."""
AGAIN_S_MAX = 30.0
_log = logging.getLogger(__name__)


class EnginePool:
    """An Engine over one or more, by name; see the port for what its methods promise."""

    def __init__(self, engines: Mapping[str, PoolEngine], silence_s_max: float, start_s_max: float = 0.0) -> None:
        """Who says nothing for so long, and is not paused, has failed; `open` waits so long for a first to be there."""
        self._members = PoolMembers({name: PoolMember(name, engine) for name, engine in engines.items()})
        self._silence_s_max, self._start_s_max = silence_s_max, start_s_max
        self._info: EngineInfo | None = None
        self._is_open = False
        self._paused: PauseMode | None = None
        self.checkpoint: Path | None = None
        """See Engine."""
        self._updates = asyncio.Lock()
        self._homes = Homes()
        self._pinned: set[str] = set()
        self._runs = PoolRuns()
        self._changed = asyncio.Event()

    @property
    def info(self) -> EngineInfo:
        """What they have in common, and the shortest of their contexts."""
        if self._info is None:
            raise EngineError("no engine of the pool was ever open")
        return self._info

    @property
    def is_paused(self) -> bool:
        """See Engine."""
        return self._paused is not None or any(each.engine.is_paused for each in self._members.living)

    @property
    def failure(self) -> str:
        """See Engine; nothing while one of them draws."""
        return self._members.failure

    @property
    def faults(self) -> dict[str, str]:
        """The engines that are left out, and why."""
        return self._members.faults

    async def open(self) -> None:
        """Open all; some may follow later.  EngineError: none opens, or two of them can never be one."""
        if self._is_open:
            raise EngineError("the pool is already open")
        members = list(self._members.values())
        try:
            opened = await open_all(members, self._start_s_max)
            found = [each for each, error in zip(members, opened, strict=True) if error is None]
            if not found:
                raise min((error for error in opened if error is not None), key=lambda one: one.is_absent)
            self._info, self.checkpoint = joined(found)
        except BaseException:
            await asyncio.gather(*(each.engine.close() for each in members))
            raise
        self._is_open = True
        for each, error in zip(members, opened, strict=True):
            each.fault = None
            if error is not None:
                self._leave_out(each, error)
            elif each.engine.info.policy_version < self._info.policy_version:
                self._leave_out(each, EngineError("its weights are older than the others'"))

    async def sample(self, request: SampleRequest) -> AsyncGenerator[Sampled, None]:
        """See Engine; on another engine where one fails."""
        check_request(request, self.info)
        run = PoolRun(request.session)
        self._runs.add(run)
        room = min(request.tokens_count_max, self.info.context_tokens_max - len(request.token_ids))
        drawn: list[int] = []
        failures_count = 0
        try:
            while True:
                await self._until(lambda: self._may_go_on(run))
                self._check(run)
                run.member = None
                member, is_moved = self._home(request)
                is_rest = bool(drawn)  # what is cached of that, is not of the prompt alone
                rest = msgspec.structs.replace(
                    request, token_ids=request.token_ids + tuple(drawn), tokens_count_max=room - len(drawn)
                )
                try:
                    async with aclosing(guarded(member.engine, rest, self._silence_s_max)) as chunks:
                        async for chunk in chunks:
                            if member.fault is not None:
                                raise EngineError(f"{member.name} is left out: {member.fault}")
                            if chunk.cached_tokens_count and is_rest:
                                chunk = msgspec.structs.replace(chunk, cached_tokens_count=0)  # noqa: PLW2901
                            run.member = member
                            drawn += chunk.token_ids
                            failures_count = 0
                            yield msgspec.structs.replace(chunk, kv=chunk.kv or "rebuilt") if is_moved else chunk
                            is_moved = False
                            if chunk.finish:
                                return
                except PreemptedError:
                    raise
                except EngineError as error:
                    failures_count += self._leave_out(member, error)
                    if failures_count >= FAILURES_MAX:
                        raise
        finally:
            self._runs.discard(run)

    async def score(
        self, token_ids: Sequence[int], *, top_logprobs_count: int = 0, returns_hidden: bool = False
    ) -> Scored:
        """See Engine."""
        run = PoolRun(None)
        self._runs.add(run)
        failures_count = 0
        try:
            while True:
                await self._until(lambda: self._may_go_on(run))
                self._check(run)
                member = self._members[self._homes.least_loaded(self._members.names)]
                try:
                    return await member.engine.score(
                        token_ids, top_logprobs_count=top_logprobs_count, returns_hidden=returns_hidden
                    )
                except PreemptedError:
                    raise
                except EngineError as error:
                    failures_count += self._leave_out(member, error)
                    if failures_count >= FAILURES_MAX:
                        raise
        finally:
            self._runs.discard(run)

    async def preempt(self, session: str) -> None:
        """See Engine."""
        self._runs.preempt(session)
        self._changed.set()
        if (home := self._homes.of(session)) is not None:
            await self._members[home].engine.preempt(session)

    async def release(self, session: str) -> None:
        """See Engine."""
        self._pinned.discard(session)
        if (home := self._homes.release(session)) is not None:
            await self._members[home].engine.release(session)

    async def pause(self, mode: PauseMode) -> None:
        """See Engine; one that cannot be paused is left out, and one that comes back is paused first.

        What has not begun at an engine waits here, with it the rest of an answer whose engine fails meanwhile: an
        engine in "wait" has nothing but what it is to finish.
        """
        self._check()
        before, self._paused = self._paused, mode
        if mode == "abort":
            self._runs.preempt(None)
            self._changed.set()
        try:
            await self._for_all(lambda engine: engine.pause(mode))
        except BaseException:
            self._paused = before
            self._changed.set()
            raise

    async def resume(self) -> None:
        """See Engine."""
        self._paused = None
        self._changed.set()
        await self._for_all(lambda engine: engine.resume())

    async def _for_all(self, call: Callable[[Engine], Any]) -> None:
        """Leave out whoever cannot do it.  EngineError if nobody is left."""
        failed = await failures_of(self._members.living, lambda each: call(each.engine))
        for each, error in failed:
            self._leave_out(each, error)
        if failed and not self._members.living:
            raise EngineError("; ".join(f"{each.name}: {error}" for each, error in failed))

    async def update(self, checkpoint: Path, policy_version: int, announce: Announce | None = None) -> EngineInfo:
        """See Engine: one engine first, then, what that loaded being certain, all others at once.

        Who fails while others have the new weights is left out until it has them.
        """
        async with self._updates:
            self._check()
            if policy_version != self.info.policy_version:  # else its engine says whether it is the last again
                check_version(self.info, policy_version)
                if self._pinned:
                    raise EngineError(f"{len(self._pinned)} sessions pin the weights of this pool: release them first")
            await self._update_first(checkpoint, policy_version, announce)
            behind = [each for each in self._members.living if each.engine.info.policy_version != policy_version]
            for each, error in await failures_of(behind, self._bring_up):
                self._leave_out(each, error)
            return self.info

    async def _update_first(self, checkpoint: Path, policy_version: int, announce: Announce | None) -> None:
        """Have one engine draw with the new weights: the first that can.  EngineError: none can; nothing changed."""
        refused: list[BaseException] = []
        said: list[EngineInfo] = []

        async def say(info: EngineInfo) -> None:
            said.append(info)
            try:
                if announce is not None:
                    await announce(self._common(info))
            except BaseException as error:
                refused.append(error)
                raise

        first: RolloutError | None = None
        for each in sorted(self._members.values(), key=lambda each: each.fault is not None):
            try:
                if each.fault is not None:  # all are out: by somebody else, they may have these weights already
                    await self._settle(each)
                    await each.stop_mending()
                    await each.reopen(keeps_pause=self._paused is not None)
                changed = self._common(await each.engine.update(checkpoint, policy_version, say))
                if changed != self.info and not said:  # it had them when it was opened; here nobody knows them yet
                    await say(changed)
                self._info, self.checkpoint = changed, checkpoint
                if each.fault is not None and each.mending is None:  # else it failed meanwhile, and is opened anew
                    await self._take_back(each)
                return
            except BaseException as error:
                if each.fault is not None and each.mending is None and self._is_open:
                    each.mending = asyncio.create_task(self._mend(each))
                if refused or not isinstance(error, RolloutError):
                    raise
                first = first or error
        raise first or EngineError("there is no engine")

    def _common(self, info: EngineInfo) -> EngineInfo:
        """What the pool says of itself when its engines are so."""
        return msgspec.structs.replace(info, name=self.info.name, context_tokens_max=self.info.context_tokens_max)

    async def _bring_up(self, member: PoolMember) -> None:
        """Have an engine draw with the weights of the others.  EngineError."""

        async def compare(found: EngineInfo) -> None:
            if found.weights_digest != self.info.weights_digest:
                raise EngineError(f"{self.checkpoint} holds other weights for it than for the others")

        if member.engine.info.policy_version < self.info.policy_version and self.checkpoint is not None:
            await member.engine.update(self.checkpoint, self.info.policy_version, compare)

    async def save(self, session: str, path: Path) -> int:
        """See Engine."""
        home = self._homes.of(session)
        return await self._members[home].engine.save(session, path) if home in self._members.names else 0

    async def restore(self, session: str, path: Path) -> int:
        """See Engine; on the least loaded engine."""
        if not self._members.living:
            return 0
        home = self._homes.least_loaded(self._members.names)
        count = await self._members[home].engine.restore(session, path)
        if count:
            self._homes.settle(session, home)
        return count

    async def close(self) -> None:
        """See Engine."""
        self._is_open = False
        self._paused = None
        members = self._members.values()
        await asyncio.gather(*(each.stop_mending() for each in members))
        await asyncio.gather(*(each.engine.close() for each in members))
        for each in members:
            each.fault = "the pool is closed"
        self._homes.clear()
        self._pinned.clear()
        self._changed.set()

    def _home(self, request: SampleRequest) -> tuple[PoolMember, bool]:
        """The engine for a request, and whether its session was on another one before."""
        session = request.session
        (self._pinned.add if request.on_update == "pin" else self._pinned.discard)(session)
        before = self._homes.of(session)
        home = self._homes.choose(session, request.token_ids, self._members.names)
        return self._members[home], before not in (None, home)

    def _leave_out(self, member: PoolMember, error: RolloutError) -> bool:
        """Until it is mended; False if it is out already: then it was closed for what another met."""
        if isinstance(error, ForeignWeightsError):
            self._runs.disown(member, error)
        if not self._is_open or member.fault is not None:
            return False
        _log.warning("engine %s is left out: %s", member.name, error)
        member.fault, member.is_in_doubt = str(error), True
        member.mending = asyncio.create_task(self._mend(member))
        return True

    async def _mend(self, member: PoolMember) -> None:
        again_s = AGAIN_S_MIN
        await self._settle(member)
        async with self._updates:  # one that loads is let do so
            await member.engine.close(keeps_pause=self._paused is not None)
        while True:
            await asyncio.sleep(again_s)
            again_s = min(2 * again_s, AGAIN_S_MAX)
            try:
                await member.reopen(keeps_pause=self._paused is not None)
                async with self._updates:
                    await self._bring_up(member)
                    if problem := difference(member.engine.info, self.info, is_whole=True):
                        raise EngineError(problem)
                    await self._take_back(member)
                _log.warning("engine %s is back", member.name)
                return
            except Exception as error:  # whatever it is: who is not asked again stays out for good
                is_known = isinstance(error, RolloutError)
                fault = str(error) if is_known else f"{type(error).__name__}: {error}"
                if member.fault != fault:
                    _log.warning("engine %s stays out: %s", member.name, fault, exc_info=None if is_known else error)
                member.fault = fault

    async def _settle(self, member: PoolMember) -> None:
        try:
            await self._runs.settle(member, self._silence_s_max / 4)  # others wait for this, and not for long
        except Exception:  # whatever it is: who is not mended because of it stays out for good
            _log.warning("engine %s: it cannot be asked for its weights", member.name, exc_info=True)
        self._changed.set()

    async def _take_back(self, member: PoolMember) -> None:
        """Let it draw again, paused if the pool is, whatever that becomes meanwhile.  EngineError."""
        mode: PauseMode | Literal["unknown"] | None = "unknown"
        while mode != self._paused:
            mode = self._paused
            await (member.engine.pause(mode) if mode else member.engine.resume())
        member.fault = member.mending = None  # nothing may be awaited before
        self._changed.set()

    def _may_go_on(self, run: PoolRun) -> bool:
        """At some engine, or to its end."""
        is_in_doubt = run.member is not None and run.member.is_in_doubt
        return not is_in_doubt and (run.end is not None or (bool(self._members.living) and self._paused is None))

    def _check(self, run: PoolRun | None = None) -> None:
        if not self._is_open:
            raise EngineError("the pool is closed")
        if run is not None and run.end is not None:
            raise run.end

    async def _until(self, holds: Callable[[], bool]) -> None:
        while not holds() and self._is_open:
            self._changed.clear()
            await self._changed.wait()
