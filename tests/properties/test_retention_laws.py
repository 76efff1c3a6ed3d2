"""Laws of retention, over drawn schedules of requests, pins, segments, passes and crashes."""

import itertools
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from wal import Log, Outcome, Reader, Record, tokens
from wal.errors import DroppedError
from wal.fold import fold
from wal.pins import Pin, pin, pins_of, unpin
from wal.requests import TokenRequests
from wal.retention import Retention, RetentionPolicy, RetentionReport
from wal.segments import find_segments
from wal.testing import FaultyStorage, TextRequests
from wal.token_stream import Stream
from wal.tokens import RequestClosed, RequestOpened, RequestsAcknowledged, StepAppended, TokensAppended

DIRECTORY = Path("/log")
NAMES = st.sampled_from("abcdef")
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("open"), NAMES),
        st.tuples(st.sampled_from(["use", "release"]), st.lists(NAMES, min_size=1, max_size=3).map(" ".join)),
        st.tuples(st.sampled_from(["note", "sync", "pass", "reopen", "crash", "unpin"]), st.just("")),
        st.tuples(st.just("pin"), st.integers(1, 60)),
    ),
    min_size=10,
    max_size=60,
)


class Model:
    """A log, its retention, and all that was ever appended, to judge the passes by the rule's own words."""

    def __init__(self, segment_bytes_max: int, policy: RetentionPolicy | None = None) -> None:
        self.disk = FaultyStorage()
        self.bounds = segment_bytes_max
        self.policy = policy
        self.history: dict[int, str] = {}
        self.ever: set[str] = set()
        self.live: dict[str, str] = {}
        self.told_lsn = 0
        self.open()

    def open(self) -> None:
        self.log = Log.open(DIRECTORY, storage=self.disk, segment_bytes_max=self.bounds)
        self.history = {lsn: text for lsn, text in self.history.items() if lsn < self.log.next_lsn}
        opened = {name for text in self.history.values() if text.startswith("open") for name in text.split()[1:]}
        self.live = {name: fresh for name, fresh in self.live.items() if fresh in opened}
        self.requests = TextRequests()
        self.retention = Retention(DIRECTORY, self.requests, self.policy, storage=self.disk, clock=lambda: 0.0)
        self.told_lsn = 0
        self.tell()

    def tell(self) -> None:
        for record in Reader(DIRECTORY, after_lsn=self.told_lsn, storage=self.disk):
            self.retention.add(record)
            self.told_lsn = record.lsn

    def append(self, text: str) -> None:
        """An id is used once: a name that was opened before gets a fresh number behind it."""
        verb, *names = text.split()
        if verb == "open":
            fresh = f"{names[0]}{len(self.ever)}"
            self.ever.add(fresh)
            self.live[names[0]] = fresh
        words = [verb, *(self.live[name] for name in names if name in self.live)]
        self.history[self.log.append(9, " ".join(words).encode())] = " ".join(words)

    def released(self) -> set[str]:
        """Requests that a record which was told of has released."""
        told = [text.split() for lsn, text in sorted(self.history.items()) if lsn <= self.told_lsn]
        return {name for verb, *names in told if verb == "release" for name in names}

    def droppable(self) -> list[str]:
        """By the rule, segment by segment, record by record: the longest prefix that may go."""
        released, pins = self.released(), pins_of(self.disk.names(DIRECTORY))
        segments = find_segments(self.disk, DIRECTORY)
        names = []
        for segment, following in itertools.pairwise(segments):
            for lsn in range(segment.first_lsn, following.first_lsn):
                owners = self.history[lsn].split()[1:]
                is_pinned = any(held.lsn <= lsn for held in pins)
                if is_pinned or lsn > self.told_lsn or not released.issuperset(owners):
                    return names
            names.append(segment.name)
        return names

    def check_readable(self) -> None:
        """What is left is dense, unchanged, and holds every record of every request that is not released."""
        reader = Reader(DIRECTORY, storage=self.disk)
        found = {record.lsn: record.payload.decode() for record in reader}
        assert reader.outcome is Outcome.END
        assert [(lsn, text) for lsn, text in found.items() if self.history[lsn] != text] == []
        if found:
            assert sorted(found) == list(range(min(found), max(found) + 1))
        written = range(1, reader.next_lsn)
        released = self.released()
        for lsn in written:
            if not released.issuperset(self.history[lsn].split()[1:]):
                assert lsn in found

    def run_pass(self) -> RetentionReport:
        expected = self.droppable()
        report = self.retention.run_pass()
        if self.policy is None:
            assert list(report.dropped) == expected
        else:
            assert list(report.dropped) == expected[: len(report.dropped)]
        return report

    def do(self, verb: str, argument: str | int, seed: int) -> None:
        if verb == "sync":
            self.log.sync()
            self.tell()
        elif verb == "pass":
            self.run_pass()
            self.check_readable()
        elif verb == "reopen":
            self.log.close()
            self.open()
        elif verb == "crash":
            self.log.flush()
            self.disk = self.disk.restart("mixed", seed)
            self.open()
        elif verb == "pin":
            self.pin(int(argument))
        elif verb == "unpin":
            unpin(DIRECTORY, "p", storage=self.disk)
        else:
            self.append(f"{verb} {argument}")

    def pin(self, lsn: int) -> None:
        first_lsn = find_segments(self.disk, DIRECTORY)[0].first_lsn
        try:
            pin(DIRECTORY, "p", lsn, storage=self.disk)
        except DroppedError:
            assert lsn < first_lsn
        else:
            assert lsn >= first_lsn
            assert pins_of(self.disk.names(DIRECTORY)) == [Pin(lsn, "p")]


@given(STEPS, st.sampled_from([1, 150, 400]), st.integers(0, 2**32))
@settings(max_examples=200)
def test_a_pass_drops_the_longest_prefix_that_may_go_and_nothing_else(
    steps: list[tuple[str, str | int]], segment_bytes_max: int, seed: int
) -> None:
    model = Model(segment_bytes_max)
    for verb, argument in steps:
        model.do(verb, argument, seed)
    model.log.sync()
    model.tell()
    model.run_pass()
    model.check_readable()
    assert model.run_pass().dropped == ()


@given(STEPS, st.integers(0, 100), st.integers(0, 2**32))
@settings(max_examples=100)
def test_bounds_keep_released_history_and_never_cost_what_may_not_go(
    steps: list[tuple[str, str | int]], keep_percent: int, seed: int
) -> None:
    """The bound is a share of what the sealed segments hold in the end; until then nothing is dropped."""
    model = Model(1, RetentionPolicy(keep_bytes_max=1 << 40))
    for verb, argument in steps:
        model.do(verb, argument, seed)
    model.log.sync()
    model.tell()
    sizes = {s.name: model.disk.stat(DIRECTORY / s.name).size_bytes for s in find_segments(model.disk, DIRECTORY)}
    *sealed, newest = sizes.values()
    keep_bytes_max = newest + sum(sealed) * keep_percent // 100
    model.retention.policy = RetentionPolicy(keep_bytes_max=keep_bytes_max)
    report = model.run_pass()
    model.check_readable()
    left = model.droppable()
    assert report.log_bytes <= keep_bytes_max or not left, "a bound is kept as far as it may be"
    assert bool(report.passed) == (report.log_bytes > keep_bytes_max and report.segments_count > 1)
    if report.dropped:
        assert report.log_bytes + sizes[report.dropped[-1]] > keep_bytes_max, "history within the bound stays"


class Engine:
    """Requests that join, are sampled in steps or chunks, end, and are acknowledged; a chunk request has no slot."""

    def __init__(self) -> None:
        self.disk = FaultyStorage()
        self.log = Log.open(DIRECTORY, storage=self.disk, segment_bytes_max=200)
        self.slots: dict[int, str] = {}
        self.lengths: dict[str, int] = {}
        self.running: list[str] = []
        self.closed: list[str] = []

    def append(self, record: tokens.TokenRecord) -> None:
        self.log.append(tokens.TOKENS, tokens.encode(record))

    def join(self, has_slot: bool) -> None:
        request = f"r{len(self.lengths)}"
        self.lengths[request] = 0
        self.running.append(request)
        if has_slot:
            slot = next(slot for slot in range(9) if slot not in self.slots)
            self.slots[slot] = request
            self.append(RequestOpened(request, slot))
        else:
            self.append(TokensAppended(request, 0, (9,), (-1.0,), 1))
            self.lengths[request] = 1

    def step(self, counts: list[int]) -> None:
        rows = list(zip(self.slots, counts, strict=False))
        if not rows:
            return
        slots = tuple(slot for slot, _ in rows)
        total = sum(count for _, count in rows)
        base = sum(self.lengths[self.slots[slot]] for slot in slots)
        self.append(StepAppended(base, ((len(rows), 1),), slots, (7,) * total, (-0.5,) * total, [c for _, c in rows]))
        for slot, count in rows:
            self.lengths[self.slots[slot]] += count

    def extend(self, which: int) -> None:
        loose = [name for name in self.running if name not in self.slots.values()]
        if loose:
            name = loose[which % len(loose)]
            self.append(TokensAppended(name, self.lengths[name], (5, 6), (-1.0, -2.0), 2))
            self.lengths[name] += 2

    def end(self, which: int) -> None:
        if self.running:
            name = self.running.pop(0 if which else -1)  # mostly the oldest, so that there is something to drop
            slot = next((slot for slot, held in self.slots.items() if held == name), None)
            self.append(RequestClosed(name if slot is None else slot, "eos"))
            self.slots = {held: other for held, other in self.slots.items() if other != name}
            self.closed.append(name)

    def acknowledge(self, count: int) -> None:
        acknowledged, self.closed = self.closed[:count], self.closed[count:]
        if acknowledged:
            self.append(RequestsAcknowledged(tuple(acknowledged)))

    def do(self, verb: str, number: int, counts: list[int]) -> None:
        match verb:
            case "join":
                if len(self.slots) < 4:
                    self.join(number % 3 > 0)
            case "step":
                self.step(counts)
            case "extend":
                self.extend(number)
            case "end":
                self.end(number)
            case _:
                self.acknowledge(number)


ENGINE_STEPS = st.lists(
    st.tuples(
        st.sampled_from(["join", "step", "extend", "end", "end", "acknowledge"]),
        st.integers(0, 5),
        st.lists(st.integers(1, 2), min_size=4, max_size=4),
    ),
    min_size=30,
    max_size=120,
)


@given(ENGINE_STEPS)
@settings(max_examples=80)
def test_the_streams_of_live_requests_are_the_same_after_their_log_was_cut(
    steps: list[tuple[str, int, list[int]]],
) -> None:
    engine = Engine()
    for step in steps:
        engine.do(*step)
    engine.log.close()
    whole = fold(Reader(DIRECTORY, storage=engine.disk))
    retention = Retention(DIRECTORY, TokenRequests(), storage=engine.disk)
    retention.catch_up()
    retention.run_pass()
    cut = fold(Reader(DIRECTORY, storage=engine.disk))
    for request, stream in whole.items():
        if stream.status != "acknowledged":
            assert seen(cut[request]) == seen(stream)
    again = Retention(DIRECTORY, TokenRequests(), storage=engine.disk)
    again.catch_up()
    assert again.run_pass().dropped == ()


def seen(stream: Stream) -> tuple[object, ...]:
    return stream.request, stream.status, list(stream.token_ids), list(stream.logprobs), stream.first_lsn


@given(st.lists(st.integers(0, 2), min_size=1, max_size=40))
def test_the_table_of_holders_is_as_small_as_the_live_requests(kinds: list[int]) -> None:
    """A million records of one request cost what one record costs."""
    requests = TextRequests()
    retention = Retention(DIRECTORY, requests, storage=FaultyStorage())
    for lsn, kind in enumerate(kinds, 1):
        text = ("open a", "use a", "release a")[kind]
        retention.add(Record(lsn, 9, text.encode(), "", 0))
        assert set(retention._held) == requests.live
