"""The writer's side of token records: slots, engine steps, and what else happens to a request.

A `TokenLog` folds what it writes, record by record in the order of the log, so its state is the state
that a reader of the log will have, and one place holds the rules.  A call gives its record its place in
the log at once and returns something to await until the record is durable.  So an engine may start its
next step while the one before is being synced, needs no task for it, and only what leaves the house (a
token to a client) waits.

Invariants:
1. Records reach the log in the order in which their calls began, and each fits the ones before it.
2. A slot stands for another request only in records behind its close.
3. A refused record changes nothing; after a failure of the log every call raises, and only a fold of the
   reopened log tells the state.

See: docs/formats/wal_tokens.md, "Writing".
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Awaitable, Callable, Generator, Sequence
from typing import Any

from wal import tokens
from wal.errors import RecordTooLargeError
from wal.fold import TokenFold
from wal.group_commit import GroupCommit
from wal.reader import Record
from wal.token_columns import u32_bytes
from wal.token_steps import StepHead, encode_with, step_head, version_runs_of
from wal.tokens import Cause, KvBroken, RequestClosed, RequestOpened, RequestsAcknowledged, RoutesRecorded, Who


class _Written:
    """A record that has its place in the log; awaiting it waits until it is durable."""

    __slots__ = ("_answer", "_durable")

    def __init__(self, answer: int, durable: asyncio.Future[None]) -> None:
        self._answer, self._durable = answer, durable

    def __await__(self) -> Generator[Any, None, int]:
        # Many may wait for one record: who is cancelled takes nobody with him.
        yield from asyncio.shield(self._durable).__await__()
        return self._answer


class TokenLog:
    """Writes kind 1 through a GroupCommit, which stays its owner's; use it from one event loop.

    Every call takes effect when it is made, in the order of the calls, and returns an awaitable: of the
    record's lsn (`open`: the slot), once it is durable under the commit's policy.  While the log has no
    room a call takes effect later, still in order, and what it would raise comes from its awaitable.  Each
    raises StreamError (the record would contradict the log), RecordInvalidError or RecordTooLargeError,
    and then nothing was written; and what `GroupCommit.append` raises when the log fails.  A call that is
    cancelled while it has no place leaves nothing; cancelled later, its record stays and counts.
    """

    def __init__(self, commit: GroupCommit, fold: TokenFold | None = None) -> None:
        """Go on where `fold` ends, which belongs to this object now; None for a log that was just created.

        ValueError if the fold has not added every record that was found when the log was opened, or knows more.
        """
        self._commit = commit
        self._fold = fold or TokenFold(keeps_columns=False)
        self._turn = asyncio.Lock()
        self._queue: set[asyncio.Task[int]] = set()
        self._rows: tuple[bytes, int | list[tuple[int, int]]] | None = None
        self._head = StepHead(b"", b"", 0, 0)
        found, newest = commit.log.recovery.next_lsn - 1, commit.log.next_lsn - 1
        if not found <= self._fold.lsn <= newest:
            raise ValueError(f"the fold ends with lsn {self._fold.lsn}, the log was opened with {found}: fold it first")

    @property
    def fold(self) -> TokenFold:
        """The state of the log as written so far; read it only."""
        return self._fold

    def open(self, request: str) -> Awaitable[int]:
        """Give a new request the lowest free slot; the awaitable gives the SLOT."""

        def admit() -> _Written:
            slot = next(free for free in itertools.count() if free not in self._fold.slots)
            return self._admit(tokens.encode(RequestOpened(request, slot)), slot)

        return self._write(admit)

    def append(
        self,
        slots: Sequence[int],
        token_ids: Sequence[int],
        logprobs: Sequence[float],
        policy_version: int | Sequence[int],
        counts: Sequence[int] | None = None,
    ) -> Awaitable[int]:
        """One engine step: row i is the open request in `slots[i]`, which got `counts[i]` tokens (None: one each).

        `token_ids` u32 and `logprobs` f32 hold the rows' tokens one row after the other, any sequence or buffer,
        copied when the call takes effect; buffers of their type are cheapest.  `policy_version`: of the weights
        that sampled the step, one for all rows or one a row.
        """

        def admit() -> _Written:
            head = self._step_head(slots, policy_version, counts)
            return self._admit(encode_with(head, self._fold.base_of(head, slots), token_ids, logprobs))

        return self._write(admit)

    def close_request(self, who: Who, reason: str) -> Awaitable[int]:
        """No token follows for this slot or request id; its slot is free.  `reason`: at most 255 bytes of UTF-8."""
        return self._write_record(RequestClosed(who, reason))

    def acknowledge(self, requests: Sequence[str]) -> Awaitable[int]:
        """The consumer has what it needs of these closed requests; retention may drop them."""
        return self._write_record(RequestsAcknowledged(tuple(requests)))

    def record_routes(self, routes: RoutesRecorded) -> Awaitable[int]:
        """The experts that tokens of a stream went through."""
        return self._write_record(routes)

    def break_kv(self, who: Who, position: int, cause: Cause) -> Awaitable[int]:
        """The KV cache of the tokens before index `position` was rebuilt, restored or kept."""
        return self._write_record(KvBroken(who, position, cause))

    def _write_record(self, record: tokens.TokenRecord) -> Awaitable[int]:
        return self._write(lambda: self._admit(tokens.encode(record)))

    def _write(self, admit: Callable[[], _Written]) -> Awaitable[int]:
        """Now if there is room and nobody waits for it, else behind those who wait."""
        if not self._queue and self._commit.has_room():
            return admit()
        task = asyncio.ensure_future(self._write_in_turn(admit))
        self._queue.add(task)
        task.add_done_callback(self._queue.discard)
        return task

    async def _write_in_turn(self, admit: Callable[[], _Written]) -> int:
        async with self._turn:  # asyncio's lock is fair: first come, first served
            await self._commit.room()
            written = admit()
        return await written

    def _admit(self, payload: bytes, answer: int | None = None) -> _Written:
        """Fold a record and give it its place; without a break since its content was decided."""
        log = self._commit.log
        if len(payload) > log.record_bytes_max:
            raise RecordTooLargeError(len(payload), log.record_bytes_max)
        self._commit.check_open()
        self._fold.add(Record(log.next_lsn, tokens.TOKENS, payload, "", 0))
        lsn, durable = self._commit.admit(tokens.TOKENS, payload)
        return _Written(lsn if answer is None else answer, durable)

    def _step_head(
        self, slots: Sequence[int], policy_version: int | Sequence[int], counts: Sequence[int] | None
    ) -> StepHead:
        """The head of the step, made anew only if the rows or versions are not those of the step before."""
        if counts is not None:
            return step_head(slots, self._runs(policy_version, len(slots)), counts)
        slot_bytes = u32_bytes(slots, "slots")
        runs = policy_version if isinstance(policy_version, int) else version_runs_of(policy_version)
        rows = (slot_bytes, runs)
        if rows != self._rows:
            self._head, self._rows = step_head(slots, self._runs(policy_version, len(slots))), rows
        return self._head

    def _runs(self, policy_version: int | Sequence[int], rows_count: int) -> list[tuple[int, int]]:
        return [(rows_count, policy_version)] if isinstance(policy_version, int) else version_runs_of(policy_version)
