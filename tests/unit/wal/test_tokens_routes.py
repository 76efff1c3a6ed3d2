"""Kind 1, type 5: expert routes, their byte table and what a buffer that was never filled looks like."""

import re
import struct
from dataclasses import replace

import pytest

from wal import RecordInvalidError, token_routes
from wal.tokens import RoutesRecorded, as_json, decode, encode

NARROW = RoutesRecorded("r", 4, 9, 3, 256, 2, 2, 1, b"\x05", bytes((1, 2, 3, 0, 0, 0, 0, 0, 255, 6, 0, 8)))
"""Row 1 is not valid."""
WIDE = RoutesRecorded(3, 4, 9, 2, 300, 1, 2, 2, b"\x03", struct.pack("<4H", 299, 0, 1, 257))
SINGLE = RoutesRecorded(3, 0, 0, 2, 4, 2, 1, 1, b"\x03", bytes((0, 1, 3, 0)))


def test_routes_have_the_bytes_of_their_table() -> None:
    assert encode(NARROW) == bytes.fromhex(
        "05 01 01 00 00 00 00 00 04 00 00 00 00 00 00 00 09 00 00 00 00 00 00 00"
        "03 00 00 00 00 01 00 00 02 00 02 00 00 00 00 00 72 05 01 02 03 00 00 00 00 00 ff 06 00 08"
    )


@pytest.mark.parametrize("record", [NARROW, WIDE, SINGLE, replace(NARROW, validity=b"\0", expert_ids=bytes(12))])
def test_routes_are_read_back(record: RoutesRecorded) -> None:
    assert decode(encode(record)) == record


def test_routes_are_shown_as_json() -> None:
    shown = as_json(encode(WIDE))
    assert (shown["type"], shown["slot"], shown["validity"], shown["expert_ids"]) == (
        "routes", 3, "03", "2b01000001000101",
    )  # fmt: skip


def test_valid_rows_are_told() -> None:
    assert list(NARROW.valid_rows()) == [0, 2]


@pytest.mark.parametrize(
    ("record", "change", "named"),
    [
        (NARROW, {"start": -1}, "start must be an integer"),
        (NARROW, {"router_version": 2**64}, "router_version must be an integer"),
        (NARROW, {"rows_count": 2**32}, "rows_count must be an integer"),
        (NARROW, {"rows_count": 0, "validity": b"", "expert_ids": b""}, "rows_count must be 1 or more"),
        (NARROW, {"experts_count": -1}, "experts_count must be an integer"),
        (NARROW, {"experts_count": 257}, "experts_count must fit 1 bytes, is 257"),
        (NARROW, {"width": 3}, "width must be 1 or 2 bytes, is 3"),
        (NARROW, {"layers_count": 0}, "layers_count must be in 1..65535, is 0"),
        (NARROW, {"layers_count": 65536}, "layers_count must be in 1..65535"),
        (NARROW, {"top_k": 0}, "top_k must be in 1..256, is 0"),
        (NARROW, {"top_k": 257}, "top_k must be in 1..256, is 257"),
        (NARROW, {"validity": b""}, "validity must have 1 bytes for 3 rows, has 0"),
        (NARROW, {"validity": b"\x0d"}, "validity must have zeros behind its last row"),
        (NARROW, {"expert_ids": bytes(11)}, "expert_ids must have 12 bytes, have 11"),
        (NARROW, {"validity": b"\x01"}, "expert_ids must be zeros in rows that are not valid"),
        (NARROW, {"validity": b"\x07"}, "expert_ids must be distinct within a layer: row 1, layer 0"),
        (NARROW, {"expert_ids": NARROW.expert_ids[:-1] + b"\0"}, "distinct within a layer: row 2, layer 1"),
        (NARROW, {"experts_count": 255}, "expert_ids must be below experts_count = 255"),
        (WIDE, {"experts_count": 299}, "expert_ids must be below experts_count = 299"),
        (WIDE, {"expert_ids": struct.pack("<4H", 299, 0, 257, 257)}, "distinct within a layer: row 1, layer 0"),
        (SINGLE, {"expert_ids": bytes((0, 1, 0, 0))}, "expert_ids are all zero in row 1: was it ever filled?"),
        (NARROW, {"who": -1}, "slot must be"),
    ],
)
def test_routes_that_break_a_rule_are_refused_by_name(
    record: RoutesRecorded, change: dict[str, object], named: str
) -> None:
    with pytest.raises(RecordInvalidError, match=re.escape(named)):
        encode(replace(record, **change))  # type: ignore[arg-type]


def test_ids_that_share_one_byte_of_two_are_distinct() -> None:
    encode(replace(WIDE, expert_ids=struct.pack("<4H", 1, 257, 256, 257)))


def test_a_single_choice_may_be_expert_zero() -> None:
    encode(replace(SINGLE, layers_count=1, expert_ids=bytes(2)))
    encode(replace(SINGLE, experts_count=1, expert_ids=bytes(4)))


@pytest.mark.parametrize("record", [NARROW, WIDE])
def test_routes_cut_anywhere_are_refused(record: RoutesRecorded) -> None:
    payload = encode(record)
    for end in range(len(payload)):
        with pytest.raises(RecordInvalidError):
            decode(payload[:end])
    with pytest.raises(RecordInvalidError, match="payload has"):
        decode(payload + b"\0")


def test_reserved_bytes_are_zero() -> None:
    payload = bytearray(encode(WIDE))
    payload[36] = 1
    with pytest.raises(RecordInvalidError, match="bytes 36 to 39 must be zero"):
        decode(bytes(payload))


def test_wide_ids_are_compared_as_numbers_on_every_host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_routes, "IS_BIG_ENDIAN", True)
    with pytest.raises(RecordInvalidError, match="below experts_count"):
        encode(replace(WIDE, expert_ids=struct.pack("<4H", 1, 2, 3, 256)))
