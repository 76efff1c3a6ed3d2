"""Kind 1, type 3: one engine step, its byte table, its columns from any buffer, and each rule."""

import re
import struct
from array import array
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from wal import RecordInvalidError
from wal.token_steps import version_runs_of
from wal.tokens import StepAppended, as_json, decode, encode

ONE_EACH = StepAppended(9, ((2, 4), (1, 5)), (7, 0, 3), (10, 11, 12), (-0.5, -1.0, 0.0))
UNEVEN = StepAppended(2**40, ((2, 4),), (7, 2**32 - 1), (10, 11, 2**32 - 1), (-0.5, -1.0, -2.5), (1, 2))


def test_a_step_has_the_bytes_of_its_table() -> None:
    assert encode(ONE_EACH) == bytes.fromhex(
        "03 00 02 00 03 00 00 00 03 00 00 00 00 00 00 00 09 00 00 00 00 00 00 00"
        "02 00 00 00 04 00 00 00 00 00 00 00 01 00 00 00 05 00 00 00 00 00 00 00"
        "07 00 00 00 00 00 00 00 03 00 00 00"
        "0a 00 00 00 0b 00 00 00 0c 00 00 00 00 00 00 bf 00 00 80 bf 00 00 00 00"
    )


def test_the_example_of_the_document_is_a_step() -> None:
    document = Path(__file__).parents[3].joinpath("docs/formats/wal_tokens.md").read_text()
    rows = re.findall(r"^00[0-9a-f]0  ((?:[0-9a-f]{2} )*[0-9a-f]{2})", document, re.MULTILINE)
    assert encode(StepAppended(4, [(2, 3)], [0, 1], [5, 6], [-0.5, -1.0])) == bytes.fromhex(" ".join(rows))


def test_counts_stand_behind_the_slots_if_one_is_not_1() -> None:
    payload = encode(UNEVEN)
    assert payload[1] == 1
    assert struct.unpack_from("<4I", payload, 24 + 12) == (7, 2**32 - 1, 1, 2)


@pytest.mark.parametrize("record", [ONE_EACH, UNEVEN])
def test_a_step_is_read_back(record: StepAppended) -> None:
    assert decode(encode(record)) == record


def test_counts_of_one_each_are_not_written() -> None:
    assert encode(replace(ONE_EACH, counts=(1, 1, 1))) == encode(ONE_EACH)


def test_a_step_is_shown_as_json() -> None:
    assert as_json(encode(UNEVEN)) == {
        "type": "step",
        "base": 2**40,
        "version_runs": [[2, 4]],
        "slots": [7, 2**32 - 1],
        "token_ids": [10, 11, 2**32 - 1],
        "logprobs": [-0.5, -1.0, -2.5],
        "counts": [1, 2],
    }


@pytest.mark.parametrize(
    "ids", [list, tuple, lambda v: array("I", v), lambda v: array("Q", v), lambda v: np.array(v, np.uint32),
            lambda v: np.array(v, np.int64), lambda v: np.array([v, v], np.uint32).T[:, 1],
            lambda v: memoryview(array("I", v)), dict.fromkeys],
)  # fmt: skip
@pytest.mark.parametrize(
    "logprobs",
    [list, lambda v: array("f", v), lambda v: array("d", v), lambda v: np.array(v, np.float32), np.array],
)
def test_a_column_may_be_any_sequence_or_buffer(
    ids: Callable[[object], object], logprobs: Callable[[object], object]
) -> None:
    record = replace(ONE_EACH, slots=ids((7, 0, 3)), token_ids=ids((10, 11, 12)), logprobs=logprobs((-0.5, -1.0, 0.0)))
    assert encode(record) == encode(ONE_EACH)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"slots": (), "token_ids": (), "logprobs": ()}, "slots must hold at least one row"),
        ({"slots": (7, 0, 7)}, "slots must be distinct"),
        ({"slots": (7, 0, -1)}, "slots must be integers in 0..2**32-1"),
        ({"slots": (7, 0, 2**32)}, "slots must be integers"),
        ({"slots": (7, 0, 1.0)}, "slots must be integers"),
        ({"token_ids": (1, 2)}, "token_ids must be as many as the 3 tokens of the step, are 2"),
        ({"token_ids": (1, 2, 2**32)}, "token_ids must be integers in 0..2**32-1"),
        ({"token_ids": np.array((1, 2, -1))}, "token_ids must be integers"),
        ({"token_ids": np.zeros((3, 1), np.uint32)}, "token_ids must have one dimension, has 2"),
        ({"token_ids": np.zeros(3, ">u4")}, "token_ids must be integers"),
        ({"token_ids": np.zeros(3)}, "token_ids must be integers"),
        ({"logprobs": (-1.0,)}, "logprobs must be as many as the 3 tokens of the step, are 1"),
        ({"logprobs": (-1.0, float("nan"), 0.0)}, "logprobs must be finite"),
        ({"logprobs": (-1.0, float("-inf"), 0.0)}, "logprobs must be finite"),
        ({"logprobs": array("f", (-1.0, 0.0, float("inf")))}, "logprobs must be finite"),
        ({"logprobs": (-1.0, -1e39, 0.0)}, "logprobs must be numbers that fit f32"),
        ({"logprobs": (-1.0, "no", 0.0)}, "logprobs must be numbers"),
        ({"base": -1}, "base must be an integer in 0..2**64-1"),
        ({"base": 2**64}, "base"),
        ({"version_runs": ()}, "version_runs must be 1..65535, are 0"),
        ({"version_runs": ((1, 1), (1, 2)) * 32768}, "version_runs must be 1..65535, are 65536"),
        ({"version_runs": ((2, 4),)}, "version_runs must cover the 3 slots, cover 2"),
        ({"version_runs": ((2, 4), (1, 4))}, "version_runs must differ from their neighbours"),
        ({"version_runs": ((3, 4), (0, 5))}, "version_runs must have 1 or more rows each"),
        ({"version_runs": ((3, 2**64),)}, "policy version must be an integer in 0..2**64-1"),
        ({"counts": (1, 1)}, "counts must be as many as the 3 slots, are 2"),
        ({"counts": (1, 0, 2)}, "counts must be 1 or more"),
        ({"counts": (1, -1, 2)}, "counts must be integers"),
        ({"counts": (2**32 - 1, 1, 1)}, "counts must sum to at most 2**32-1"),
    ],
)
def test_a_step_that_breaks_a_rule_is_refused_by_name(change: dict[str, object], named: str) -> None:
    with pytest.raises(RecordInvalidError, match=re.escape(named)):
        encode(replace(ONE_EACH, **change))  # type: ignore[arg-type]


def test_the_largest_finite_logprobs_are_kept() -> None:
    largest = struct.unpack("<f", b"\xff\xff\x7f\x7f")[0]
    record = replace(ONE_EACH, logprobs=(-largest, largest, -(2.0**127)))
    assert decode(encode(record)) == record


@pytest.mark.parametrize("record", [ONE_EACH, UNEVEN])
def test_a_step_cut_anywhere_is_refused(record: StepAppended) -> None:
    payload = encode(record)
    for end in range(len(payload)):
        with pytest.raises(RecordInvalidError):
            decode(payload[:end])
    with pytest.raises(RecordInvalidError, match="payload has"):
        decode(payload + bytes(4))


@pytest.mark.parametrize(
    ("record", "offset", "value", "named"),
    [
        (ONE_EACH, 1, 2, "flags must be 0 or 1, are 2"),
        (ONE_EACH, 12, 1, "bytes 12 to 15 must be zero"),
        (ONE_EACH, 24, 1, "version_runs must cover the 3 slots, cover 2"),
        (ONE_EACH, 24, 0, "version_runs must have 1 or more rows each"),
        (ONE_EACH, 28, 5, "version_runs must differ"),
        (ONE_EACH, 48, 0, "slots must be distinct"),
        (ONE_EACH, 75, 0x7F, "logprobs must be finite"),
        (UNEVEN, 44, 0, "counts must be 1 or more"),
        (UNEVEN, 44, 2, "tokens count is 3, not the sum"),
    ],
)
def test_a_step_payload_that_breaks_a_rule_is_refused_by_name(
    record: StepAppended, offset: int, value: int, named: str
) -> None:
    payload = bytearray(encode(record))
    payload[offset] = value
    if named.startswith("logprobs"):
        payload[74] = 0x80
    with pytest.raises(RecordInvalidError, match=re.escape(named)):
        decode(bytes(payload))


def test_a_counts_column_of_ones_is_refused() -> None:
    payload = bytearray(encode(ONE_EACH))
    payload[1] = 1
    payload[60:60] = struct.pack("<3I", 1, 1, 1)
    with pytest.raises(RecordInvalidError, match="counts must be left out where each is 1"):
        decode(bytes(payload))


def test_a_step_without_rows_is_refused() -> None:
    with pytest.raises(RecordInvalidError, match="slots must hold at least one row"):
        decode(b"\x03" + bytes(23))


def test_a_step_whose_count_is_not_its_rows_is_refused() -> None:
    payload = bytearray(encode(ONE_EACH))
    payload[8] = 4
    with pytest.raises(RecordInvalidError, match="tokens count is 4"):
        decode(bytes(payload + bytes(8)))


def test_versions_of_rows_become_runs() -> None:
    assert version_runs_of([4, 4, 5, 4]) == [(2, 4), (1, 5), (1, 4)]
