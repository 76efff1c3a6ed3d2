"""Events to log records and back; the only place that knows which record kind carries what.

Kind 2 are the rollout events of this package, 3 is the sandbox trajectory, 6 a step of sampled tokens; kind 1 is
one chunk of one rollout, which is only read.

Invariants:
1. `decode(*encode(event)) == event`, logprobs as f32.
2. Events are folded and told in the order of the log, once they are durable under its sync policy, and never else.

See: docs/formats/events.md, docs/formats/wal.md.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import accumulate, pairwise
from pathlib import Path

import msgspec

import wal
from dsec import trajectory
from dsec.trajectory import TrajectoryRecord
from rollout import events, steps
from rollout.engine import TopLogprobs
from rollout.errors import JournalError, RolloutError
from rollout.events import Event
from rollout.steps import Step, StepWriter
from wal import tokens
from wal.floor import FIRST_LSN
from wal.token_columns import f32_array, f32_bytes, u32_array, u32_bytes
from wal.tokens import TokensAppended

KIND = 2
"""Record kind of rollout events."""
STEP_BYTES_MAX = 1 << 20
"""A step that has grown so large is not gathered any further."""


class _TopsFound(msgspec.Struct, frozen=True, tag="tops_found"):
    """`TopLogprobsFound` as it is logged: ids as u32 and logprobs as f32, `counts` of them for each token.

    Versions before wrote that struct as it is, which is still read.
    """

    rollout_id: str
    start: int
    counts: tuple[int, ...]
    token_ids: bytes
    logprobs: bytes


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
    | _TopsFound
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
    return KIND, _encoder.encode(_tops_found(event) if isinstance(event, events.TopLogprobsFound) else event)


def decode(kind: int, payload: bytes) -> Event | TrajectoryRecord | Step:
    """The value of a record.  JournalError if the kind is unknown or the payload does not fit its schema."""
    try:
        if kind == steps.KIND:
            return steps.decode(payload)
        if kind == tokens.TOKENS:
            return _chunk(payload)
        if kind == KIND:
            event = _decoder.decode(payload)
            return _top_logprobs_found(event) if isinstance(event, _TopsFound) else event
        if kind == trajectory.KIND:
            return trajectory.decode(payload)
    except (msgspec.MsgspecError, wal.WalError, ValueError) as error:
        raise JournalError(f"a record of kind {kind} does not fit its schema: {error}") from error
    raise JournalError(f"record kind {kind} is not known to this version")


def _chunk(payload: bytes) -> TokensAppended:
    """What versions before steps wrote for each chunk; the other records of kind 1 belong to other writers."""
    record = tokens.decode(payload)
    if not isinstance(record, TokensAppended):
        raise JournalError(f"a rollout's log holds no {type(record).__name__}")
    return record


def _tops_found(event: events.TopLogprobsFound) -> _TopsFound:
    tops = event.top_logprobs
    ids = u32_bytes([each for top in tops for each in top.token_ids], "top token_ids")
    logprobs = f32_bytes([each for top in tops for each in top.logprobs], "top logprobs")
    return _TopsFound(event.rollout_id, event.start, tuple(len(top.token_ids) for top in tops), ids, logprobs)


def _top_logprobs_found(found: _TopsFound) -> events.TopLogprobsFound:
    ids, logprobs = u32_array(found.token_ids), f32_array(found.logprobs)
    bounds = [*accumulate(found.counts, initial=0)]
    if min(found.counts, default=0) < 0 or not len(ids) == len(logprobs) == bounds[-1]:
        raise ValueError(f"{len(ids)} likeliest tokens, {len(logprobs)} logprobs, and {bounds[-1]} are counted")
    tops = tuple(TopLogprobs(tuple(ids[start:end]), tuple(logprobs[start:end])) for start, end in pairwise(bounds))
    return events.TopLogprobsFound(found.rollout_id, found.start, tops)


def replay(directory: Path) -> Iterator[tuple[wal.Record, Event | TrajectoryRecord]]:
    """Every event of a log with its record, in order.  wal.CorruptError, JournalError (names the record).

    A log whose beginning was dropped may hold tokens of rollouts that were forgotten: they are left out.
    """
    names: dict[int, str] = {}
    is_cut = False
    for record in wal.read(directory):
        is_cut |= not names and record.lsn > FIRST_LSN
        try:
            value = decode(record.kind, record.payload)
            if not isinstance(value, Step):
                if isinstance(value, events.RolloutOpened):
                    names[record.lsn] = value.rollout_id
                yield record, value
                continue
            known = list(steps.chunks(value, names))
            if len(known) < len(value.rows) and not is_cut:
                raise JournalError("tokens of a rollout stand before its rollout_opened")
        except JournalError as error:
            raise JournalError(f"{record.segment} at byte {record.offset} (lsn {record.lsn}): {error}") from error
        for event in known:
            yield record, event


Durable = Callable[[Event, int], None]
"""Folds and tells an event whose record, which may have others, is durable and has this lsn."""


class Journal:
    """The write side: events and trajectory records of all rollouts through one group commit.

    Tokens that are appended in one turn of the event loop are one record, a step.
    """

    def __init__(self, commit: wal.GroupCommit, durable: Durable, failed: Callable[[wal.WalError], None]) -> None:
        """Write through `commit`, which this object closes.

        `durable` is called for each event, in the order of the log, before who appended it hears of it; `failed` when a
        record did not become durable, after which none will.
        """
        self._commit = commit
        self._durable = durable
        self._failed = failed
        self._step: StepWriter | None = None
        self._step_told: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self.last_lsn = commit.log.next_lsn - 1
        """Every record up to here is durable."""

    async def append(self, event: Event) -> int:
        """Make an event durable, fold it and tell it; returns its lsn.  wal.WalError if it is not, and nothing may act.

        A caller that is cancelled waits for it all the same.
        """
        kind, payload = encode(event)
        await self._room()
        return await wal.settled(self._admit(kind, payload, [event]))

    async def gather(self, event: TokensAppended, opened_lsn: int) -> asyncio.Future[int]:
        """Put tokens into the step that is being gathered, behind everything that was appended before.

        The future is done once they are durable, folded and told; many share it, so it is not to be cancelled.
        `opened_lsn` is that of the rollout's `rollout_opened`.  wal.RecordInvalidError, and what `append` raises.
        """
        await self._room()
        if self._step is not None and not self._step.takes(event):
            self._write_step()
        if self._step is None:
            step, told = StepWriter(event.policy_version), asyncio.get_running_loop().create_future()
            step.add(event, opened_lsn)
            self._step, self._step_told = step, told
            asyncio.get_running_loop().call_soon(self._write_step, step)
        else:
            self._step.add(event, opened_lsn)
        told = self._step_told
        if self._step.size_bytes >= STEP_BYTES_MAX:
            self._write_step()
        return told

    async def append_record(self, kind: int, payload: bytes) -> int:
        """Make a record of any schema durable (the sandbox trajectory comes this way)."""
        await self._room()
        return await asyncio.shield(self._admit(kind, payload, []))

    async def close(self) -> None:
        """Flush, then close the log."""
        self._write_step()
        await self._commit.close()

    async def _room(self) -> None:
        if not self._commit.has_room():
            await self._commit.room()

    def _admit(self, kind: int, payload: bytes, told: Sequence[Event]) -> asyncio.Future[int]:
        self._write_step()
        return self._write(kind, payload, told, asyncio.get_running_loop().create_future())

    def _write_step(self, step: StepWriter | None = None) -> None:
        """End the step that is being gathered, or this one if it is that."""
        if self._step is None or step not in (None, self._step):
            return
        step, self._step = self._step, None
        try:
            self._write(steps.KIND, step.payload(), list(step.events.values()), self._step_told)
        except wal.WalError as error:
            _fail(self._step_told, error)

    def _write(
        self, kind: int, payload: bytes, told: Sequence[Event], done: asyncio.Future[int]
    ) -> asyncio.Future[int]:
        lsn, durable = self._commit.admit(kind, payload)
        durable.add_done_callback(partial(self._end, lsn, told, done))
        return done

    def _end(self, lsn: int, told: Sequence[Event], done: asyncio.Future[int], durable: asyncio.Future[None]) -> None:
        lost = durable.exception()
        if lost is not None:
            if isinstance(lost, wal.WalError):
                self._failed(lost)
            _fail(done, lost)
            return
        self.last_lsn = lsn
        for event in told:
            try:
                self._durable(event, lsn)
            except RolloutError as error:  # the others of the record are none the worse
                _fail(done, error)
            except BaseException as bug:
                _fail(done, bug)
                raise
        if not done.done():
            done.set_result(lsn)


def _fail(done: asyncio.Future[int], error: BaseException) -> None:
    if not done.done():
        done.set_exception(error)
        done.exception()  # seen: whoever awaits it hears of it
