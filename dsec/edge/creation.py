"""Making sandboxes: asked once, made once, or not at all.

The journal knows a request before the substrate does, and a tombstone stops it at whatever point it
has reached: before it came, while the substrate works, or when the sandbox is there already.  So a
client that cancels, or is killed, or comes back and asks again, finds one sandbox or none.

Invariants:
1. The same request id gives the same sandbox; with another request it is a DivergedError.
2. A create that fails leaves nothing, and its request id may be used again.
3. The sandboxes of a fork become ready in one record: all of them or none.
4. The layers that a sandbox is made of are held from when they are chosen until it is there.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import secrets
from collections.abc import Awaitable, Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

from msgspec import structs

from dsec.edge.admission import amounts_of
from dsec.edge.commands import check_spec
from dsec.edge.history import Outline
from dsec.edge.journal import Known, RequestCancelled, SandboxEnded, SandboxReady, SandboxRequested
from dsec.edge.leases import Leases, check_lease
from dsec.edge.live import LiveSandbox, check_size, check_text
from dsec.edge.registry import Registry
from dsec.errors import DivergedError, InvalidArgumentError, NotFoundError, StateError
from dsec.lifecycle import EndReason, Happening
from dsec.replay import first_difference
from dsec.sandbox import Hold, Layered, hold_nothing
from dsec.trajectory import CommandFinished, CommandStarted
from dsec.types import SandboxId, SandboxSpec
from dsec.views import CreateRequest, SandboxView
from wal import settled

REQUEST_ID_BYTES_MAX = 256
LABEL_BYTES_MAX = 256
CREATE_BYTES_MAX = 256 << 10
TIMEOUT_S_MAX = 365 * 86_400.0


@dataclass(frozen=True)
class Wish:
    """What is asked for under one request: so many sandboxes, and what they go on from."""

    request: CreateRequest
    spec: SandboxSpec
    count: int = 1
    origin: str = ""
    origin_key: str = ""

    def fits(self, known: Known) -> bool:
        """Whether the sandbox was made for this wish."""
        made = known.requested
        asked = (made.request, made.members_count, made.origin, made.origin_key)
        return asked == (self.request, self.count, self.origin, self.origin_key)


@dataclass(frozen=True)
class Ground:
    """What a sandbox is made of at last, and the commands that it must run again first."""

    spec: SandboxSpec
    past: tuple[Outline, ...] = ()


Prepare = Callable[[Hold], Awaitable[Ground]]


class Creation:
    """Creates, forks and branches of one Edge."""

    def __init__(self, registry: Registry, leases: Leases) -> None:
        self._registry = registry
        self._leases = leases
        substrate = registry.substrate
        self._layered = substrate if isinstance(substrate, Layered) else None  # asked once: a Protocol answers slowly
        self._under_way: dict[str, tuple[Wish, asyncio.Task[list[SandboxView]]]] = {}
        self._is_closed = False

    async def create(self, request: CreateRequest) -> SandboxView:
        """One fresh sandbox."""
        self._check(request)

        async def prepare(_hold: Hold) -> Ground:
            return Ground(await self._named(request.spec))

        return (await self._once(Wish(request, request.spec), prepare))[0]

    async def _named(self, spec: SandboxSpec) -> SandboxSpec:
        """With layers and defaults in place of names, which may stand for other images tomorrow.

        NotFoundError, InvalidArgumentError (together with what the images say it is too much).
        """
        if self._layered is None or not spec.layers:
            return spec
        made = await self._layered.composed(spec.layers)
        defaults = spec.defaults.over(made.defaults)
        named = structs.replace(spec, base=spec.base or made.base, layers=made.layers, defaults=defaults)
        if named != spec:
            check_size("the sandbox, with what its images say,", named, CREATE_BYTES_MAX)
            check_spec(named)
        return named

    async def fork(self, live: LiveSandbox, count: int, request: CreateRequest) -> list[SandboxView]:
        """`count` sandboxes that go on from what this one has written; all or none."""
        self._check(request)
        if not 1 <= count <= self._registry.config.forks_count_max:
            raise InvalidArgumentError(f"count {count} is not in [1, {self._registry.config.forks_count_max}]")
        spec = live.known.spec

        async def prepare(_hold: Hold) -> Ground:
            layer = await live.snapshot()
            return Ground(structs.replace(spec, layers=(layer, *spec.layers)))

        return await self._once(Wish(request, spec, count, origin=live.known.id), prepare)

    async def branch(self, known: Known, key: str, request: CreateRequest) -> SandboxView:
        """A sandbox in the state after command `key` of this one, which may have ended.

        From the newest snapshot before it that is still there, by a compared replay of the commands since.
        NotFoundError (the key), StateError (those commands overlapped, or one has no known end), DivergedError.
        """
        self._check(request)
        spec = known.spec

        async def prepare(hold: Hold) -> Ground:
            past = await self._registry.history.past(known, key)
            for snapshot in past.snapshots:
                layers = (snapshot.layer, *spec.layers)
                try:
                    await hold(layers)
                except NotFoundError:  # it made room for others
                    continue
                return Ground(structs.replace(spec, layers=layers), past.since(snapshot.after or 0))
            return Ground(spec, past.since(0))

        return (await self._once(Wish(request, spec, origin=known.id, origin_key=key), prepare))[0]

    async def cancel(self, request_id: str) -> None:
        """Whatever was, is being or will be made under this id shall not be; done when nothing of it is left."""
        check_text("request_id", request_id, REQUEST_ID_BYTES_MAX)
        registry = self._registry
        if request_id not in registry.ledger.cancelled:
            await registry.log.append(RequestCancelled(request_id, registry.now()))
        if request_id in self._under_way:
            task = self._under_way[request_id][1]
            task.cancel()
            await asyncio.wait([task])
        made = [registry.live.get(sandbox_id) for sandbox_id in registry.ledger.requests.get(request_id, ())]
        ends = [registry.end(live, EndReason.CANCELLED) for live in made if live is not None]
        await asyncio.gather(*map(asyncio.shield, ends))

    async def close(self) -> None:
        """Make nothing more, and drop what is being made."""
        self._is_closed = True
        tasks = [task for _, task in self._under_way.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _once(self, wish: Wish, prepare: Prepare) -> list[SandboxView]:
        """Fulfil a wish; the same request id asks for the same sandboxes, also while they are being made."""
        ledger, request_id = self._registry.ledger, wish.request.request_id
        name = request_id or f"anonymous {secrets.token_hex(8)}"
        if request_id in ledger.cancelled:
            raise StateError(f"request {request_id!r} was cancelled")
        under_way = self._under_way.get(name)
        if under_way is None and request_id in ledger.requests:
            made = [ledger.sandboxes[sandbox_id] for sandbox_id in ledger.requests[request_id]]
            if not all(map(wish.fits, made)):
                raise DivergedError(f"request id {request_id!r} was used for another request")
            return [self._registry.view(known) for known in made]
        if under_way is None:
            if self._is_closed:
                raise StateError("the Edge is closing")
            task = self._registry.spawn(self._make(wish, prepare), f"create {name}")
            task.add_done_callback(lambda _: self._under_way.pop(name))
            under_way = self._under_way[name] = (wish, task)
        if under_way[0] != wish:
            raise DivergedError(f"request id {request_id!r} was used for another request")
        try:
            return await asyncio.shield(under_way[1])
        except asyncio.CancelledError:
            caller = asyncio.current_task()
            if under_way[1].cancelled() and caller is not None and not caller.cancelling():
                raise StateError(f"request {request_id!r} was cancelled, or the Edge is closing") from None
            if not request_id:
                self._undo(under_way[1])
            raise

    def _undo(self, making: asyncio.Task[list[SandboxView]]) -> None:
        """Leave nothing of what nobody could ever ask for; it may be there since this very turn of the loop."""
        making.cancel()
        if making.done() and not making.cancelled() and making.exception() is None:
            for view in making.result():
                if (live := self._registry.live.get(view.id)) is not None:
                    self._registry.end(live, EndReason.CANCELLED, "who asked for it went away")

    def _holding(self) -> AbstractContextManager[Hold]:
        return contextlib.nullcontext(hold_nothing) if self._layered is None else self._layered.holding()

    async def _make(self, wish: Wish, prepare: Prepare) -> list[SandboxView]:
        registry = self._registry
        self._leases.require(wish.request.owner, wish.request.epoch)
        asked = amounts_of(wish.spec, wish.count)
        await registry.admission.enter(asked)
        with self._holding() as hold:
            try:
                ground = await prepare(hold)
                await hold(ground.spec.layers)
            except BaseException:
                registry.admission.leave(asked)
                raise
            made = await self._make_on(wish, ground)
        for live in made:
            registry.watch(live)
        return [registry.view(live.known) for live in made]

    async def _make_on(self, wish: Wish, ground: Ground) -> list[LiveSandbox]:
        """All of them, ready, or none; their layers are held, and the promise was made."""
        registry = self._registry
        births = [registry.spawn(self._bear(wish, ground.spec), "birth") for _ in range(wish.count)]
        try:
            made: list[LiveSandbox] = await asyncio.gather(*births)
            for outline in ground.past:
                await self._replay(made[0], outline)
            self._leases.require(wish.request.owner, wish.request.epoch)
            ids = tuple(live.known.id for live in made)
            await registry.log.append(SandboxReady(ids, registry.now()), is_refusable=True)
            self._leases.require(wish.request.owner, wish.request.epoch)  # it may have lapsed meanwhile
            for live in made:
                live.require(Happening.USE)  # or it may have died
        except BaseException as error:
            await settled(self._unmake(wish, births, error))
            raise
        return made

    async def _bear(self, wish: Wish, spec: SandboxSpec) -> LiveSandbox:
        """One sandbox, not yet ready; on any failure nothing of it is left but the promise."""
        registry = self._registry
        sandbox_id = SandboxId(f"{registry.config.id_prefix}{secrets.token_hex(8)}")
        requested = SandboxRequested(
            sandbox_id=sandbox_id,
            request=wish.request,
            spec=spec,
            at_s=registry.now(),
            members_count=wish.count,
            origin=wish.origin,
            origin_key=wish.origin_key,
        )
        try:
            await settled(registry.log.append(requested, is_refusable=True))
            sandbox = await registry.substrate.create(spec, sandbox_id)
        except BaseException as error:
            if sandbox_id in registry.ledger.sandboxes:
                ended = SandboxEnded(sandbox_id, self._reason(wish), registry.now(), str(error)[:1000])
                await settled(registry.log.append(ended))
            raise
        return registry.adopt(registry.ledger.sandboxes[sandbox_id], sandbox, amounts_of(wish.spec))

    async def _replay(self, live: LiveSandbox, outline: Outline) -> None:
        """Run a command of the past again and compare.  DivergedError."""
        history = self._registry.history
        started, finished = await history.record(outline.started_lsn), await history.record(outline.finished_lsn)
        if not (isinstance(started, CommandStarted) and isinstance(finished, CommandFinished)):
            raise DivergedError(f"the journal does not hold command {outline.key!r} where it was")
        if started.command.keep_stdin_open or started.command.tty is not None:
            raise StateError(f"command {outline.key!r} read from its client: it cannot be run again")
        again = await live.durable.exec(outline.key, started.command, outline.number)
        if (difference := first_difference(finished.result, again)) is not None:
            raise DivergedError(f"replay of {outline.key!r} differs from the log: {difference}")

    async def _unmake(self, wish: Wish, births: list[asyncio.Task[LiveSandbox]], error: BaseException) -> None:
        for birth in births:
            birth.cancel()
        born = [live for live in await asyncio.gather(*births, return_exceptions=True) if isinstance(live, LiveSandbox)]
        self._registry.admission.leave(amounts_of(wish.spec, wish.count - len(born)))
        ends = [self._registry.end(live, self._reason(wish), str(error)) for live in born]
        await asyncio.gather(*map(asyncio.shield, ends))

    def _reason(self, wish: Wish) -> EndReason:
        if wish.request.request_id in self._registry.ledger.cancelled:
            return EndReason.CANCELLED
        return EndReason.FAILED

    def _check(self, request: CreateRequest) -> None:
        """InvalidArgumentError if nothing can be made of this."""
        config = self._registry.config
        check_size("the request", request, CREATE_BYTES_MAX)
        check_spec(request.spec)
        if request.request_id:
            check_text("request_id", request.request_id, REQUEST_ID_BYTES_MAX)
        if request.owner or request.epoch:
            check_lease(request.owner, request.epoch)
        if len(request.labels) > config.labels_count_max:
            raise InvalidArgumentError(f"{len(request.labels)} labels, more than {config.labels_count_max}")
        for name, value in request.labels.items():
            check_text("a label's name", name, LABEL_BYTES_MAX)
            if value:
                check_text(f"label {name}", value, LABEL_BYTES_MAX)
        for what, span_s in (("idle_timeout_s", request.idle_timeout_s), ("lifetime_s", request.lifetime_s)):
            if span_s is not None and not (math.isfinite(span_s) and 0 < span_s <= TIMEOUT_S_MAX):
                raise InvalidArgumentError(f"{what} {span_s} is not in (0, {TIMEOUT_S_MAX}]")
