"""Logs written by each format version are read for ever, and a bad one is still told apart.

`v1/expected.jsonl` is what the program that wrote `v1/whole` meant; never regenerate these files:
a new format version gets a folder of its own.
"""

import json
import shutil
from pathlib import Path

import pytest

from wal import CorruptError, Log, Outcome, Reader, tokens

V1 = Path(__file__).parent / "v1"
EXPECTED = [json.loads(line) for line in (V1 / "expected.jsonl").read_text().splitlines()]


def rows(reader: Reader) -> list[dict[str, object]]:
    return [record._asdict() | {"payload": record.payload.hex()} for record in reader]


def test_a_log_of_version_1_is_read() -> None:
    reader = Reader(V1 / "whole")
    assert rows(reader) == EXPECTED
    assert len(reader.segments) > 1
    assert reader.outcome is Outcome.END


def test_tokens_of_version_1_are_decoded() -> None:
    decoded = [tokens.decode(record.payload) for record in Reader(V1 / "whole") if record.kind == tokens.TOKENS]
    assert decoded == [
        tokens.TokensAppended(
            f"rollout-{index % 3}",
            index // 3 * 4,
            tuple(range(1000 * index, 1000 * index + 4)),
            (-0.25, -0.5, -1.0 - index, 0.0),
            index // 6,
        )
        for index in range(12)
    ]


def test_a_torn_log_of_version_1_is_repaired_and_goes_on(tmp_path: Path) -> None:
    shutil.copytree(V1 / "torn", tmp_path / "log")
    with Log.open(tmp_path / "log") as log:
        assert log.recovery.records_count == len(EXPECTED) - 1
        assert log.append(9, b"new") == len(EXPECTED)
    reader = Reader(tmp_path / "log")
    assert rows(reader)[:-1] == EXPECTED[:-1]
    assert reader.outcome is Outcome.END


def test_a_corrupt_log_of_version_1_is_refused() -> None:
    with pytest.raises(CorruptError) as failure:
        list(Reader(V1 / "corrupt"))
    assert failure.value.segment == "0000000000000001-00000000.wal"
    assert failure.value.offset < 300
