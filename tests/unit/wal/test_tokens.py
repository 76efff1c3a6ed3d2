"""Kind 1, records of one request: what goes in comes out, and what does not fit is refused by name."""

import re
import struct
from array import array
from dataclasses import replace

import pytest

from wal import RecordInvalidError, token_columns
from wal.tokens import (
    TOKENS,
    KvBroken,
    RequestClosed,
    RequestOpened,
    RequestsAcknowledged,
    StepAppended,
    TokenRecord,
    TokensAppended,
    as_json,
    decode,
    encode,
)

RECORD = TokensAppended("r-1/é", 12, (0, 7, 2**32 - 1), (-0.5, 0.0, -12.25), 2**40)


def test_tokens_are_read_back() -> None:
    assert decode(encode(RECORD)) == RECORD


def test_the_kind_of_tokens_is_one() -> None:
    assert TOKENS == 1


def test_logprobs_come_back_as_f32_holds_them() -> None:
    (stored,) = struct.unpack("<f", struct.pack("<f", -0.1))
    assert decode(encode(replace(RECORD, token_ids=(1,), logprobs=(-0.1,)))).logprobs == (stored,)


def test_a_token_costs_eight_bytes() -> None:
    one = replace(RECORD, token_ids=(1,), logprobs=(-1.0,))
    many = replace(RECORD, token_ids=(1,) * 101, logprobs=(-1.0,) * 101)
    assert len(encode(many)) - len(encode(one)) == 800


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"request": ""}, "request"),
        ({"request": "x" * 65536}, "request"),
        ({"request": "\ud800"}, "request"),
        ({"token_ids": (), "logprobs": ()}, "token_ids must hold at least one"),
        ({"logprobs": (-1.0,)}, "logprobs must be as many as the 3 token_ids, are 1"),
        ({"token_ids": (1, 2, 2**32)}, "token_ids"),
        ({"token_ids": (1, 2, -1)}, "token_ids"),
        ({"logprobs": (-1.0, float("nan"), 0.0)}, "finite"),
        ({"logprobs": (-1.0, float("-inf"), 0.0)}, "finite"),
        ({"logprobs": (-1.0, -1e39, 0.0)}, "f32"),
        ({"start": -1}, "start"),
        ({"start": 2**64}, "start must be an integer in 0..2**64-1"),
        ({"start": 1.0}, "start"),
        ({"policy_version": 2**64}, "policy_version"),
    ],
)
def test_a_record_that_breaks_a_rule_is_refused_by_name(change: dict[str, object], named: str) -> None:
    with pytest.raises(RecordInvalidError, match=re.escape(named)):
        encode(replace(RECORD, **change))  # type: ignore[arg-type]


def test_a_payload_cut_anywhere_is_refused() -> None:
    payload = encode(RECORD)
    for end in range(len(payload)):
        with pytest.raises(RecordInvalidError):
            decode(payload[:end])


def test_a_payload_with_more_behind_it_is_refused() -> None:
    with pytest.raises(RecordInvalidError, match="payload has"):
        decode(encode(RECORD) + bytes(8))


@pytest.mark.parametrize(
    ("offset", "value", "named"),
    [
        (0, 0, "type is 0, this program reads 1 to 7"),
        (0, 8, "type is 8"),
        (1, 1, "byte 1 must be zero, is 1"),
        (24, 0xFF, "request"),
        (31, 1, "padding"),
        (47, 0xFF, "finite"),
    ],
)
def test_a_payload_of_another_schema_is_refused(offset: int, value: int, named: str) -> None:
    payload = bytearray(encode(replace(RECORD, request="abcdefg", token_ids=(1, 2), logprobs=(-1.0, -1.0))))
    payload[offset] = value
    if named == "finite":
        payload[40:44] = struct.pack("<f", float("inf"))
    with pytest.raises(RecordInvalidError, match=named):
        decode(bytes(payload))


def test_tokens_are_shown_as_json() -> None:
    assert as_json(encode(RECORD)) == {
        "type": "tokens",
        "request": "r-1/é",
        "start": 12,
        "token_ids": [0, 7, 2**32 - 1],
        "logprobs": [-0.5, 0.0, -12.25],
        "policy_version": 2**40,
    }


SMALL: list[tuple[TokenRecord, str]] = [
    (RequestOpened("r-1", 7), "02 00 03 00 07 00 00 00 72 2d 31"),
    (RequestClosed(7, "stop"), "04 04 00 00 07 00 00 00 73 74 6f 70"),
    (RequestClosed("r", ""), "04 00 01 00 00 00 00 00 72"),
    (KvBroken(258, 5, "rebuilt"), "06 01 00 00 02 01 00 00 05 00 00 00 00 00 00 00"),
    (KvBroken("r", 0, "kept"), "06 03 01 00 00 00 00 00 00 00 00 00 00 00 00 00 72"),
    (RequestsAcknowledged(("a", "bé")), "07 00 00 00 02 00 00 00 01 00 61 03 00 62 c3 a9"),
]
SMALL_IDS = [type(record).__name__ for record, _ in SMALL]


@pytest.mark.parametrize(("record", "written"), SMALL, ids=SMALL_IDS)
def test_a_record_has_the_bytes_of_its_table(record: TokenRecord, written: str) -> None:
    assert encode(record) == bytes.fromhex(written)
    assert decode(bytes.fromhex(written)) == record


@pytest.mark.parametrize(("record", "written"), SMALL, ids=SMALL_IDS)
def test_a_record_cut_or_extended_is_refused(record: TokenRecord, written: str) -> None:
    payload = bytes.fromhex(written)
    for end in range(len(payload)):
        with pytest.raises(RecordInvalidError):
            decode(payload[:end])
    with pytest.raises(RecordInvalidError):
        decode(payload + b"\0")


@pytest.mark.parametrize(
    ("record", "named"),
    [
        (RequestOpened("", 0), "request must have 1..65535 bytes of UTF-8, has 0"),
        (RequestOpened("r", -1), "slot must be an integer in 0..2**32-1, is -1"),
        (RequestOpened("r", 2**32), "slot"),
        (RequestOpened("r", "x" * 9999), "slot must be an integer in 0..2**32-1, is " + "x" * 40),
        (RequestClosed(-1, ""), "slot"),
        (RequestClosed("", ""), "request"),
        (RequestClosed(1, "é" * 128), "reason must have at most 255 bytes of UTF-8, has 256"),
        (RequestClosed(1, "\ud800"), "reason must be encodable as UTF-8"),
        (KvBroken(1, -1, "kept"), "position"),
        (KvBroken(1, 0, "lost"), "cause must be one of rebuilt, restored, kept"),
        (RequestsAcknowledged(()), "requests must name at least one"),
        (RequestsAcknowledged(("a", "a")), "requests must be distinct"),
        (RequestsAcknowledged(("a", "")), "requests must have 1..65535 bytes"),
        ("no record", "record is a str, not one of TokensAppended, RequestOpened"),
    ],
)
def test_a_small_record_that_breaks_a_rule_is_refused_by_name(record: TokenRecord, named: str) -> None:
    with pytest.raises(RecordInvalidError, match=re.escape(named)):
        encode(record)


@pytest.mark.parametrize(
    ("written", "named"),
    [
        ("", "payload is empty"),
        ("01", "payload has 1 bytes, fewer than the 24 of its head"),
        ("01 00 01 00 00 00 00 00" + "00" * 16 + "72 00 00 00", "token_ids must hold at least one token"),
        ("01 00 00 00 01 00 00 00" + "00" * 16 + "00" * 8, "request must have 1..65535 bytes of UTF-8, has 0"),
        ("02 01 01 00 00 00 00 00 72", "byte 1 must be zero"),
        ("02 00 00 00 00 00 00 00", "request must have"),
        ("02 00 01 00 00 00 00 00 ff", "request must be UTF-8"),
        ("04 00 01 00 07 00 00 00 72", "slot of a record that names its request must be zero, is 7"),
        ("04 00 02 00 00 00 00 00 72", "payload has 9 bytes, its request id ends at 10"),
        ("04 01 00 00 07 00 00 00 ff", "reason must be UTF-8"),
        ("06 00 00 00 07 00 00 00" + "00" * 8, "cause must be in 1..3, is 0"),
        ("06 04 00 00 07 00 00 00" + "00" * 8, "cause must be in 1..3, is 4"),
        ("07 01 00 00 01 00 00 00 01 00 61", "bytes 1 to 3 must be zero"),
        ("07 00 00 00 00 00 00 00", "requests must name at least one"),
        ("07 00 00 00 02 00 00 00 01 00 61", "holds 1 requests where its head tells 2"),
        ("07 00 00 00 02 00 00 00 01 00 61 01 00 61", "requests must be distinct"),
        ("07 00 00 00 01 00 00 00 00 00", "requests must have"),
        ("07 00 00 00 01 00 00 00 01", "payload ends within the size of request 0"),
        ("07 00 00 00 02 00 00 00 01 00 61 02 00 61", "payload ends within request 1"),
    ],
)
def test_a_small_payload_that_breaks_a_rule_is_refused_by_name(written: str, named: str) -> None:
    with pytest.raises(RecordInvalidError, match=re.escape(named)):
        decode(bytes.fromhex(written))


def test_records_name_their_request_by_slot_or_id_in_json() -> None:
    assert as_json(encode(RequestClosed(7, "stop"))) == {"type": "closed", "slot": 7, "reason": "stop"}
    assert as_json(encode(RequestClosed("r", ""))) == {"type": "closed", "request": "r", "reason": ""}
    assert as_json(encode(RequestOpened("r", 7))) == {"type": "opened", "request": "r", "slot": 7}
    assert as_json(encode(KvBroken(7, 5, "kept"))) == {"type": "kv_broken", "slot": 7, "position": 5, "cause": "kept"}
    assert as_json(encode(RequestsAcknowledged(("a", "b")))) == {"type": "acknowledged", "requests": ["a", "b"]}


def test_a_host_of_the_other_byte_order_swaps_its_arrays(monkeypatch: pytest.MonkeyPatch) -> None:
    """An array holds the host's bytes, the log little-endian ones: where they differ, each value is swapped once."""
    monkeypatch.setattr(token_columns, "IS_BIG_ENDIAN", True)
    assert token_columns.u32_array(b"\x01\x02\x03\x04") == array("I", [0x01020304])
    assert token_columns.f32_array(b"\xbf\x00\x00\x00") == array("f", [-0.5])
    step = StepAppended(0, [(1, 1)], [1], array("I", [0x01020304]), [-0.5])
    assert encode(step)[-8:-4] == b"\x01\x02\x03\x04"
    assert encode(replace(step, token_ids=[0x01020304]))[-8:-4] == b"\x04\x03\x02\x01"
