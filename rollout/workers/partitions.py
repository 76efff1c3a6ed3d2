"""Partitions of a root: which there are, what the index says of their rollouts, and what their services are made of.

See: rollout/workers/index.py.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast
from weakref import WeakSet

import wal
from dsec.sandbox import Substrate
from rollout.config import RolloutConfig
from rollout.engine import Announce, Engine, EngineInfo
from rollout.errors import RequestError
from rollout.events import Event, PolicyUpdated
from rollout.ledger import Ledger
from rollout.policy import follow
from rollout.scheduling.admission import check_engine
from rollout.service import RolloutService
from rollout.workers.index import Index, RolloutRow
from toolcall_dsl import Tokenizer
from wal import format as wal_format

WORKERS = "workers"
PUBLISHED_COUNT_MAX = 1000
"""Rows that are told to the index at once."""


def find_logs(root: Path) -> Iterator[tuple[str, Path]]:
    """Partitions under a root, by name, and their logs.  RequestError if the root is one itself."""
    if (root / "wal").is_dir():
        raise RequestError(f"{root} is a run directory itself: serve it with --out, or give a root that holds several")
    for log in sorted(root.glob("*/wal")):
        yield log.parent.name, log


def newest_epoch(log: Path) -> int:
    """The highest epoch that a log directory has seen."""
    names = [(wal_format.parse_name(name), wal_format.parse_lock_name(name)) for name in os.listdir(log)]
    return max((segment[1] if segment else lock or 0 for segment, lock in names), default=0)


def rows_of_log(name: str, log: Path, tokenizer: Tokenizer) -> tuple[list[str], list[RolloutRow], PolicyUpdated | None]:
    """What a log says: its jobs, how its rollouts stand, its weights.  wal.CorruptError, JournalError."""
    ledger = Ledger.read(log, tokenizer)
    return list(ledger.jobs), [row_of(ledger, name, rollout_id) for rollout_id in ledger.rollouts], ledger.policy


async def copy_log(index: Index, name: str, log: Path, tokenizer: Tokenizer) -> int:
    """Make a log known to the index: its jobs, how its rollouts stand (the answer: how many), and its epoch."""
    request_ids, rows, policy = await asyncio.to_thread(rows_of_log, name, log, tokenizer)
    for start in range(0, max(len(request_ids), len(rows)), PUBLISHED_COUNT_MAX):
        span = slice(start, start + PUBLISHED_COUNT_MAX)
        await index.publish(name, request_ids[span], rows[span])
    if policy is not None:
        await index.set_policy(policy)
    await index.add_partition(name, newest_epoch(log))
    return len(rows)


def row_of(ledger: Ledger, partition: str, rollout_id: str) -> RolloutRow:
    """A rollout as it stands."""
    state = ledger.rollouts[rollout_id]
    finished, opened = state.finished, state.opened
    if finished is not None:
        standing = "DONE"
    elif state.failure is not None:
        standing = "FAILED"
    else:
        standing = "PREEMPTED" if state.preempted is not None else "RUNNING"
    return RolloutRow(
        rollout_id=rollout_id,
        request_id=opened.request_id,
        partition=partition,
        task=next(group.task for group in state.job.groups if group.group_id == opened.group_id),
        state=standing,
        finish_reason=finished.reason if finished is not None else "",
        reward=state.judged.reward if state.judged is not None else None,
    )


def hold_name(root: Path, worker_id: str, *, is_alone: bool) -> IO[str]:
    """Hold a worker id on this root until the file is closed or this process ends.

    RequestError, for one that `is_alone` there wal.LockedError, or OSError.

    Whoever gets it knows that an earlier process of that name is dead.
    """
    (root / WORKERS).mkdir(exist_ok=True)
    file = (root / WORKERS / f"{worker_id}.lock").open("a+")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        file.seek(0)
        holder = file.read(20).strip()
        file.close()
        if is_alone:
            raise wal.LockedError(root / "wal", holder) from error
        raise RequestError(
            f"worker {worker_id!r} of {root} is process {holder} already: stop that, or give another --worker-id"
        ) from error
    file.truncate(0)
    file.write(f"{os.getpid()}\n")
    file.flush()
    return file


@dataclass
class Parts:
    """What a worker's services are made of; `substrate` makes that of a partition's directory and epoch.

    With `has_served_edge` sandboxes are an Edge's that other workers reach, too.
    """

    engine: Engine
    tokenizer: Tokenizer
    config: RolloutConfig
    substrate: Callable[[Path, int], Substrate]
    has_served_edge: bool

    def __post_init__(self) -> None:
        """One engine, which all services draw with."""
        self.lent = Lent(self.engine)

    async def open(self) -> None:
        """Open the engine.  EngineError; RequestError: it does not suit the service's bounds, or the tokenizer."""
        await self.engine.open()
        try:
            check_engine(self.config, self.engine.info, self.tokenizer)
        except RequestError:
            await self.engine.close()
            raise

    def service(
        self, directory: Path, substrate: Substrate, epoch: int, observe: Callable[[Event], None]
    ) -> RolloutService:
        """A service over a partition, not open yet."""
        engine = cast("Engine", self.lent)
        service = RolloutService(
            directory, engine, substrate, self.tokenizer, self.config, epoch=epoch, observe=observe
        )
        self.lent.borrowers.add(service)
        return service

    async def follow(self, index: Index) -> None:
        """Draw with the newest weights that a log of the root names: the update came while this worker was not there.

        UnreachableError, EngineError.
        """
        newest = await index.policy()
        if newest is not None and not self.config.newer_than(newest[0]):  # else a service begins with those
            version, checkpoint, digest = newest
            await follow(cast("Engine", self.lent), checkpoint, version, digest)


class Lent:
    """An engine that is open already, and stays so when a borrower closes it.

    Who changes its weights changes them for all: every log has the change before the new weights draw.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._policy: PolicyUpdated | None = None
        self.borrowers: WeakSet[RolloutService] = WeakSet()
        """The services that it draws for."""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    async def open(self) -> None:
        """It is."""

    async def close(self) -> None:
        """Others use it."""

    async def tell(self, service: RolloutService) -> None:
        """Have a log that was just opened name the weights that draw, if they are newer than those that it names."""
        known, newest = service.ledger.policy, self._policy
        if newest is not None and (known is None or known.engine.policy_version < newest.engine.policy_version):
            await service.note(newest)

    async def update(self, checkpoint: Path, policy_version: int, announce: Announce | None = None) -> EngineInfo:
        """See Engine."""

        async def announce_to_all(info: EngineInfo) -> None:
            if announce is not None:
                await announce(info)
            policy = PolicyUpdated(info, str(checkpoint))
            for service in list(self.borrowers):
                known = service.ledger.policy
                if service.is_started and (known is None or known.engine != info):
                    with contextlib.suppress(wal.WalError):  # a log that was lost meanwhile: its service ends by that
                        await service.note(policy)
            self._policy = policy

        changed = await self._engine.update(checkpoint, policy_version, announce_to_all)
        for service in list(self.borrowers):
            if service.is_started:
                service.awaiting.look_again()
        return changed
