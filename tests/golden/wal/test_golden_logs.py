"""Logs written by each format version are read for ever, and a bad one is still told apart.

`v1/expected.jsonl` is what the program that wrote `v1/whole` meant; never regenerate these files:
a new format version gets a folder of its own.
"""

import json
import shutil
from pathlib import Path

import pytest

from wal import CorruptError, Log, Outcome, Reader, tokens
from wal.fold import fold
from wal.pins import pins_of

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


def test_streams_of_version_1_are_folded_from_every_type_of_token_record() -> None:
    expected = json.loads((V1 / "steps.json").read_text())
    found = {
        name: {
            "status": stream.status,
            "reason": stream.reason,
            "token_ids": list(stream.token_ids),
            "logprobs": list(stream.logprobs),
            "policy_versions": [list(run) for run in stream.policy_versions],
            "places": [list(place) for place in stream.places],
            "kv_breaks": [list(position) for position in stream.kv_breaks],
            "routes": [
                {"start": routes.start, "router_version": routes.router_version, "experts": routes.expert_ids.hex()}
                for routes in stream.routes
            ],
        }
        for name, stream in fold(Reader(V1 / "steps")).items()
    }
    assert found == expected
    types = {record.payload[0] for record in Reader(V1 / "steps")}
    assert types == set(range(1, 8))


def test_a_log_of_version_1_that_was_taken_over_leaves_out_what_the_fenced_writer_wrote(tmp_path: Path) -> None:
    payloads = [record.payload for record in Reader(V1 / "taken_over")]
    assert payloads == [*(b"kept %d" % i for i in range(4)), *(b"of epoch 3: %d" % i for i in range(3))]
    assert b"never acknowledged" in (V1 / "taken_over" / "0000000000000001-00000000.wal").read_bytes()
    shutil.copytree(V1 / "taken_over", tmp_path / "log")
    with Log.open(tmp_path / "log") as log:
        assert (log.epoch, log.next_lsn) == (3, 8)


def test_a_log_of_version_1_whose_first_segments_were_dropped_begins_at_its_floor(tmp_path: Path) -> None:
    reader = Reader(V1 / "dropped")
    assert [(record.lsn, record.payload) for record in reader] == [(i, b"record %d" % i) for i in range(9, 13)]
    assert reader.outcome is Outcome.END  # reserved space follows the last frame
    assert pins_of(path.name for path in (V1 / "dropped").iterdir()) == [(10, "backup")]
    shutil.copytree(V1 / "dropped", tmp_path / "log")
    (tmp_path / "log" / "0000000000000009.floor").unlink()
    with pytest.raises(CorruptError, match="earlier segments are missing"):
        Log.open(tmp_path / "log")


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
