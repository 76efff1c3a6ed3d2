"""Following a job: what the log holds from an event on, then what happens, with no gap and nothing twice.

The watch begins before the log is read.  All records up to the newest durable one of that moment
come from the log, everything above from the watch.  Both are in the order of the log.

Invariants:
1. The events of `follow(job, n)` are those of `follow(job, 0)` whose number is at least n.
2. Only durable events are handed out: the log is read up to what was durable, not to its end.

See: proto/rollout/pb/v1/rollout.proto, "Attach"; docs/formats/events.md.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping
from contextlib import aclosing
from itertools import islice

import wal
from dsec.errors import OutOfRangeError
from dsec.trajectory import KIND as SANDBOX_KIND
from rollout import journal, steps
from rollout.events import JobEvent, RolloutEvent, rollout_of
from rollout.service import RolloutService

BATCH_EVENTS_MAX = 256
"""Records that are read ahead of whoever follows."""

Told = tuple[int, list[RolloutEvent]]
"""What one record, of this lsn, says of the rollouts: one event, or tokens of several."""


async def follow(service: RolloutService, request_id: str, from_event: int = 0) -> AsyncGenerator[Told, None]:
    """What happens to a job's rollouts, record by record, until none of them runs.

    NotFoundError; OutOfRangeError if the log ends before `from_event`; ResourceExhaustedError, which
    names the event to go on from, if the caller is too slow.
    """
    async with aclosing(service.watch(request_id)) as watch:
        until = service.journal.last_lsn
        if from_event > until + 1:
            raise OutOfRangeError(f"from_event is {from_event}, and the log ends with event {until}")
        rollouts = service.ledger.rollouts

        def is_member(rollout_id: str) -> bool:
            state = rollouts.get(rollout_id)
            return state is not None and state.opened.request_id == request_id

        members = [rollout_id for rollout_id, _, _ in service.ledger.members(request_id)]
        first = [service.ledger.lsns[member][0] for member in members if member in rollouts]
        if first:
            async for told in _read(service, max(from_event, min(first)), until, is_member):
                yield told
        async for lsn, event in watch:
            together = [event]
            while watch.holds(lsn):
                together.append((await anext(watch))[1])
            if lsn > until:
                yield lsn, together


async def replay(service: RolloutService, rollout_id: str, from_event: int = 0) -> AsyncGenerator[Told, None]:
    """The durable events of one rollout from an event on.  NotFoundError."""
    service.ledger.rollout(rollout_id)
    first, last = service.ledger.lsns[rollout_id]
    async for told in _read(service, max(from_event, first), last, lambda each: each == rollout_id):
        yield told


async def _read(
    service: RolloutService, start: int, until: int, is_wanted: Callable[[str], bool]
) -> AsyncGenerator[Told, None]:
    """Events of the log from `start` to `until`; read in a thread, a batch at a time."""
    reader = wal.Reader(service.directory / "wal", after_lsn=max(0, start - 1))
    records = _records(reader, until, service.ledger.names, is_wanted)
    while batch := await asyncio.to_thread(list, islice(records, BATCH_EVENTS_MAX)):
        for told in batch:
            yield told


def _records(
    reader: wal.Reader, until: int, names: Mapping[int, str], is_wanted: Callable[[str], bool]
) -> Iterator[Told]:
    for record in reader:
        if record.lsn > until:
            return
        if record.kind == SANDBOX_KIND:
            continue
        value = journal.decode(record.kind, record.payload)
        events = steps.chunks(value, names) if isinstance(value, steps.Step) else (value,)
        told = [e for e in events if not isinstance(e, JobEvent) and is_wanted(rollout_of(e))]  # type: ignore[arg-type]
        if told:
            yield record.lsn, told  # type: ignore[misc]
