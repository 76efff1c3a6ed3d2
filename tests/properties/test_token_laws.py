"""Laws of token records and their fold, over drawn schedules: joins, leaves, slot reuse, k > 1, new versions."""

from __future__ import annotations

import random
from array import array
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wal import Record, RecordInvalidError, tokens
from wal.errors import StreamError
from wal.fold import Streams, TokenFold, fold
from wal.tokens import (
    KvBroken,
    RequestClosed,
    RequestOpened,
    RequestsAcknowledged,
    RoutesRecorded,
    StepAppended,
    TokenRecord,
    TokensAppended,
)

U32, U64 = st.integers(0, 2**32 - 1), st.integers(0, 2**64 - 1)
F32 = st.floats(width=32, allow_nan=False, allow_infinity=False)
IDS = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20)
WHO = U32 | IDS


@st.composite
def steps(draw: st.DrawFn) -> StepAppended:
    slots = draw(st.lists(U32, min_size=1, max_size=12, unique=True))
    counts = draw(st.none() | st.lists(st.integers(1, 4), min_size=len(slots), max_size=len(slots)))
    counts = None if counts is None or set(counts) == {1} else counts
    count = sum(counts or [1] * len(slots))
    cut = draw(st.integers(1, len(slots)))
    version = draw(st.integers(0, 2**64 - 2))
    runs = ((cut, version), (len(slots) - cut, version + 1)) if cut < len(slots) else ((cut, version),)
    ids = draw(st.lists(U32, min_size=count, max_size=count))
    logprobs = draw(st.lists(F32, min_size=count, max_size=count))
    return StepAppended(
        draw(U64), runs, tuple(slots), tuple(ids), tuple(logprobs), None if counts is None else tuple(counts)
    )


@st.composite
def routes(draw: st.DrawFn) -> RoutesRecorded:
    dice = random.Random(draw(st.integers(0, 2**32)))
    width, rows, layers = draw(st.sampled_from([1, 2])), draw(st.integers(1, 20)), draw(st.integers(1, 3))
    experts = draw(st.integers(2, 256**width))
    top_k = draw(st.integers(2, min(experts, 6)))
    validity, ids = bytearray((rows + 7) // 8), []
    for row in range(rows):
        is_valid = dice.random() < 0.8
        validity[row // 8] |= is_valid << row % 8
        for _ in range(layers):
            ids += dice.sample(range(experts), top_k) if is_valid else [0] * top_k
    data = b"".join(value.to_bytes(width, "little") for value in ids)
    return RoutesRecorded(
        draw(WHO), draw(U64), draw(U64), rows, experts, layers, top_k, width, bytes(validity), data
    )  # fmt: skip


RECORDS: st.SearchStrategy[TokenRecord] = st.one_of(
    st.builds(RequestOpened, IDS, U32),
    steps(),
    st.builds(RequestClosed, WHO, st.text(st.characters(exclude_categories=["Cs"]), max_size=60)),
    routes(),
    st.builds(KvBroken, WHO, U64, st.sampled_from(["rebuilt", "restored", "kept"])),
    st.builds(RequestsAcknowledged, st.lists(IDS, min_size=1, max_size=5, unique=True).map(tuple)),
)


@given(RECORDS)
def test_decoded_records_are_the_encoded_ones(record: TokenRecord) -> None:
    assert tokens.decode(tokens.encode(record)) == record


@given(RECORDS, st.data())
def test_a_damaged_record_is_another_record_or_a_typed_error(record: TokenRecord, data: st.DataObject) -> None:
    payload = bytearray(tokens.encode(record))
    for offset in data.draw(st.lists(st.integers(0, len(payload) - 1), max_size=3)):
        payload[offset] = data.draw(st.integers(0, 255))
    try:
        decoded = tokens.decode(bytes(payload))
    except RecordInvalidError:
        return
    assert tokens.encode(decoded) == payload


@dataclass
class Told:
    """What the schedule says of one request."""

    slot: int | None
    token_ids: list[int] = field(default_factory=list)
    versions: list[int] = field(default_factory=list)
    breaks: list[tuple[int, str]] = field(default_factory=list)
    status: str = "open"
    reason: str = ""


class Schedule:
    """A drawn run of an engine, written as steps and as chunks, with what it means in plain lists."""

    def __init__(self, seed: int, actions_count: int) -> None:
        self.dice = random.Random(seed)
        self.told: dict[str, Told] = {}
        self.by_step: list[Record] = []
        self.by_chunk: list[Record] = []
        self.running: list[str] = []
        self.version = 0
        actions = [self.open, self.open, self.close, self.leave, self.step, self.step, self.many_steps, self.uneven,
                   self.mixed, self.new_version, self.chunk, self.break_kv, self.acknowledge]  # fmt: skip
        for _ in range(actions_count):
            self.dice.choice(actions)()

    def put(self, record: TokenRecord, *targets: list[Record]) -> None:
        for records in targets:
            records.append(Record(len(records) + 1, tokens.TOKENS, tokens.encode(record), "", 0))

    def some(self, status: str = "open") -> str | None:
        names = [name for name, told in self.told.items() if told.status == status]
        return self.dice.choice(names) if names else None

    def open(self) -> None:
        used = {told.slot for told in self.told.values()}
        slot = next(free for free in range(100) if free not in used)
        name = f"r{len(self.told)}"
        self.told[name] = Told(slot)
        self.running.insert(self.dice.randint(0, len(self.running)), name)
        self.put(RequestOpened(name, slot), self.by_step)

    def close(self) -> None:
        name = self.some()
        if name is not None:
            told = self.told[name]
            who = self.dice.choice((name, told.slot))
            told.status, told.reason, told.slot = "closed", f"because {len(self.by_step)}", None
            if not told.token_ids:
                self.put(RequestOpened(name, 1000 + len(self.told)), self.by_chunk)
            self.put(RequestClosed(who, told.reason), self.by_step)
            self.put(RequestClosed(name, told.reason), self.by_chunk)
            if name in self.running:
                at = self.running.index(name)
                del self.running[at]
                if self.dice.random() < 0.5:
                    self.open()
                    self.running.remove(newest := list(self.told)[-1])
                    self.running.insert(at, newest)

    def leave(self) -> None:
        """A request waits for a tool; or comes back."""
        name = self.some()
        if name in self.running:
            self.running.remove(name)
        elif name is not None:
            self.running.append(name)

    def new_version(self) -> None:
        self.version += 1

    def step(self) -> None:
        self.write([1] * len(self.running), [self.version] * len(self.running))

    def many_steps(self) -> None:
        for _ in range(self.dice.randint(2, 30)):
            self.step()

    def uneven(self) -> None:
        self.write([self.dice.randint(1, 3) for _ in self.running], [self.version] * len(self.running))

    def mixed(self) -> None:
        versions = [self.dice.randint(0, self.version) for _ in self.running]
        for _ in range(self.dice.randint(1, 3)):
            self.write([1] * len(self.running), versions)

    def write(self, counts: list[int], versions: list[int]) -> None:
        if not self.running:
            return
        base = sum(len(self.told[name].token_ids) for name in self.running)
        ids: list[int] = []
        for name, count, version in zip(self.running, counts, versions, strict=True):
            told = self.told[name]
            drawn = [self.dice.randrange(2**32) for _ in range(count)]
            self.put_chunk(name, drawn, version, self.by_chunk)
            told.token_ids += drawn
            told.versions += [version] * count
            ids += drawn
        runs: list[tuple[int, int]] = []
        for version in versions:
            rows = runs.pop()[0] if runs and runs[-1][1] == version else 0
            runs.append((rows + 1, version))
        slots = [self.told[name].slot or 0 for name in self.running]
        self.put(StepAppended(base, runs, slots, ids, [logprob(i) for i in ids], counts), self.by_step)

    def chunk(self) -> None:
        name = self.some()
        if name is not None:
            drawn = [self.dice.randrange(2**32) for _ in range(self.dice.randint(1, 5))]
            self.put_chunk(name, drawn, self.version, self.by_chunk, self.by_step)
            self.told[name].token_ids += drawn
            self.told[name].versions += [self.version] * len(drawn)

    def put_chunk(self, name: str, ids: list[int], version: int, *targets: list[Record]) -> None:
        start = len(self.told[name].token_ids)
        chances = tuple(logprob(i) for i in ids)
        self.put(TokensAppended(name, start, tuple(ids), chances, version), *targets)

    def break_kv(self) -> None:
        name = self.some()
        if name is not None and self.told[name].token_ids:
            position = self.dice.randint(0, len(self.told[name].token_ids))
            self.told[name].breaks.append((position, "kept"))
            self.put(KvBroken(self.told[name].slot or 0, position, "kept"), self.by_step)
            self.put(KvBroken(name, position, "kept"), self.by_chunk)

    def acknowledge(self) -> None:
        name = self.some("closed")
        if name is not None:
            self.told[name].status = "acknowledged"
            self.put(RequestsAcknowledged((name,)), self.by_step, self.by_chunk)


def logprob(token_id: int) -> float:
    return -(token_id % 4096) / 64


def runs_of(versions: list[int]) -> list[tuple[int, int, int]]:
    runs: list[tuple[int, int, int]] = []
    for index, version in enumerate(versions):
        start = runs.pop()[0] if runs and runs[-1][2] == version else index
        runs.append((start, index + 1 - start, version))
    return runs


def check(streams: Streams, told: dict[str, Told]) -> None:
    for name, expected in told.items():
        stream = streams[name]
        assert stream.token_ids == array("I", expected.token_ids)
        assert stream.logprobs == array("f", map(logprob, expected.token_ids))
        assert stream.policy_versions == runs_of(expected.versions)
        assert stream.kv_breaks == expected.breaks
        assert (stream.status, stream.reason, stream.slot, stream.length) == (
            expected.status,
            expected.reason,
            expected.slot,
            len(expected.token_ids),
        )


SEEDS = st.integers(0, 2**32)


@given(SEEDS, st.integers(0, 120), st.sampled_from([1, 5000, 1 << 20]))
@settings(max_examples=300)
def test_steps_fold_to_what_the_schedule_says(seed: int, actions_count: int, raw_bytes_max: int) -> None:
    schedule = Schedule(seed, actions_count)
    folded = TokenFold(raw_bytes_max=raw_bytes_max)
    for record in schedule.by_step:
        folded.add(record)
    check(folded.streams, schedule.told)
    assert dict(folded.slots) == {told.slot: folded.streams[name] for name, told in schedule.told.items()
                                  if told.slot is not None}  # fmt: skip


@given(SEEDS, st.integers(0, 60))
@settings(max_examples=100)
def test_chunks_fold_to_the_same_streams_as_steps(seed: int, actions_count: int) -> None:
    schedule = Schedule(seed, actions_count)
    told = {name: expected for name, expected in schedule.told.items() if expected.token_ids}
    for expected in told.values():
        expected.slot = None
    check(fold(schedule.by_chunk), told)


@given(SEEDS, st.integers(0, 40), st.data())
@settings(max_examples=100)
def test_any_prefix_folds_and_says_whom_each_record_touched(seed: int, actions_count: int, data: st.DataObject) -> None:
    schedule = Schedule(seed, actions_count)
    looks = data.draw(st.sets(st.integers(0, len(schedule.by_step))))
    folded, bare = TokenFold(), TokenFold(keeps_columns=False)
    for record in schedule.by_step:
        touched = folded.add(record)
        assert touched
        assert [stream for stream in touched if not stream.last_lsn == record.lsn >= stream.first_lsn] == []
        assert [stream.request for stream in bare.add(record)] == [stream.request for stream in touched]
        if record.lsn in looks:
            whole = fold(schedule.by_step[: record.lsn])
            assert {name: list(s.token_ids) for name, s in folded.streams.items()} == {
                name: list(s.token_ids) for name, s in whole.items()
            }
    for name, stream in folded.streams.items():
        other = bare.streams[name]
        assert (other.length, other.policy_versions, other.status, other.last_lsn) == (
            stream.length, stream.policy_versions, stream.status, stream.last_lsn,
        )  # fmt: skip
        assert not other.token_ids


def contradictions(folded: TokenFold) -> list[TokenRecord]:
    """Records that cannot follow what was folded."""
    wrong: list[TokenRecord] = [
        StepAppended(0, [(1, 0)], [99], [1], [0.0]),
        StepAppended(0, [(1, 0)], [99], [1, 2], [0.0, 0.0], [2]),
        RequestClosed(99, ""),
        RequestClosed("nobody", ""),
        KvBroken(99, 0, "kept"),
        RequestsAcknowledged(("nobody",)),
    ]
    for name, stream in folded.streams.items():
        wrong += [TokensAppended(name, stream.position - 1, (1,), (0.0,), 0)] if stream.position else []
        wrong.append(RoutesRecorded(name, stream.length, 0, 1, 2, 1, 1, 1, b"\1", b"\1"))
        wrong.append(KvBroken(name, stream.length + 1, "kept"))
        if stream.slot is None:
            wrong += [RequestOpened(name, 98), RequestClosed(name, ""), KvBroken(name, 0, "kept")]
            wrong.append(TokensAppended(name, stream.length, (1,), (0.0,), 0))
        else:
            wrong += [RequestOpened(name, 98), RequestOpened("new", stream.slot), RequestsAcknowledged((name,))]
            wrong.append(StepAppended(stream.length + 1, [(1, 0)], [stream.slot], [1], [0.0]))
            wrong.append(StepAppended(stream.length + 1, [(1, 0)], [stream.slot], [1, 2], [0.0, 0.0], [2]))
    return wrong


@given(SEEDS, st.integers(1, 40), st.data())
@settings(max_examples=60)
def test_a_record_that_contradicts_the_streams_is_refused_and_leaves_them(
    seed: int, actions_count: int, data: st.DataObject
) -> None:
    schedule = Schedule(seed, actions_count)
    looks = data.draw(st.sets(st.integers(0, len(schedule.by_step)), max_size=5))
    folded = TokenFold()
    for record in schedule.by_step:
        if record.lsn in looks:
            for wrong in contradictions(folded):
                with pytest.raises(StreamError) as refused:
                    folded.add(record._replace(payload=tokens.encode(wrong)))
                assert refused.value.lsn == record.lsn
        folded.add(record)
    check(folded.streams, schedule.told)


@given(SEEDS, st.integers(1, 40))
@settings(max_examples=60)
def test_a_step_that_is_there_twice_is_refused(seed: int, actions_count: int) -> None:
    records = Schedule(seed, actions_count).by_step
    for index, record in enumerate(records):
        if isinstance(tokens.decode(record.payload), StepAppended):
            with pytest.raises(StreamError, match="a step was lost or repeated"):
                fold([*records[: index + 1], record._replace(lsn=record.lsn + 1)])


@given(SEEDS, st.integers(0, 60), st.data())
@settings(max_examples=100)
def test_a_log_whose_first_part_was_dropped_folds_from_there(
    seed: int, actions_count: int, data: st.DataObject
) -> None:
    """Retention drops a prefix only if every request in it is closed and acknowledged."""
    schedule = Schedule(seed, actions_count)
    whole, last_of = TokenFold(), dict.fromkeys(schedule.told, 0)
    touched_by: list[set[str]] = []
    for record in schedule.by_step:
        touched_by.append({stream.request for stream in whole.add(record)})
        last_of |= dict.fromkeys(touched_by[-1], record.lsn)
    done = {name for name, told in schedule.told.items() if told.status == "acknowledged"}
    droppable = 0
    while droppable < len(touched_by) and touched_by[droppable] <= done:
        droppable += 1
    floor = data.draw(st.integers(0, droppable))
    dropped = set().union(*touched_by[:floor])
    rest = TokenFold()
    for record in schedule.by_step[floor:]:
        told = {stream.request for stream in rest.add(record)}
        assert told - dropped == touched_by[record.lsn - 1] - dropped
    check(rest.streams, {name: told for name, told in schedule.told.items() if name not in dropped})
