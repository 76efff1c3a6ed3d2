"""A worker: the partitions that this process owns under a root, each with a service of its own over one engine.

It holds a lease in the index, opens what the index gives it, and lets go of what the index gives to others. While the
index is out of reach it works on as long as its lease certainly lasts, then stops its rollouts where they are; it
goes on when the index answers again. A directory that is served alone is a root with one partition, itself.

Invariants:
1. A partition's log is opened with the epoch that the index gave with it, so whoever owned it before can acknowledge
   nothing more (docs/formats/wal.md, "One writer"), whatever that process believes.
2. What is handed over keeps its sandboxes; what ends because nobody else is there leaves none.

See: rollout/workers/leases.py for the rules, docs/architecture.md, "Workers".
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
import uuid
from collections.abc import Coroutine
from contextlib import AsyncExitStack, suppress
from pathlib import Path
from typing import NamedTuple

import wal
from dsec.errors import StateError, UnreachableError
from dsec.sandbox import Substrate
from rollout.config import WorkerConfig
from rollout.errors import ConflictError, EngineError, RequestError, ResultsError, RolloutError, ShardError
from rollout.events import Event
from rollout.jobs import REQUEST_ID
from rollout.policy import catch_up
from rollout.service import RolloutService
from rollout.workers.index import Index, Partition, Snapshot
from rollout.workers.leases import Lease, plan
from rollout.workers.news import News
from rollout.workers.partitions import Parts, copy_log, find_logs, hold_name, newest_epoch

ALONE = "."
"""The partition of a directory that is served alone: the directory itself."""
_LOOK_S_MAX = 1.0
_MARGIN = 0.1
"""Of a lease, before whose end rollouts stop."""
AGAIN_S = 60.0
"""A partition whose weights, or shards, are not there is looked at again after so long: they, or newer ones, may be."""
_log = logging.getLogger(__name__)


class Owned:
    """A partition that this process owns."""

    def __init__(self, partition: Partition, service: RolloutService) -> None:
        self.name, self.epoch = partition.name, partition.epoch
        self.service = service
        self.watching: asyncio.Task[None] | None = None


class Place(NamedTuple):
    """Where a partition is: with a service of this process, or at another worker's address."""

    partition: str
    service: RolloutService | None = None
    address: str = ""


class Worker:
    """One worker process."""

    def __init__(
        self, root: Path, index: Index, parts: Parts, config: WorkerConfig, worker_id: str, *, is_alone: bool = False
    ) -> None:
        """`is_alone`: the root is one partition and has no other worker.  Nothing is opened yet."""
        self.root, self.worker_id = root, worker_id
        self.owner = f"{worker_id}#{uuid.uuid4().hex[:12]}"
        self.owned: dict[str, Owned] = {}
        self.snapshot = Snapshot((), ())
        self._index, self._parts, self._config = index, parts, config
        self.is_alone, self._address = is_alone, ""
        self._lease = Lease(config.lease_ttl_s)
        self.news = News(index)
        self._failed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._resources = AsyncExitStack()
        self._refused: dict[str, float] = {}
        """Partitions that cannot be opened here, and until when they are not tried again."""
        self._closing: set[str] = set()
        self._looked = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []

    async def open(self, address: str) -> None:
        """Begin a lease, and own a partition when this returns; `address` is where other workers reach this one.

        Raises RequestError (the root cannot be, the worker id is in use), UnreachableError (the index), EngineError,
        and what opening the first partition raises.
        """
        self._address = address
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            self._resources.callback(hold_name(self.root, self.worker_id, is_alone=self.is_alone).close)
        except OSError as error:
            raise RequestError(f"cannot use {self.root}: {error.strerror}; choose another, or mend that") from error
        try:
            await self._index.open()
            self._resources.push_async_callback(self._index.close)
            await self._discover()
            await self._parts.open()
            self._resources.push_async_callback(self._parts.engine.close)
            asked_at = _now()
            await self._index.join(self.owner, self.worker_id, address, self._lease.ttl_s)
            self._lease.renewed(asked_at)
            self._begin(self._keep_lease())
            while not self.owned:
                if not await self._turn():
                    await asyncio.sleep(self._look_s)
        except BaseException:
            await self.close()
            raise
        self._begin(self._keep())
        self._begin(self._watch_lease())

    async def failed(self) -> None:
        """Wait until something stops the whole worker (a disk, a bug), and raise it."""
        await asyncio.shield(self._failed)

    async def close(self) -> bool:
        """Stop rollouts at a token boundary and give everything back; False if that was not done in `grace_s`.

        With another worker there its partitions are handed over, sandboxes and all; else their sandboxes end.
        """
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        try:
            async with asyncio.timeout(self._config.grace_s):
                is_needed = await self._has_successor()
                await asyncio.gather(*(self._close(each, hands_over=is_needed) for each in list(self.owned.values())))
                is_in_order = True
        except TimeoutError:
            is_in_order = False  # what is still open is fenced by whoever takes it
        with suppress(UnreachableError):
            if self._lease.left_s(_now()) > float("-inf"):
                await self.news.tell(self.news.rows_count)
                await self._index.leave(self.owner)
        if is_in_order:
            await self._resources.aclose()
        if self._failed.done():
            self._failed.exception()
        return is_in_order

    @property
    def running_count(self) -> int:
        """Rollouts that are queued or running."""
        return sum(each.service.running_count for each in self.owned.values())

    async def locate(self, request_id: str, *, creates: bool, beside: str = "") -> RolloutService | str:
        """As `place_of`, or `place_beside` that other request; the service, or the address."""
        finding = self.place_beside(request_id, beside) if beside else self.place_of(request_id, creates=creates)
        place = await finding
        return place.service or place.address

    async def place_of(self, request_id: str, *, creates: bool = False) -> Place:
        """Who has a job; `creates`: it may be a new one.  UnreachableError if nobody has it now.

        What no log has is for this worker to refuse.
        """
        for each in self.owned.values():
            if request_id in each.service.ledger.jobs:
                return Place(each.name, each.service)
        home = self._home()
        if self.is_alone or not REQUEST_ID.fullmatch(request_id):
            return Place(home.name, home.service)
        name = await self._index.partition_of(request_id)
        if name is None and creates:
            name = await self._index.place(request_id, home.name)
        return await self.find(name or home.name)

    async def place_beside(self, request_id: str, other_id: str) -> Place:
        """Where a job is, and one that asks about it shall be.  UnreachableError, ConflictError (it is elsewhere)."""
        place = await self.place_of(other_id)
        if self.is_alone or not REQUEST_ID.fullmatch(request_id):  # which is refused there
            return place
        is_here = place.service and other_id in place.service.ledger.jobs
        if not (is_here or await self._index.partition_of(other_id)):  # it was forgotten, or never was
            return await self.place_of(request_id)
        if await self._index.place(request_id, place.partition) != place.partition:
            raise ConflictError(f"request {request_id!r} was submitted before, and is in another log of the root")
        return place

    async def find(self, partition: str) -> Place:
        """Who owns a partition.  UnreachableError if nobody does now."""
        if partition in self.owned:
            return Place(partition, self.owned[partition].service)
        snapshot = await self._index.snapshot()
        owner = next((each.owner for each in snapshot.partitions if each.name == partition), None)
        worker = snapshot.living().get(owner or "")
        if worker is None or worker.owner == self.owner:
            raise UnreachableError(f"nobody owns partition {partition} now, where this request belongs: ask again")
        return Place(partition, address=worker.address)

    async def until_moved(self, place: Place) -> None:
        """Wait until the index says that a partition is no longer at that address: who was there may be frozen."""
        while True:
            await self._looked.wait()
            living = self.snapshot.living()
            owners = {each.name: living.get(each.owner or "") for each in self.snapshot.partitions}
            if (owner := owners.get(place.partition)) is None or owner.address != place.address:
                return

    async def places(self) -> list[Place]:
        """Every partition that somebody owns.  UnreachableError, also if one is just being opened."""
        snapshot = await self._index.snapshot()
        owned = [each.name for each in snapshot.partitions if each.owner in snapshot.living()]
        return [await self.find(name) for name in owned] or [await self.place_of("")]

    async def partitions(self) -> list[str]:
        """The names of all partitions of the root, in order."""
        return [ALONE] if self.is_alone else [each.name for each in (await self._index.snapshot()).partitions]

    def _home(self) -> Owned:
        """Where new jobs go, and calls about nothing in particular."""
        if not self.owned:
            raise UnreachableError(f"worker {self.worker_id} owns no partition now: ask again, or another worker")
        return min(self.owned.values(), key=lambda each: (each.service.running_count, each.name))

    @property
    def _look_s(self) -> float:
        return min(_LOOK_S_MAX, self._lease.renew_every_s)

    async def _keep(self) -> None:
        """Renew, and act by what the index says, until cancelled."""
        while True:
            try:
                has_more = await self._turn()
            except UnreachableError as error:
                has_more = False
                _log.warning("%s", error)
            if not has_more:
                await asyncio.sleep(self._look_s)

    async def _turn(self) -> bool:
        """One look at the index, and what follows from it; True if the next one should follow at once."""
        await self._renew()
        self.snapshot = await self._index.snapshot()
        self._looked.set()
        self._looked.clear()  # whoever waits looks once
        held = {each.name: (each.epoch, each.service.running_count) for each in self.owned.values()}
        refused = {name for name, until in self._refused.items() if _now() < until}
        todo = plan(self.owner, self.snapshot.without(refused), held)
        for name in todo.lose:
            if (lost := self.owned.get(name)) is not None:
                await self._close(lost, hands_over=True)
        for partition in todo.open:
            if partition.name not in self._closing:  # its log is not free yet
                await self._open(partition)
        if (given := self.owned.get(todo.release or "")) is not None:
            await self._close(given, hands_over=True)
            await self._index.release(self.owner, given.name)
        if todo.creates:
            await self._index.add_partition(ALONE if self.is_alone else f"p-{uuid.uuid4().hex[:12]}", 0)
        has_claimed = todo.claim is not None and await self._index.claim(self.owner, todo.claim)
        await self.news.tell()
        return has_claimed or todo.creates

    async def _renew(self) -> None:
        now = _now()
        if not self._lease.is_due(now):
            return
        if not await self._index.renew(self.owner, self._lease.ttl_s, self.running_count):
            workers = (await self._index.snapshot()).living().values()  # with ourselves, if the other task joined first
            if any(each.worker_id == self.worker_id and each.owner != self.owner for each in workers):
                raise RequestError(
                    f"another process is worker {self.worker_id!r} now: give each a --worker-id of its own"
                )
            await self._discover()  # the index may have been emptied
            await self._index.join(self.owner, self.worker_id, self._address, self._lease.ttl_s)
        self._lease.renewed(now)

    async def _keep_lease(self) -> None:
        """Renew, whatever a turn is busy with: opening a large log takes longer than a lease."""
        while True:
            with suppress(UnreachableError):  # a turn says so
                await self._renew()
            await asyncio.sleep(self._look_s)

    async def _watch_lease(self) -> None:
        """Stop rollouts where they are before others may have them; what stays ours is opened again by a turn."""
        while True:
            left_s = self._lease.left_s(_now()) - self._lease.ttl_s * _MARGIN
            if left_s <= 0 and self.owned:
                _log.warning("worker %s: its lease ends, and the index does not answer", self.worker_id)
                await asyncio.gather(*(self._close(each, hands_over=True) for each in list(self.owned.values())))
            await asyncio.sleep(max(left_s, self._look_s))

    async def _open(self, partition: Partition) -> None:
        """Take its log, adopt what lives of its sandboxes, take up its rollouts."""
        directory = self.root / partition.name
        try:
            await self._parts.follow(self._index)
            service = await self._start(partition, directory, self._parts.substrate(directory, 0))
        except StateError:  # who owned it is frozen, and its Edge with it: another Edge, and a replay
            service = await self._start(partition, directory, self._parts.substrate(directory, partition.epoch))
        except wal.FencedError as error:  # the index is behind the log: an old copy of it came back
            await self._index.release(self.owner, partition.name)
            await self._index.add_partition(partition.name, error.newest_epoch)
            return
        except (wal.CorruptError, wal.VersionError, RolloutError) as error:
            if self.is_alone:
                raise
            _log.error("worker %s cannot open partition %s: %s", self.worker_id, partition.name, error)
            is_for_good = not isinstance(error, EngineError | ShardError | ResultsError)
            self._refused[partition.name] = math.inf if is_for_good else _now() + AGAIN_S
            await self._index.release(self.owner, partition.name)  # another may, with another build or weights
            return
        owned = self.owned[partition.name] = Owned(partition, service)
        owned.watching = asyncio.create_task(self._watch(owned))
        self.news.add(partition.name, service.ledger, ())
        for other in list(self.owned.values()):
            await catch_up(other.service)  # this log may have brought newer weights along
        self.news.add(partition.name, service.ledger, await self._index.requests_of(partition.name))

    async def _start(self, partition: Partition, directory: Path, substrate: Substrate) -> RolloutService:
        def observe(event: Event) -> None:
            self.news.observe(partition.name, service.ledger, event)

        service = self._parts.service(directory, substrate, partition.epoch, observe)
        await service.__aenter__()
        try:
            await self._parts.lent.tell(service)
            await service.start()
            await self._parts.lent.tell(service)
        except BaseException:
            await service.__aexit__()
            raise
        return service

    async def _watch(self, owned: Owned) -> None:
        failure = asyncio.ensure_future(owned.service.failed())
        try:
            await asyncio.wait([failure])
        finally:
            failure.cancel()
        error = failure.exception()
        if isinstance(getattr(error, "cause", error), wal.FencedError):
            _log.warning("worker %s lost partition %s: %s", self.worker_id, owned.name, error)
            await self._close(owned, hands_over=True)
        elif error is not None:
            self._fail(error)

    async def _close(self, owned: Owned, *, hands_over: bool) -> None:
        """Let go of a partition in this process; the index is not told."""
        if self.owned.pop(owned.name, None) is None:
            return
        if owned.watching is not None and owned.watching is not asyncio.current_task():
            owned.watching.cancel()
        self._closing.add(owned.name)
        is_taken = newest_epoch(self.root / owned.name / "wal") > owned.epoch
        try:
            if hands_over and not is_taken:
                await owned.service.hand_over(f"worker {self.worker_id} lets go of it")
            elif hands_over and self._parts.has_served_edge:  # else it is in an Edge that its successor does not have
                await owned.service.hand_over()
        except wal.WalError as error:
            _log.warning("partition %s: %s", owned.name, error)
        finally:
            try:
                with suppress(wal.WalError):  # it was said when it was met
                    await owned.service.__aexit__()
            finally:
                self._closing.discard(owned.name)

    async def _has_successor(self) -> bool:
        """Whether another worker lives, as far as is known."""
        with suppress(UnreachableError):
            self.snapshot = await self._index.snapshot() if self.owned else self.snapshot
        return bool(self.snapshot.living().keys() - {self.owner})

    def _begin(self, work: Coroutine[None, None, None]) -> None:
        self._tasks.append(asyncio.create_task(work))
        self._tasks[-1].add_done_callback(self._look_at)

    def _look_at(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            self._fail(error)

    def _fail(self, error: BaseException) -> None:
        if not self._failed.done():
            self._failed.set_exception(error)

    async def _discover(self) -> None:
        """Logs that the index does not know are copied into it before anybody may write them."""
        known = {each.name for each in (await self._index.snapshot()).partitions}
        for name, log in () if self.is_alone else find_logs(self.root):
            if name not in known:
                await copy_log(self._index, name, log, self._parts.tokenizer)


def _now() -> float:
    """Seconds by a clock that goes on while this process, or its host, is frozen."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)
