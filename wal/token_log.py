"""The writer's side of token records: slots, engine steps, and what else happens to a request.

A `TokenLog` folds what it writes, record by record in the order of the log, so its state is the state
that a reader of the log will have, and one place holds the rules.  A record changes the state at the
moment in which it gets its place in the log; the call returns when it is durable.  So an engine may
start its next step while the one before is being synced, and only what leaves the house (a token to a
client) waits for `append` to return.

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
from collections.abc import Callable, Sequence

from wal import tokens
from wal.errors import RecordTooLargeError
from wal.fold import TokenFold
from wal.group_commit import GroupCommit
from wal.reader import Record
from wal.token_columns import u32_bytes
from wal.token_steps import StepHead, encode_with, step_head, version_runs_of
from wal.tokens import Cause, KvBroken, RequestClosed, RequestOpened, RequestsAcknowledged, RoutesRecorded, Who


class TokenLog:
    """Writes kind 1 through a GroupCommit, which stays its owner's; use it from one event loop.

    Every call returns the lsn of its record once that is durable under the commit's policy.  Each raises
    StreamError (the record would contradict the log), RecordInvalidError or RecordTooLargeError, and then
    nothing was written; and what `GroupCommit.append` raises when the log fails.  A call that is cancelled
    before its record has its place leaves nothing; cancelled later, the record stays and counts.
    """

    def __init__(self, commit: GroupCommit, fold: TokenFold | None = None) -> None:
        """Go on where `fold` ends, which belongs to this object now; None for a log that was just created.

        ValueError if the fold has not added every record that was found when the log was opened, or knows more.
        """
        self._commit = commit
        self._fold = fold or TokenFold(keeps_columns=False)
        found, newest = commit.log.recovery.next_lsn - 1, commit.log.next_lsn - 1
        if not found <= self._fold.lsn <= newest:
            raise ValueError(f"the fold ends with lsn {self._fold.lsn}, the log was opened with {found}: fold it first")
        self._turn = asyncio.Lock()
        self._rows: tuple[bytes, int | list[tuple[int, int]]] | None = None
        self._head = StepHead(b"", b"", 0, 0)

    @property
    def fold(self) -> TokenFold:
        """The state of the log as written so far; read it only."""
        return self._fold

    async def open(self, request: str) -> int:
        """Give a new request the lowest free slot; returns the SLOT once the record is durable."""
        slot = 0

        def payload() -> bytes:
            nonlocal slot
            slot = next(free for free in itertools.count() if free not in self._fold.slots)
            return tokens.encode(RequestOpened(request, slot))

        await self._write(payload)
        return slot

    async def append(
        self,
        slots: Sequence[int],
        token_ids: Sequence[int],
        logprobs: Sequence[float],
        policy_version: int | Sequence[int],
        counts: Sequence[int] | None = None,
    ) -> int:
        """One engine step: row i is the open request in `slots[i]`, which got `counts[i]` tokens (None: one each).

        `token_ids` u32 and `logprobs` f32 hold the rows' tokens one row after the other, any sequence or buffer;
        they are copied when the record gets its place, which is when this coroutine first runs unless the log has
        no room.  `policy_version`: of the weights that sampled the step, one for all rows or one a row.
        """

        def payload() -> bytes:
            head = self._step_head(slots, policy_version, counts)
            return encode_with(head, self._fold.base_of(head, slots), token_ids, logprobs)

        return await self._write(payload)

    async def close_request(self, who: Who, reason: str) -> int:
        """No token follows for this slot or request id; its slot is free.  `reason`: at most 255 bytes of UTF-8."""
        return await self._write_record(RequestClosed(who, reason))

    async def acknowledge(self, requests: Sequence[str]) -> int:
        """The consumer has what it needs of these closed requests; retention may drop them."""
        return await self._write_record(RequestsAcknowledged(tuple(requests)))

    async def record_routes(self, routes: RoutesRecorded) -> int:
        """The experts that tokens of a stream went through."""
        return await self._write_record(routes)

    async def break_kv(self, who: Who, position: int, cause: Cause) -> int:
        """The KV cache of the tokens before index `position` was rebuilt, restored or kept."""
        return await self._write_record(KvBroken(who, position, cause))

    async def _write_record(self, record: tokens.TokenRecord) -> int:
        return await self._write(lambda: tokens.encode(record))

    async def _write(self, payload_of: Callable[[], bytes]) -> int:
        """Encode, fold and admit without a break between them, in the order of the calls; wait until durable."""
        async with self._turn:  # asyncio's lock is fair: first come, first served
            await self._commit.room()
            payload, log = payload_of(), self._commit.log
            if len(payload) > log.record_bytes_max:
                raise RecordTooLargeError(len(payload), log.record_bytes_max)
            self._fold.add(Record(log.next_lsn, tokens.TOKENS, payload, "", 0))
            lsn, durable = self._commit.admit(tokens.TOKENS, payload)
        await durable
        return lsn

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
