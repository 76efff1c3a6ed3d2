"""What `python -m wal` finds out about a log: whose records are, what is wrong with them, what there is of what."""

import json
from pathlib import Path

import pytest

from wal import Log, tokens
from wal.__main__ import main
from wal.floor import raise_floor, remove_below_floor
from wal.pins import pin
from wal.storage import OsStorage


@pytest.fixture
def cut_directory(tmp_path: Path) -> Path:
    """A log that begins at lsn 2: `a` was opened as slot 0 before it, `b` is opened as slot 1 in it."""
    records = (
        tokens.RequestOpened("a", 0),
        tokens.RequestOpened("b", 1),
        tokens.StepAppended(0, [(2, 3)], [0, 1], [5, 6], [-0.5, -1.0]),
        tokens.StepAppended(2, [(1, 3), (1, 4)], [1, 0], [7, 8, 9], [-0.5, -1.0, -1.5], [1, 2]),
        tokens.StepAppended(3, [(1, 3)], [0], [4], [-0.25]),
        tokens.RequestClosed(0, "stop"),
        tokens.RequestsAcknowledged(("a",)),
    )
    directory = tmp_path / "cut"
    with Log.open(directory, segment_bytes_max=1) as log:
        for record in records:
            log.append(tokens.TOKENS, tokens.encode(record))
    raise_floor(OsStorage(), directory, 2)
    assert remove_below_floor(OsStorage(), directory) == ["0000000000000001-00000000.wal"]
    return directory


def test_what_a_decoder_complains_of_is_bounded_and_moves_no_cursor(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(payload: bytes) -> object:
        raise ValueError(payload.decode())

    with Log.open(tmp_path) as log:
        log.append(2, b"\x1b[2J\n" + b"x" * 10_000)
    assert main([str(tmp_path)], {2: refuse}) == 0
    said = capsys.readouterr().err
    assert said.endswith("): \\x1b[2J\\n" + "x" * 395 + "...; 1 such record\n")


def test_a_step_belongs_to_the_requests_that_its_slots_stand_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with Log.open(tmp_path) as log:
        for request, slot in (("a", 0), ("b", 1)):
            log.append(1, tokens.encode(tokens.RequestOpened(request, slot)))
        log.append(1, tokens.encode(tokens.StepAppended(0, [(2, 3)], [0, 1], [5, 6], [-0.5, -1.0])))
        log.append(1, tokens.encode(tokens.RequestClosed(0, "stop")))
        log.append(1, tokens.encode(tokens.StepAppended(1, [(1, 3)], [1], [7], [-0.5])))
        log.append(1, tokens.encode(tokens.StepAppended(9, [(1, 3)], [9], [7], [-0.5])))
    assert main([str(tmp_path), "--request", "a", "--json"]) == 0
    assert [json.loads(line)["lsn"] for line in capsys.readouterr().out.splitlines()] == [1, 3, 4]
    assert main([str(tmp_path), "--stats", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)["tokens"]
    assert (told["requests"], told["open"], told["closed"], told["tokens"]) == (2, 1, 1, 3)
    assert main([str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[2].endswith("a [0] v3: 5(-0.500)  b [0] v3: 6(-1.000)")
    assert lines[4].endswith("b [1] v3: 7(-0.500)")
    assert main([str(tmp_path), "--request", "b"]) == 0
    assert capsys.readouterr().out.splitlines()[1].endswith(" B  b [0] v3: 6(-1.000)")


def test_a_stream_that_contradicts_itself_is_told_and_fails_the_verification(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with Log.open(tmp_path) as log:
        for start in (5, 7, 7, 0):
            log.append(1, tokens.encode(tokens.TokensAppended("r", start, (5, 6), (-0.5, -1.0), 3)))
        log.append(1, b"no record of tokens")
    assert main([str(tmp_path)]) == 0
    said = capsys.readouterr()
    assert len(said.out.splitlines()) == 5
    assert "wal: note: lsn 3 (0000000000000001-00000000.wal at 192): " in said.err
    assert said.err.endswith("3 such records\n")
    assert main([str(tmp_path), "--verify"]) == 1
    first = "lsn 3 (0000000000000001-00000000.wal at 192): the token record of lsn 3 contradicts the stream"
    verdict = "bad: 5 records in 1 segment, next lsn 6, ended by: end; not as they should be: 3 records, the first "
    assert capsys.readouterr().out.startswith(verdict + first)
    assert main([str(tmp_path), "--verify", "--json"]) == 1
    told = json.loads(capsys.readouterr().out)
    assert told["problems"] == 3
    assert told["problem"].startswith(first)


def test_floor_pins_and_epochs_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for epoch in (1, 2):
        with Log.open(tmp_path, epoch=epoch) as log:
            log.append(2, b"x")
    pin(tmp_path, "backup", 2)
    assert main([str(tmp_path), "--stats"]) == 0
    assert "begins at lsn 1, epochs 1, 2, pins: backup at 2" in capsys.readouterr().out


def test_rows_of_requests_that_were_opened_before_the_log_begins_are_shown_by_their_slots(
    cut_directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(cut_directory)]) == 0
    lines = [line.split(" B  ")[1] for line in capsys.readouterr().out.splitlines()]
    assert lines == [
        '{"type": "opened", "request": "b", "slot": 1}',
        "slot 0 v3: 5(-0.500)  b [0] v3: 6(-1.000)",
        "b [1] v3: 7(-0.500)  slot 0 v4: 8(-1.000) 9(-1.500)",
        "slot 0 v3: 4(-0.250)",
        '{"type": "closed", "slot": 0, "reason": "stop"}',
        '{"type": "acknowledged", "requests": ["a"]}',
    ]
    assert main([str(cut_directory), "--json"]) == 0
    shown = [json.loads(line).get("requests") for line in capsys.readouterr().out.splitlines()]
    assert shown == [["b"], [None, "b"], ["b", None], [None], None, ["a"]]
    assert main([str(cut_directory), "--request", "b"]) == 0
    assert capsys.readouterr().out.splitlines()[2].endswith("  b [1] v3: 7(-0.500)")


def test_statistics_of_a_log_that_was_cut_count_the_tokens_whose_requests_it_does_not_name(
    cut_directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(cut_directory), "--stats", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    of = told["tokens"]
    assert (of["requests"], of["tokens"], of["tokens_unnamed"]) == (1, 2, 4)
    assert of["bytes_per_token"] == round(told["bytes"] / 6, 2)
    assert main([str(cut_directory), "--stats"]) == 0
    unnamed = "4 of requests opened before the log begins"
    assert f"tokens: 2 of 1 request (1 open, 0 closed, 0 acknowledged), {unnamed}, " in capsys.readouterr().out


def test_a_request_is_found_by_its_acknowledgement_and_an_unknown_one_is_told(
    cut_directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(cut_directory), "--request", "a", "--json"]) == 0
    said = capsys.readouterr()
    assert [json.loads(line)["lsn"] for line in said.out.splitlines()] == [7]
    assert said.err == ""
    assert main([str(cut_directory), "--request", "x"]) == 0
    said = capsys.readouterr()
    assert (said.out, said.err) == ("", "wal: note: no record of request 'x'; the log begins at lsn 2\n")


def test_a_log_without_tokens_has_no_statistics_of_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Log.open(tmp_path) as log:
        log.append(2, b"x")
        log.append(tokens.TOKENS, tokens.encode(tokens.RequestOpened("a", 0)))
    assert main([str(tmp_path), "--stats"]) == 0
    *_, last = capsys.readouterr().out.splitlines()
    assert last == "tokens: 0 of 1 request (1 open, 0 closed, 0 acknowledged)"
