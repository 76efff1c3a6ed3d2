"""Kind 1: what goes in comes out, and what does not fit is refused by name."""

import struct
from dataclasses import replace

import pytest

from wal import RecordInvalidError
from wal.tokens import TOKENS, TokensAppended, as_json, decode, encode

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
        ({"policy_version": 2**64}, "policy_version"),
    ],
)
def test_a_record_that_breaks_a_rule_is_refused_by_name(change: dict[str, object], named: str) -> None:
    with pytest.raises(RecordInvalidError, match=named.replace("(", r"\(").replace("*", r"\*")):
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
        (0, 2, "schema version"),
        (1, 1, "schema version"),
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
        "request": "r-1/é",
        "start": 12,
        "token_ids": [0, 7, 2**32 - 1],
        "logprobs": [-0.5, 0.0, -12.25],
        "policy_version": 2**40,
    }
