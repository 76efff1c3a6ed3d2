"""Events to log records and back; the only place that knows which record kind carries what.

Kind 1 is the log's own token schema, 2 the rollout events of this package, 3 the sandbox trajectory.

Invariants:
1. `decode(*encode(event)) == event`.
2. `append` returns only once the event is durable under the log's sync policy.

See: docs/formats/events.md, docs/formats/wal.md.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec

import wal
from dsec import trajectory
from dsec.trajectory import TrajectoryRecord
from rollout import events
from rollout.errors import JournalError
from rollout.events import Event
from wal import tokens
from wal.tokens import TokensAppended

KIND = 2
"""Record kind of rollout events."""

_MsgpackEvent = (
    events.TaskAdmitted
    | events.ConversationAdmitted
    | events.JobSubmitted
    | events.JobCancelled
    | events.JobWorked
    | events.RolloutsAcknowledged
    | events.PolicyUpdated
    | events.RolloutOpened
    | events.RolloutResumed
    | events.Preempted
    | events.KvBroke
    | events.TopLogprobsFound
    | events.SideChannelsFound
    | events.TokensForced
    | events.SandboxPrepared
    | events.NetworkSwitched
    | events.ToolFinished
    | events.SolutionApplied
    | events.AgentStopped
    | events.Judged
    | events.RolloutFinished
    | events.InfraFailed
)
_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[_MsgpackEvent] = msgspec.msgpack.Decoder(_MsgpackEvent)


def encode(event: Event) -> tuple[int, bytes]:
    """Record kind and payload of an event."""
    if isinstance(event, TokensAppended):
        return tokens.TOKENS, tokens.encode(event)
    return KIND, _encoder.encode(event)


def decode(kind: int, payload: bytes) -> Event | TrajectoryRecord:
    """The value of a record.  JournalError if the kind is unknown or the payload does not fit its schema."""
    try:
        if kind == tokens.TOKENS:
            return _chunk(payload)
        if kind == KIND:
            return _decoder.decode(payload)
        if kind == trajectory.KIND:
            return trajectory.decode(payload)
    except (msgspec.MsgspecError, wal.WalError, ValueError) as error:
        raise JournalError(f"a record of kind {kind} does not fit its schema: {error}") from error
    raise JournalError(f"record kind {kind} is not known to this version")


def _chunk(payload: bytes) -> TokensAppended:
    """Rollouts log tokens request by request; the other records of kind 1 belong to other writers."""
    record = tokens.decode(payload)
    if not isinstance(record, TokensAppended):
        raise JournalError(f"a rollout's log holds no {type(record).__name__}")
    return record


def replay(directory: Path) -> Iterator[tuple[wal.Record, Event | TrajectoryRecord]]:
    """Every record of a log with its value, in order.  wal.CorruptError, JournalError (names the record)."""
    for record in wal.read(directory):
        try:
            yield record, decode(record.kind, record.payload)
        except JournalError as error:
            raise JournalError(f"{record.segment} at byte {record.offset} (lsn {record.lsn}): {error}") from error


class Journal:
    """The write side: events and trajectory records of all rollouts through one group commit."""

    def __init__(self, commit: wal.GroupCommit) -> None:
        """Write through `commit`, which this object closes."""
        self._commit = commit
        self.last_lsn = commit.log.next_lsn - 1
        """Every record up to here is durable."""
        self.on_fenced: Callable[[], None] = lambda: None
        """Called before anybody hears that another writer took the log over."""

    async def append(self, event: Event) -> int:
        """Make an event durable; returns its lsn.  wal.WalError if it is not, and then nothing may act on it."""
        return await self.append_record(*encode(event))

    async def append_record(self, kind: int, payload: bytes) -> int:
        """Make a record of any schema durable (the sandbox trajectory comes this way)."""
        try:
            lsn = await self._commit.append(kind, payload)
        except (wal.FencedError, wal.PoisonedError) as error:
            if isinstance(getattr(error, "cause", error), wal.FencedError):
                self.on_fenced()
            raise
        self.last_lsn = max(self.last_lsn, lsn)
        return lsn

    async def close(self) -> None:
        """Flush, then close the log."""
        await self._commit.close()
