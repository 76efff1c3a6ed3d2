"""The stream of one request as its records told it, and the raw columns that are not in streams yet.

A step record holds one token of each of its requests, a stream all tokens of one: folding a log is a
transposition.  Done step by step it would touch every stream for every step.  So consecutive steps of
the same rows are kept as they are (`Run`), each stream only remembers since which step it takes part
(`Pending.steps_count`), and the columns are transposed in bulk, one strided slice a row, when a stream
is looked at or when the raw bytes reach their bound.

Invariants:
1. A stream that takes part in the newest run has had one token in every step since it joined.
2. The columns of a stream are complete as far as `Pending` holds no run.

See: docs/formats/wal_tokens.md, "Folding".
"""

from __future__ import annotations

from array import array
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple, TypeAlias

from wal.token_columns import IS_BIG_ENDIAN
from wal.token_records import Cause
from wal.token_routes import RoutesRecorded
from wal.token_steps import HEAD_BYTES, StepHead, StepLayout

Status: TypeAlias = Literal["open", "closed", "acknowledged"]
SHORT_STEPS = 8
"""Below this many steps, appending token by token is cheaper than slicing row by row."""


class VersionRun(NamedTuple):
    """`length` tokens from index `start` on were sampled by policy `version`."""

    start: int
    length: int
    version: int


class Place(NamedTuple):
    """The token of index `start`, and those behind it, stand at `position` and on in the request's context."""

    start: int
    position: int


class KvBreak(NamedTuple):
    """The KV cache of the tokens before index `position` was `cause`."""

    position: int
    cause: Cause


class Stream:
    """What the log says of one request.

    `slot` is None unless the request is open under one; `reason` is that of the close, "" before it.  What the
    properties return belongs to the stream and grows with it: copy what is to stay as it is.
    """

    __slots__ = (
        "_joined",
        "_last_lsn",
        "_length",
        "_pending",
        "_version",
        "_versions",
        "first_lsn",
        "id_column",
        "kv_breaks",
        "logprob_column",
        "places",
        "reason",
        "request",
        "routes",
        "routes_end",
        "slot",
        "status",
    )

    def __init__(self, request: str, slot: int | None, lsn: int, pending: Pending) -> None:
        self.request, self.slot, self.first_lsn = request, slot, lsn
        self.status: Status = "open"
        self.reason = ""
        self.places: list[Place] = []
        """Where sampled tokens stand if others (a prompt, tool results) stand between them; empty: nowhere."""
        self.kv_breaks: list[KvBreak] = []
        self.routes: list[RoutesRecorded] = []
        self.routes_end = 0
        """Index behind the last token that routes were recorded for."""
        self._pending = pending
        self._last_lsn = lsn
        self._length = 0
        self._version = 0
        self._joined: int | None = None
        self._versions: list[VersionRun] = []
        self.id_column = array("I")
        self.logprob_column = array("f")
        """What was absorbed so far; `token_ids` and `logprobs` are complete."""

    @property
    def length(self) -> int:
        """Count of tokens."""
        return self._length if self._joined is None else self._length + self._pending.steps_count - self._joined

    @property
    def position(self) -> int:
        """Where in the context the next token stands, if nothing is put in between."""
        length = self.length
        return length - self.places[-1].start + self.places[-1].position if self.places else length

    def move_to(self, position: int) -> None:
        """The next token stands at this position, not below the present one."""
        if position != self.position:
            self.places.append(Place(self.length, position))

    @property
    def last_lsn(self) -> int:
        """The newest record that touched this request."""
        self._settle()
        return self._last_lsn

    @property
    def policy_versions(self) -> list[VersionRun]:
        """Which version sampled which tokens: runs without gap, neighbours differ."""
        self._settle()
        return self._versions

    @property
    def token_ids(self) -> array[int]:
        """The sampled ids, u32; empty if the fold keeps no columns."""
        self._pending.absorb()
        return self.id_column

    @property
    def logprobs(self) -> array[float]:
        """One f32 a token; empty if the fold keeps no columns."""
        self._pending.absorb()
        return self.logprob_column

    def touch(self, lsn: int) -> None:
        """A record that is no step names this request."""
        self._settle()
        self._last_lsn = lsn

    def join(self, version: int) -> None:
        """From the next step on, each gives this stream one token of `version`."""
        self._settle()
        self._joined, self._version = self._pending.steps_count, version

    def leave(self) -> None:
        """The next step is none of this stream's."""
        self._settle()
        self._joined = None

    def extend(self, token_ids: Sequence[int], logprobs: Sequence[float], version: int, lsn: int) -> None:
        """Tokens from a record of their own; the stream has left and everything pending is absorbed."""
        self._grow(len(token_ids), version)
        self._last_lsn = lsn
        if self._pending.keeps_columns:
            self.id_column.extend(token_ids)
            self.logprob_column.extend(logprobs)

    def _settle(self) -> None:
        if self._joined is not None and self._joined < self._pending.steps_count:
            self._grow(self._pending.steps_count - self._joined, self._version)
            self._joined, self._last_lsn = self._pending.steps_count, self._pending.lsn

    def _grow(self, count: int, version: int) -> None:
        start = self._length
        if self._versions and self._versions[-1].version == version:
            start = self._versions.pop().start
        self._length += count
        self._versions.append(VersionRun(start, self._length - start, version))


class Run:
    """Consecutive steps of the same rows with one token each: their columns as they came, and whose each row is.

    `words` holds the ids of a step, then its logprobs as f32 bits, step after step.
    """

    __slots__ = (
        "_begins",
        "_splits",
        "front",
        "ids_at",
        "layout",
        "logprobs_at",
        "rows_count",
        "size_bytes",
        "slots",
        "steps_count",
        "streams",
        "vacant",
        "versions",
        "words",
    )

    def __init__(self, payload: bytes, layout: StepLayout, streams: list[Stream], versions: Sequence[int]) -> None:
        self.front, self.layout = payload[:16], payload[HEAD_BYTES : layout.ids_at]
        self.size_bytes, self.ids_at, self.logprobs_at = len(payload), layout.ids_at, layout.logprobs_at
        self.slots, self.rows_count, self.versions = layout.slots, len(layout.slots), versions
        self.streams = streams
        """Never changed in place: callers were handed it."""
        self.words = array("I")
        self.steps_count = 0
        """Steps whose columns are kept here."""
        self.vacant: dict[int, int] = {}
        """Slots that left since the newest step, with their rows."""
        self._begins: dict[int, int] = {}
        self._splits: list[tuple[int, Stream, int, int]] = []

    def has_head(self, head: StepHead) -> bool:
        """Whether steps with this head belong to the run."""
        return head.front == self.front and head.layout == self.layout

    def vacate(self, slot: int) -> None:
        """The slot's request leaves: the tokens in its row so far are its own."""
        row = self.slots.index(slot)
        steps_count = self.steps_count
        begin = self._begins.pop(row, 0)
        if begin < steps_count:
            self._splits.append((row, self.streams[row], begin, steps_count))
        self.vacant[slot] = row

    def fill(self, slot: int, stream: Stream) -> int:
        """The slot stands for `stream` from the next step on; returns the policy version of its row."""
        row = self.vacant.pop(slot)
        self.streams = self.streams.copy()
        self.streams[row] = stream
        self._begins[row] = self.steps_count
        return self.versions[row if len(self.versions) > 1 else 0]

    def keep(self, payload: bytes) -> int:
        """Take over the columns of the newest step; returns their size in bytes."""
        self.words.frombytes(memoryview(payload)[self.ids_at :])
        self.steps_count += 1
        return 8 * self.rows_count

    def absorb(self) -> None:
        """Give every stream its tokens, and forget the columns."""
        if IS_BIG_ENDIAN:
            self.words.byteswap()
        if self.steps_count < SHORT_STEPS and not (self._splits or self._begins or self.vacant):
            self._append_tokens()
        else:
            self._append_slices()
        self.words, self.steps_count = array("I"), 0
        self._splits.clear()
        self._begins.clear()

    def _pieces(self) -> Iterator[tuple[int, Stream, int, int]]:
        """(row, stream, first step, step behind the last), in the order of each stream."""
        yield from self._splits
        vacant = set(self.vacant.values())
        for row, stream in enumerate(self.streams):
            if row not in vacant:
                yield row, stream, self._begins.get(row, 0), self.steps_count

    def _append_slices(self) -> None:
        """Row by row."""
        words, rows_count = self.words, self.rows_count
        step_words = 2 * rows_count
        for row, stream, first, last in self._pieces():
            start, end = row + first * step_words, last * step_words
            stream.id_column.extend(words[start:end:step_words])
            stream.logprob_column.frombytes(words[start + rows_count : end : step_words].tobytes())

    def _append_tokens(self) -> None:
        """Step by step: cheaper for a few."""
        rows_count = self.rows_count
        id_columns = [stream.id_column for stream in self.streams]
        logprob_columns = [stream.logprob_column for stream in self.streams]
        for start in range(0, len(self.words), 2 * rows_count):
            border = start + rows_count
            logprobs = array("f", self.words[border : border + rows_count].tobytes())
            # A deque of length 0 runs a map to its end at the speed of C.
            deque(map(array.append, id_columns, self.words[start:border]), maxlen=0)
            deque(map(array.append, logprob_columns, logprobs), maxlen=0)


class Pending:
    """Runs whose columns are not in streams yet, and the count of steps that streams settle by."""

    def __init__(self, keeps_columns: bool, raw_bytes_max: int) -> None:
        self.keeps_columns, self.raw_bytes_max = keeps_columns, raw_bytes_max
        self.steps_count = 0
        """Steps of runs so far."""
        self.lsn = 0
        """Of the newest of them."""
        self._runs: list[Run] = []
        self._raw_bytes = 0

    def add(self, run: Run, payload: bytes, lsn: int) -> None:
        """One more step of a run, the newest one."""
        self.steps_count += 1
        self.lsn = lsn
        if self.keeps_columns:
            if not run.steps_count:
                self._runs.append(run)
            self._raw_bytes += run.keep(payload)
            if self._raw_bytes >= self.raw_bytes_max:
                self.absorb()

    def absorb(self) -> None:
        """Bring everything into the streams."""
        for run in self._runs:
            run.absorb()
        self._runs.clear()
        self._raw_bytes = 0
