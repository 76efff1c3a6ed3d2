"""Which requests of the token schema a log must keep."""

from pathlib import Path

import pytest

from wal import Log, Record, RecordInvalidError, tokens
from wal.requests import TokenRequests
from wal.retention import Retention
from wal.testing import FaultyStorage
from wal.tokens import (
    KvBroken,
    RequestClosed,
    RequestOpened,
    RequestsAcknowledged,
    StepAppended,
    TokenRecord,
    TokensAppended,
)

DIRECTORY = Path("/log")


def chunk(request: str, start: int = 0) -> TokensAppended:
    return TokensAppended(request, start, (7,), (-0.5,), 1)


def step(*slots: int) -> StepAppended:
    return StepAppended(0, ((len(slots), 1),), slots, (7,) * len(slots), (-0.5,) * len(slots))


def live_after(*records: TokenRecord, first_lsn: int = 1) -> list[str]:
    """Which of a, b, c, d are live after these records."""
    requests = TokenRequests()
    for lsn, record in enumerate(records, first_lsn):
        requests.requests_of(Record(lsn, tokens.TOKENS, tokens.encode(record), "", 0))
    return [request for request in "abcd" if not requests.is_released(request)]


def test_a_request_is_live_from_its_opening_to_its_close_and_acknowledgement() -> None:
    records = [RequestOpened("a", 0), step(0), RequestClosed(0, "eos"), RequestsAcknowledged(("a",))]
    assert [live_after(*records[:count]) for count in range(5)] == [[], ["a"], ["a"], ["a"], []]


def test_a_chunk_opens_its_request_and_a_close_may_name_it() -> None:
    records = [chunk("a"), chunk("a", 1), RequestClosed("a", "eos"), RequestsAcknowledged(("a",))]
    assert [live_after(*records[:count]) for count in range(5)] == [[], ["a"], ["a"], ["a"], []]


def test_a_slot_stands_for_the_request_that_opened_it_last() -> None:
    records = [RequestOpened("a", 3), RequestClosed("a", ""), RequestOpened("b", 3), RequestClosed(3, "")]
    assert live_after(*records, RequestsAcknowledged(("a",))) == ["b"]
    assert live_after(*records, RequestsAcknowledged(("b",))) == ["a"]
    assert live_after(*records, RequestsAcknowledged(("b", "a"))) == []


def test_an_acknowledgement_without_a_close_releases_nothing() -> None:
    assert live_after(RequestOpened("a", 0), RequestsAcknowledged(("a",))) == ["a"]


def test_what_speaks_of_a_request_that_was_dropped_keeps_nothing_but_a_chunk_until_its_acknowledgement() -> None:
    strangers = [step(0, 1), chunk("c", 5), KvBroken(1, 3, "kept"), RequestClosed(0, ""), RequestClosed("d", "")]
    assert live_after(*strangers, first_lsn=9) == ["c"]
    assert live_after(*strangers, RequestsAcknowledged(("b", "c", "d")), first_lsn=9) == []


def test_a_chunk_whose_beginning_is_missing_in_a_whole_log_is_kept_in_doubt() -> None:
    assert live_after(chunk("a", 5)) == ["a"]


def test_records_of_other_kinds_belong_to_nobody_and_a_bad_payload_is_refused() -> None:
    requests = TokenRequests()
    assert requests.requests_of(Record(1, 2, tokens.encode(chunk("a")), "", 0)) == ()
    assert requests.requests_of(Record(2, tokens.TOKENS, b"", "", 0)) == ()
    with pytest.raises(RecordInvalidError, match="of its head"):
        requests.requests_of(Record(3, tokens.TOKENS, b"\x02", "", 0))


def test_a_log_of_steps_shrinks_as_its_requests_are_acknowledged() -> None:
    disk = FaultyStorage()
    log = Log.open(DIRECTORY, storage=disk, segment_bytes_max=1)
    retention = Retention(DIRECTORY, TokenRequests(), storage=disk)
    records = [RequestOpened("a", 0), step(0), RequestOpened("b", 1), step(0, 1), RequestClosed(0, "eos")]
    for record in (*records, RequestsAcknowledged(("a",)), step(1), step(1)):
        log.append(tokens.TOKENS, tokens.encode(record))
    log.sync()
    retention.catch_up()
    report = retention.run_pass()
    assert (report.floor_lsn, [holder.name for holder in report.holders]) == (3, ["b"])
    late = Retention(DIRECTORY, TokenRequests(), storage=disk)
    late.catch_up()
    assert late.run_pass().holders == report.holders
    log.close()
