"""`python -m wal`: what it prints and how it exits."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from wal import Log, tokens
from wal.__main__ import main


@pytest.fixture
def log_directory(tmp_path: Path) -> Path:
    """Tokens of two requests, a text record and a binary one."""
    directory = tmp_path / "log"
    with Log.open(directory) as log:
        for request, start in (("r1", 0), ("r2", 0), ("r1", 2)):
            record = tokens.TokensAppended(request, start, (5, 6), (-0.5, -1.0), 3)
            log.append(tokens.TOKENS, tokens.encode(record))
        log.append(2, b"plain text")
        log.append(3, b"\xff" * 100)
    return directory


def newest(directory: Path) -> Path:
    return max(directory.glob("*.wal"))


def test_records_are_printed_with_their_place_and_their_tokens(
    log_directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(log_directory)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 5
    assert lines[0].split() == [
        "1", "0000000000000001-00000000.wal", "@48", "kind", "1", "44", "B",
        "r1", "[0]", "v3:", "5(-0.500)", "6(-1.000)",
    ]  # fmt: skip
    assert lines[3].endswith("10 B  plain text")
    assert lines[4].endswith(f"100 B  hex {'ff' * 32}...")


def test_json_lines_hold_everything(log_directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(log_directory), "--json"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert lines[2] == {
        "lsn": 3,
        "segment": "0000000000000001-00000000.wal",
        "offset": 48 + 2 * 72,
        "kind": 1,
        "size": 44,
        "requests": ["r1"],
        "record": {
            "type": "tokens",
            "request": "r1",
            "start": 2,
            "token_ids": [5, 6],
            "logprobs": [-0.5, -1.0],
            "policy_version": 3,
        },
    }
    assert lines[3]["text"] == "plain text"
    assert lines[4]["hex"] == "ff" * 32


def test_one_request_is_picked_out(log_directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(log_directory), "--request", "r1", "--json"]) == 0
    assert [json.loads(line)["lsn"] for line in capsys.readouterr().out.splitlines()] == [1, 3]


def test_statistics_count_kinds_and_tokens(log_directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(log_directory), "--stats", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["records"], told["segments"], told["outcome"]) == (5, 1, "end")
    assert told["kinds"]["1"] == {"records": 3, "bytes": 216}
    statuses = {"open": 2, "closed": 0, "acknowledged": 0}
    assert told["tokens"] == {"requests": 2, **statuses, "tokens": 6, "tokens_unnamed": 0, "bytes_per_token": 36.0}
    assert (told["epochs"], told["floor_lsn"], told["pins"], told["problems"]) == ([0], 1, [], 0)
    assert main([str(log_directory), "--stats"]) == 0
    shown = capsys.readouterr().out
    assert "begins at lsn 1, epochs 0, pins: none" in shown
    assert "tokens: 6 of 2 requests (2 open, 0 closed, 0 acknowledged), 36.0 bytes a token" in shown


def test_verify_prints_the_verdict_only(log_directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(log_directory), "--verify"]) == 0
    assert capsys.readouterr().out == "ok: 5 records in 1 segment, next lsn 6, ended by: end\n"


def test_a_torn_tail_is_a_note_and_not_a_failure(log_directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = newest(log_directory)
    path.write_bytes(path.read_bytes()[:-5])
    assert main([str(log_directory), "--verify"]) == 0
    said = capsys.readouterr()
    assert "4 records" in said.out
    assert "torn tail in 0000000000000001-00000000.wal at offset 304" in said.err


def test_corruption_is_exit_one_and_names_the_place(log_directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = newest(log_directory)
    data = bytearray(path.read_bytes())
    data[150] ^= 1
    path.write_bytes(data)
    assert main([str(log_directory)]) == 1
    said = capsys.readouterr()
    assert len(said.out.splitlines()) == 1
    assert "0000000000000001-00000000.wal is corrupt at offset 120: the frame of lsn 2 fails its checksum" in said.err


def test_the_verdict_on_a_corrupt_log_says_where_and_why_and_what_was_read_before(
    log_directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = newest(log_directory)
    data = bytearray(path.read_bytes())
    data[150] ^= 1
    path.write_bytes(data)
    place = {"segment": path.name, "offset": 120, "why": "the frame of lsn 2 fails its checksum, but lsn 3 at 192"}
    for option in ("--verify", "--stats"):
        assert main([str(log_directory), option, "--json"]) == 1
        told = json.loads(capsys.readouterr().out)
        assert (told["outcome"], told["records"], told["next_lsn"]) == ("corrupt", 1, 2)
        assert (told["segment"], told["offset"]) == (place["segment"], place["offset"])
        assert told["why"].startswith(place["why"])
    assert (told["kinds"], told["floor_lsn"], told["pins"]) == ({"1": {"records": 1, "bytes": 72}}, 1, [])
    assert main([str(log_directory), "--stats"]) == 1
    verdict, begin, kind, of_tokens = capsys.readouterr().out.splitlines()
    told_of = f"{place['segment']} at offset 120: {place['why']}"
    assert verdict.startswith(f"bad: 1 record in 1 segment, next lsn 2, ended by: corrupt; {told_of}")
    assert begin == "begins at lsn 1, epochs 0, pins: none"
    assert kind == "kind   1: 1 record, 72 bytes"
    assert of_tokens.startswith("tokens: 2 of 1 request (1 open")


def test_a_log_whose_beginning_is_missing_has_statistics_of_nothing(
    log_directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    newest(log_directory).rename(log_directory / "0000000000000002-00000000.wal")
    assert main([str(log_directory), "--stats"]) == 1
    verdict, begin = capsys.readouterr().out.splitlines()
    assert verdict.endswith("earlier segments are missing")
    assert begin == "begins at lsn 1, epochs none, pins: none"


def test_a_log_that_cannot_be_read_is_unreadable_and_says_why(
    log_directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = newest(log_directory)
    path.rename(log_directory / "elsewhere")
    path.symlink_to(log_directory / "nothing")
    assert main([str(log_directory), "--verify", "--json"]) == 1
    told = json.loads(capsys.readouterr().out)
    assert (told["outcome"], told["segment"], told["offset"]) == ("unreadable", None, None)
    assert told["why"].startswith(f"cannot read {path}: No such file or directory")
    assert main([str(log_directory), "--verify"]) == 1
    assert capsys.readouterr().out.startswith(
        f"bad: 0 records in 1 segment, next lsn 1, ended by: unreadable; {told['why']}"
    )


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: os.symlink("/dev/zero", path)])
def test_a_segment_that_is_no_file_is_not_read(
    make: Callable[[Path], None], log_directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = log_directory / "0000000000000006-00000000.wal"
    make(path)
    assert main([str(log_directory)]) == 1
    said = capsys.readouterr()
    assert len(said.out.splitlines()) == 5
    assert f"{path} is corrupt at offset 0: it is not a regular file" in said.err
    assert said.err.count("\n") == 1


def test_bad_usage_is_exit_two_with_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    for directory, why in (
        (tmp_path / "none", "does not exist"),
        (tmp_path, "no log"),
        (tmp_path / "file", "not a dir"),
        (tmp_path / ("x" * 300), "File name too long"),
    ):
        assert main([str(directory)]) == 2
        said = capsys.readouterr().err
        assert why in said
        assert str(directory) in said
        assert said.count("\n") == 1
    assert main([]) == 2
    assert main([str(tmp_path), "--nonsense"]) == 2
    assert main([str(tmp_path), "--request", ""]) == 2
    assert "argument --request: a request's id is not empty" in capsys.readouterr().err
    assert main(["--help"]) == 0


def test_a_kind_without_a_schema_can_be_given_one(log_directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def decode(payload: bytes) -> object:
        return {"text": payload.decode(), "request": "r9"}

    assert main([str(log_directory), "--json", "--request", "r9"], {2: decode, 3: decode}) == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert json.loads(line)["record"] == {"text": "plain text", "request": "r9"}
    assert main([str(log_directory)], {2: decode, 3: decode}) == 0
    assert 'kind 3       100 B  {"undecodable": "' in capsys.readouterr().out


def test_long_records_are_shortened(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Log.open(tmp_path) as log:
        log.append(1, tokens.encode(tokens.TokensAppended("r", 0, (7,) * 100, (-1.0,) * 100, 0)))
        log.append(2, b"x" * 1000)
    assert main([str(tmp_path)], {2: bytes.decode}) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first.endswith(" ... 100 tokens")
    assert second.endswith("x...")
    assert len(second) < 260


def test_bytes_without_a_schema_are_text_or_hex_and_say_which(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    payloads = {
        "é".encode(): {"text": "é"},
        b"": {"text": ""},
        b"x" + "é".encode() * 20: {"text": "x" + "é" * 15},  # byte 32 is within a character
        b"cut \xc3": {"hex": b"cut \xc3".hex()},
        b"\x1b[2J": {"hex": "1b5b324a"},
    }
    with Log.open(tmp_path) as log:
        for payload in payloads:
            log.append(2, payload)
    assert main([str(tmp_path), "--json"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [{key: line[key] for key in line if key in ("text", "hex")} for line in lines] == list(payloads.values())
    assert main([str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith("2 B  \\xe9")
    assert lines[2].endswith("41 B  x" + "\\xe9" * 15 + "...")
    assert lines[4].endswith("4 B  hex 1b5b324a")


@pytest.mark.parametrize("option", ["--verify", "--json"])
def test_an_output_that_cannot_be_written_is_exit_one_with_one_line(
    option: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with Log.open(tmp_path) as log:
        for _ in range(500):
            log.append(2, b"more lines than a buffer holds")
    with Path("/dev/full").open("w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        assert main([str(tmp_path), option]) == 1
    assert capsys.readouterr().err == "wal: cannot write the output: No space left on device\n"


def test_a_reader_that_goes_away_is_no_error(tmp_path: Path) -> None:
    with Log.open(tmp_path) as log:
        for _ in range(5000):
            log.append(2, b"a line that fills the pipe")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-m", "wal", str(tmp_path)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as printer:
        assert printer.stdout is not None
        assert printer.stderr is not None
        printer.stdout.readline()
        printer.stdout.close()
        assert printer.stderr.read() == ""
        assert printer.wait(30) == 0


def test_steps_of_many_requests_are_shown_in_part(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    slots = list(range(6))
    with Log.open(tmp_path) as log:
        for slot in slots:
            log.append(1, tokens.encode(tokens.RequestOpened(f"r\n{slot}", slot)))
        step = tokens.StepAppended(0, [(5, 3), (1, 4)], slots, list(range(16)), [-0.5] * 16, [1, 1, 1, 1, 1, 11])
        log.append(1, tokens.encode(step))
    assert main([str(tmp_path)]) == 0
    assert capsys.readouterr().out.splitlines()[-1].endswith("r\\n3 [0] v3: 3(-0.500)  ... 6 requests")
    assert main([str(tmp_path), "--request", "r\n5"]) == 0
    assert capsys.readouterr().out.splitlines()[-1].endswith("12(-0.500) ... 11 tokens")
