"""Bounds on size and age: what they keep, and what is said when they cannot be kept."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from wal.pins import pin
from wal.retention import BoundPassed, Holder, RetentionPolicy

DIRECTORY = Path("/log")


HISTORY_BYTES = (1 << 20) + 3 * (48 + 32)
"""A newest segment with the space that it reserves, and three sealed ones of one short record."""


def test_released_history_is_kept_up_to_the_bound_on_bytes(owning: Callable[..., Any]) -> None:
    owner = owning(RetentionPolicy(keep_bytes_max=HISTORY_BYTES))
    owner.write(*["note"] * 3)
    assert owner.run_pass().dropped == ()
    owner.write(*["note"] * 3)
    report = owner.run_pass()
    assert report.log_bytes <= HISTORY_BYTES
    assert owner.lsns()[-1] == 6
    assert report.passed == ()


def test_released_history_is_kept_up_to_the_bound_on_age(owning: Callable[..., Any]) -> None:
    owner = owning(RetentionPolicy(keep_age_s_max=10))
    for now_s in (100.0, 105.0, 110.0, 115.0):
        owner.disk.now_s = now_s
        owner.write("note")
    assert owner.run_pass().floor_lsn == 2
    owner.disk.now_s = 115.5
    assert owner.run_pass().floor_lsn == 3
    owner.disk.now_s = 1000.0
    assert owner.run_pass().floor_lsn == 4


def test_either_bound_lets_go_when_both_are_set(owning: Callable[..., Any]) -> None:
    owner = owning(RetentionPolicy(keep_bytes_max=1 << 40, keep_age_s_max=10))
    owner.write("note", "note")
    owner.disk.now_s = 11.0
    assert owner.run_pass().floor_lsn == 2


@pytest.mark.parametrize("field", ["keep_bytes_max", "keep_age_s_max"])
def test_a_bound_below_zero_is_refused_by_name(field: str) -> None:
    with pytest.raises(ValueError, match=f"{field} is -1, must be at least 0 or None"):
        RetentionPolicy(**{field: -1})


def test_a_bound_that_may_not_be_kept_is_told_loudly_and_nothing_is_deleted(
    owning: Callable[..., Any],
    caplog: pytest.LogCaptureFixture,
) -> None:
    owner = owning(RetentionPolicy(keep_bytes_max=100, keep_age_s_max=5))
    owner.write("open a", "open b", "use a", "note")
    pin(DIRECTORY, "backup", 2, storage=owner.disk)
    owner.disk.now_s = 20.0
    report = owner.run_pass()
    assert owner.lsns() == [1, 2, 3, 4]
    assert report.holders == (Holder(1, "request", "a"), Holder(2, "pin", "backup"), Holder(2, "request", "b"))
    assert [passed.name for passed in report.passed] == ["keep_bytes_max", "keep_age_s_max"]
    assert report.passed[1] == BoundPassed("keep_age_s_max", 5, 20.0)
    assert report.passed[0].excess == report.log_bytes - 100
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert record.getMessage() == (
        f"log /log is {report.log_bytes - 100} bytes above keep_bytes_max = 100 and 15 s above keep_age_s_max = 5 "
        f"and may not drop its oldest segment 0000000000000001-00000000.wal ({report.log_bytes} bytes in 4 segments): "
        "needed by request 'a' (from lsn 1), pin 'backup' (from lsn 2), request 'b' (from lsn 2). "
        "Nothing was deleted that is still needed. "
        "Way out: end and acknowledge these requests, unpin, or raise the bound"
    )


def test_a_warning_comes_again_only_when_the_case_has_changed(
    owning: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "wal.retention")
    owner = owning(RetentionPolicy(keep_age_s_max=10))
    owner.write("open a", "open b", "note")
    for now_s in (18.0, 19.0, 20.0):
        owner.disk.now_s = now_s
        owner.run_pass()
    assert len(caplog.messages) == 1
    owner.disk.now_s = 27.0
    owner.run_pass()
    assert len(caplog.messages) == 2, "the excess has doubled"
    owner.write("release a")
    owner.run_pass()
    assert len(caplog.messages) == 3, "the oldest holder is another"
    owner.write("release b", "note")
    owner.run_pass()
    owner.run_pass()
    assert caplog.messages[3:] == ["log /log is within its retention bounds again"]


def test_a_newest_segment_above_the_bound_is_no_reason_to_warn(
    owning: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    owner = owning(RetentionPolicy(keep_bytes_max=1))
    owner.write("open a")
    report = owner.run_pass()
    assert report.log_bytes > 1
    assert (report.passed, caplog.messages) == ((), [])


def test_a_warning_and_a_report_name_only_the_oldest_holders(
    owning: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    owner = owning(RetentionPolicy(keep_bytes_max=1))
    hostile = "\x1b[2J" + "x" * 200
    owner.write(f"open {hostile}", *(f"open r{index}" for index in range(11)), "note")
    report = owner.run_pass()
    assert (len(report.holders), report.holders_count) == (8, 12)
    (message,) = caplog.messages
    assert "request '\\x1b[2J" + "x" * 60 + "...' (from lsn 1)" in message
    assert "request 'r6' (from lsn 8) and 4 more." in message


def test_a_warning_tells_of_held_and_of_untold_records(
    owning: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    owner = owning(RetentionPolicy(keep_bytes_max=1))
    owner.write("hold")
    owner.log.append(9, b"note")
    owner.log.append(9, b"note")
    owner.log.sync()
    owner.run_pass()
    assert (
        "a record that is held for good (from lsn 1), records that retention was not told of (from lsn 2)"
        in (caplog.messages[0])
    )
