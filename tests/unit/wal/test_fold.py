"""What a log says of each request, and which records contradict it."""

from __future__ import annotations

from array import array

import pytest

from wal import Record, RecordInvalidError, token_stream, tokens
from wal.errors import StreamError
from wal.fold import TokenFold, fold
from wal.token_steps import step_head
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


def log_of(*records: TokenRecord, first_lsn: int = 1) -> list[Record]:
    return [Record(first_lsn + i, tokens.TOKENS, tokens.encode(record), "", 0) for i, record in enumerate(records)]


def folded(*records: TokenRecord, first_lsn: int = 1) -> TokenFold:
    fold = TokenFold()
    for record in log_of(*records, first_lsn=first_lsn):
        fold.add(record)
    return fold


def step(base: int, ids: dict[int, int], version: int = 1) -> StepAppended:
    return StepAppended(base, [(len(ids), version)], list(ids), list(ids.values()), [-0.5] * len(ids))


def routes(start: int, rows: int, who: int | str = 0) -> RoutesRecorded:
    return RoutesRecorded(who, start, 7, rows, 4, 1, 2, 1, bytes([(1 << rows) - 1]), bytes([1, 2] * rows))


AB = (RequestOpened("a", 0), RequestOpened("b", 1))


def test_a_stream_tells_everything_of_its_request() -> None:
    records = log_of(
        *AB,
        step(0, {0: 10, 1: 20}),
        step(2, {0: 11, 1: 21}),
        KvBroken(0, 1, "restored"),
        step(2, {0: 12}, version=2),
        routes(0, 2),
        RequestClosed(0, "stop"),
        RequestsAcknowledged(("a",)),
    )
    streams = fold(records)
    a, b = streams["a"], streams["b"]
    assert (a.token_ids, a.logprobs) == (array("I", [10, 11, 12]), array("f", [-0.5] * 3))
    assert a.policy_versions == [(0, 2, 1), (2, 1, 2)]
    assert (a.kv_breaks, a.routes, a.routes_end) == ([(1, "restored")], [routes(0, 2)], 2)
    assert (a.status, a.reason, a.slot, a.length, a.first_lsn, a.last_lsn) == ("acknowledged", "stop", None, 3, 1, 9)
    assert (b.status, b.reason, b.slot, b.length, b.first_lsn, b.last_lsn) == ("open", "", 1, 2, 2, 4)
    assert b.token_ids == array("I", [20, 21])


def test_records_of_other_kinds_are_passed_over() -> None:
    fold = TokenFold()
    assert fold.add(Record(1, 2, b"event", "", 0)) == ()
    assert fold.lsn == 1
    with pytest.raises(StreamError, match="slot 0 stands for no open request"):
        fold.add(Record(2, tokens.TOKENS, tokens.encode(step(0, {0: 1})), "", 0))
    assert fold.lsn == 1


def test_a_slot_that_changes_hands_between_two_steps_splits_its_row_only() -> None:
    records: list[TokenRecord] = [*AB, *(step(2 * i, {0: i, 1: 100 + i}) for i in range(20))]
    records += [RequestClosed(0, ""), RequestOpened("c", 0)]
    records += [step(20 + 2 * i, {0: 200 + i, 1: 120 + i}) for i in range(20)]
    fold = folded(*records)
    assert fold.streams["a"].token_ids == array("I", range(20))
    assert fold.streams["b"].token_ids == array("I", range(100, 140))
    assert fold.streams["c"].token_ids == array("I", range(200, 220))


def test_a_stream_that_was_looked_at_goes_on() -> None:
    fold = folded(*AB, step(0, {0: 10, 1: 20}))
    assert fold.streams["a"].token_ids == array("I", [10])
    for record in log_of(RequestClosed(1, ""), RequestOpened("c", 1), step(1, {0: 11, 1: 30}), first_lsn=4):
        fold.add(record)
    assert fold.streams["a"].token_ids == array("I", [10, 11])
    assert fold.streams["c"].token_ids == array("I", [30])


def test_a_request_may_sit_out_and_come_back() -> None:
    fold = folded(*AB, step(0, {0: 10, 1: 20}), step(1, {1: 21}), step(3, {1: 22, 0: 11}), step(5, {0: 12, 1: 23}))
    assert fold.streams["a"].token_ids == array("I", [10, 11, 12])
    assert fold.streams["b"].token_ids == array("I", [20, 21, 22, 23])


def test_a_step_may_give_a_request_several_tokens() -> None:
    uneven = StepAppended(2, [(1, 1), (1, 2)], [1, 0], [21, 22, 11], [-1.0] * 3, [2, 1])
    same = StepAppended(5, [(2, 2)], [1, 0], [23, 24, 12, 13], [-1.0] * 4, [2, 2])
    fold = folded(*AB, step(0, {0: 10, 1: 20}), uneven, same, step(9, {0: 14, 1: 25}))
    assert fold.streams["a"].token_ids == array("I", range(10, 15))
    assert fold.streams["b"].token_ids == array("I", range(20, 26))
    assert fold.streams["a"].policy_versions == [(0, 1, 1), (1, 3, 2), (4, 1, 1)]
    assert fold.streams["b"].policy_versions == [(0, 3, 1), (3, 2, 2), (5, 1, 1)]
    assert fold.streams["a"].last_lsn == 6


def test_raw_steps_are_turned_into_streams_at_their_bound() -> None:
    bounded = TokenFold(raw_bytes_max=300)
    for record in log_of(*AB, *(step(2 * i, {0: i, 1: 100 + i}) for i in range(50))):
        bounded.add(record)
    assert len(bounded.streams["a"].id_column) == 38
    assert bounded.streams["a"].token_ids == array("I", range(50))


def test_a_row_is_cut_where_its_slot_changed_hands() -> None:
    """Of 40 steps of 10,000 rows; slot 0 changes hands before the 37th."""
    rows, steps_count = 10_000, 40
    requests: list[TokenRecord] = [RequestOpened(f"r{i}", i) for i in range(rows)]
    records = log_of(*requests)
    fold = TokenFold()
    for record in records:
        fold.add(record)
    base = 0
    for index in range(steps_count):
        if index == 36:
            for record in log_of(RequestClosed(0, ""), RequestOpened("late", 0), first_lsn=fold.lsn + 1):
                fold.add(record)
            base -= 36
        fold.add(log_of(step(base, dict.fromkeys(range(rows), index)), first_lsn=fold.lsn + 1)[0])
        base += rows
    assert fold.streams["r0"].token_ids == array("I", range(36))
    assert fold.streams["late"].token_ids == array("I", range(36, 40))
    assert fold.streams["r9999"].token_ids == array("I", range(40))


def test_a_vacant_row_is_nobodys() -> None:
    fold = folded(*AB, step(0, {0: 10, 1: 20}), RequestClosed(1, ""))
    assert fold.streams["b"].token_ids == array("I", [20])
    fold.add(log_of(step(1, {0: 11}), first_lsn=5)[0])
    assert fold.streams["b"].token_ids == array("I", [20])
    assert fold.streams["a"].token_ids == array("I", [10, 11])


def test_a_request_of_chunks_may_be_given_a_slot() -> None:
    fold = folded(
        TokensAppended("a", 0, (1, 2), (-1.0, -1.0), 3), RequestOpened("a", 5), step(2, {5: 3}, version=3)
    )  # fmt: skip
    assert fold.streams["a"].token_ids == array("I", [1, 2, 3])
    assert fold.streams["a"].policy_versions == [(0, 3, 3)]


def test_a_request_of_chunks_is_closed_by_its_id() -> None:
    fold = folded(TokensAppended("a", 0, (1, 2), (-1.0, -1.0), 3), RequestClosed("a", "stop"))
    assert (fold.streams["a"].status, fold.streams["a"].reason, fold.streams["a"].length) == ("closed", "stop", 2)


def test_a_fold_without_columns_knows_lengths_and_states() -> None:
    fold = TokenFold(keeps_columns=False)
    for record in log_of(*AB, step(0, {0: 1, 1: 2}), TokensAppended("a", 1, (2, 3), (-1.0, -1.0), 1), routes(0, 3)):
        fold.add(record)
    a = fold.streams["a"]
    assert (a.length, a.token_ids, a.logprobs, a.routes, a.routes_end) == (3, array("I"), array("f"), [], 3)


@pytest.mark.parametrize(
    ("records", "request_", "why"),
    [
        ([step(0, {5: 1})], "", "slot 5 stands for no open request"),
        ([step(1, {0: 1})], "", "its base is 1, its rows have 0 tokens: a step was lost or repeated"),
        ([step(0, {0: 1}), step(2, {0: 1})], "", "its base is 2, its rows have 1 tokens"),
        ([step(0, {0: 1, 1: 1}), RequestClosed(0, ""), step(2, {0: 1, 1: 1})], "", "slot 0 stands for no open request"),
        ([StepAppended(1, [(1, 1)], [0], [1, 2], [-1, -1], [2])], "", "its base is 1, its rows have 0 tokens"),
        ([RequestOpened("c", 1)], "c", "slot 1 is opened for it but stands for 'b'"),
        ([RequestOpened("a", 5)], "a", "it is opened as slot 5 but is open as slot 0"),
        ([RequestClosed(0, ""), RequestOpened("a", 0)], "a", "it is closed"),
        ([RequestClosed(9, "")], "", "slot 9 stands for no open request"),
        ([RequestClosed("c", "")], "c", "the log knows no such request"),
        ([RequestClosed("a", ""), RequestClosed("a", "")], "a", "it is closed"),
        ([step(0, {0: 1}), TokensAppended("a", 0, (1,), (-1.0,), 1)], "a", "its tokens start at 0, .* is at 1 already"),
        (
            [TokensAppended("c", 7, (1,), (-1.0,), 1), TokensAppended("c", 7, (1,), (-1.0,), 1)],
            "c",
            "its tokens start at 7, the stream is at 8 already",
        ),
        ([RequestClosed(0, ""), TokensAppended("a", 0, (1,), (-1.0,), 1)], "a", "it is closed"),
        ([KvBroken(0, 1, "kept")], "a", "its KV breaks at 1, the stream has 0 tokens"),
        ([RequestClosed(0, ""), KvBroken("a", 0, "kept")], "a", "it is closed"),
        ([routes(0, 1)], "a", "routes of tokens 0 to 0 do not fit: 0 are recorded of 0"),
        ([step(0, {0: 1}), routes(0, 1), routes(0, 1)], "a", "routes of tokens 0 to 0 do not fit: 1 are recorded of 1"),
        ([RequestClosed(0, ""), RequestsAcknowledged(("a",)), routes(0, 1, "a")], "a", "after its acknowledgement"),
        ([RequestsAcknowledged(("a",))], "a", "it is acknowledged before its close"),
        ([RequestsAcknowledged(("c",))], "c", "the log knows no such request"),
        ([RequestClosed(0, ""), RequestsAcknowledged(("a",)), RequestOpened("a", 0)], "a", "it is acknowledged"),
    ],
)
def test_a_record_that_contradicts_the_log_is_refused(records: list[TokenRecord], request_: str, why: str) -> None:
    fold = folded(*AB, *records[:-1])
    lsn = fold.lsn + 1
    with pytest.raises(StreamError, match=why) as refused:
        fold.add(log_of(records[-1], first_lsn=lsn)[0])
    assert (refused.value.lsn, refused.value.request) == (lsn, request_)
    assert f"the token record of lsn {lsn}" in str(refused.value)
    assert fold.lsn == lsn - 1


def test_a_request_may_be_acknowledged_again() -> None:
    fold = folded(*AB, RequestClosed(0, ""), RequestsAcknowledged(("a",)), RequestsAcknowledged(("a",)))
    assert fold.streams["a"].status == "acknowledged"


def test_a_payload_outside_the_schema_is_refused_with_its_lsn() -> None:
    fold = folded(*AB, step(0, {0: 1}))
    with pytest.raises(RecordInvalidError, match="lsn 4: tokens record: type is 9"):
        fold.add(Record(4, tokens.TOKENS, b"\x09", "", 0))
    infinite = bytearray(tokens.encode(step(1, {0: 1})))
    infinite[-2:] = b"\x80\x7f"
    with pytest.raises(RecordInvalidError, match=r"logprobs must be finite \(lsn 4\)"):
        fold.add(Record(4, tokens.TOKENS, bytes(infinite), "", 0))
    assert fold.streams["a"].token_ids == array("I", [1])


def test_an_acknowledged_request_can_be_forgotten() -> None:
    fold = folded(*AB, step(0, {0: 1, 1: 2}), RequestClosed(0, ""))
    with pytest.raises(StreamError, match="it is closed: only acknowledged requests can be forgotten"):
        fold.forget("a")
    for record in log_of(RequestsAcknowledged(("a",)), first_lsn=5):
        fold.add(record)
    fold.forget("a")
    assert list(fold.streams) == ["b"]
    assert fold.add(log_of(RequestsAcknowledged(("a",)), first_lsn=6)[0]) == []
    with pytest.raises(StreamError, match="a token record contradicts the stream of request 'a'"):
        fold.forget("a")
    assert fold.streams["b"].token_ids == array("I", [2])


def test_the_next_base_is_the_sum_of_the_rows_lengths() -> None:
    fold = folded(*AB, step(0, {0: 1, 1: 2}), step(2, {0: 1, 1: 2}))
    both, one = step_head([0, 1], [(2, 1)]), step_head([0], [(1, 1)])
    assert fold.base_of(both, [0, 1]) == 4
    assert fold.base_of(one, [0]) == 2
    for record in log_of(RequestClosed(1, ""), RequestOpened("c", 1), first_lsn=5):
        fold.add(record)
    assert fold.base_of(both, [0, 1]) == 2
    with pytest.raises(StreamError, match="a token record contradicts the stream: slot 7 stands"):
        fold.base_of(one, [7])


def test_chunks_say_where_in_the_context_their_tokens_stand() -> None:
    stream = folded(
        TokensAppended("c", 372, (1, 2), (-1.0, -1.0), 1),
        TokensAppended("c", 374, (3,), (-1.0,), 1),
        TokensAppended("c", 400, (4,), (-1.0,), 1),
    ).streams["c"]
    assert list(stream.token_ids) == [1, 2, 3, 4]
    assert stream.places == [(0, 372), (3, 400)]
    assert (stream.length, stream.position) == (4, 401)
    assert folded(*AB, step(0, {0: 1})).streams["a"].places == []


def test_what_names_a_request_of_the_dropped_part_is_passed_over() -> None:
    """Before lsn 10, request "x" had slot 3 and 4 tokens, "y" came in chunks; both are acknowledged later."""
    fold = folded(
        RequestOpened("a", 0),
        step(4, {0: 1, 3: 2}),
        step(6, {0: 1, 3: 2}),
        KvBroken(3, 0, "kept"),
        KvBroken("y", 0, "kept"),
        routes(0, 1, 3),
        routes(0, 1, "y"),
        TokensAppended("y", 7, (1,), (-1.0,), 0),
        RequestClosed("y", ""),
        RequestClosed(3, ""),
        RequestClosed(4, ""),
        RequestsAcknowledged(("x", "y")),
        step(2, {0: 9}),
        first_lsn=10,
    )
    assert list(fold.streams) == ["a", "y"]
    assert fold.streams["a"].token_ids == array("I", [1, 1, 9])
    assert (fold.streams["y"].places, fold.streams["y"].status) == ([(0, 7)], "acknowledged")
    assert list(fold.slots) == [0]
    with pytest.raises(StreamError, match="its base is 7"):
        fold.add(log_of(step(7, {0: 1}), first_lsn=23)[0])


def test_an_acknowledgement_stands_for_a_close_that_may_have_named_a_slot_of_the_dropped_part() -> None:
    records = TokensAppended("y", 7, (1,), (-1.0,), 0), RequestClosed(3, ""), RequestsAcknowledged(("y",))
    assert folded(*records, first_lsn=10).streams["y"].status == "acknowledged"
    with pytest.raises(StreamError, match="before its close"):
        folded(*records[::2])


def test_a_slot_of_the_dropped_part_is_free_once_it_is_opened_again() -> None:
    fold = folded(
        RequestOpened("a", 0),
        step(4, {0: 1, 3: 2}),
        RequestClosed("x", "of the dropped part"),
        RequestOpened("b", 3),
        step(1, {0: 1, 3: 2}),
        first_lsn=10,
    )
    assert fold.streams["b"].token_ids == array("I", [2])
    assert fold.slots[3].request == "b"


def test_columns_are_turned_on_a_big_endian_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_stream, "IS_BIG_ENDIAN", True)
    fold = folded(*AB, *(step(2 * i, {0: 1 << 24, 1: 2}) for i in range(9)))
    assert fold.streams["a"].token_ids == array("I", [1] * 9)
    assert fold.streams["b"].token_ids == array("I", [2 << 24] * 9)
