"""Shards after kills, cuts and damage: what the manifest names is there, and nothing else is."""

from __future__ import annotations

import hashlib
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import msgspec
import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet
from safetensors import safe_open

import wal
from rollout.errors import NotFoundError, RequestError, ResultsError, ShardError
from rollout.export.manifest import Manifest, shard_path
from rollout.export.shards import ShardWriter, row_of
from rollout.export.side_channels import Channel, read_channel
from rollout.export.testing import made_up_record
from rollout.loader import Dataset
from rollout.record import TrajectoryRecord

RECORDS = [made_up_record(f"g{i // 2}", i % 2, size=2, turns=((5, 7), (3, i))) for i in range(24)]
WRITER = """
import sys
from pathlib import Path
from tests_records import RECORDS
from rollout.export.shards import ShardWriter

with ShardWriter.open(Path(sys.argv[1]), rows_max=5) as writer:
    for record in RECORDS:
        writer.append([record])
        print(record.rollout_id, flush=True)
"""


def stream(path: Path) -> pa.Table:
    with pa.memory_map(str(path)) as source:
        return pa.ipc.open_stream(source).read_all()


def everything(directory: Path) -> list[dict[str, object]]:
    rows = [row for path in sorted(directory.glob("*.arrows")) for row in stream(path).to_pylist()]
    manifest = Manifest(directory)
    assert [row["rollout_id"] for row in rows] == [r.rollout_id for batch in manifest for r in batch.rows]
    return sorted(rows, key=lambda row: str(row["rollout_id"]))


def write(directory: Path, records: list[TrajectoryRecord], rows_max: int = 5) -> None:
    with ShardWriter.open(directory, rows_max=rows_max) as writer:
        for record in records:
            writer.append([record])


def test_who_takes_the_directory_over_goes_on_and_whoever_was_fenced_off_harms_nothing(tmp_path: Path) -> None:
    with ShardWriter.open(tmp_path, epoch=1) as fenced:
        fenced.append(RECORDS[:3])
        with ShardWriter.open(tmp_path, epoch=2) as writer:
            assert len(writer.rollout_ids) == 3
            writer.append(RECORDS[3:5])
            with pytest.raises(wal.FencedError):
                fenced.append(RECORDS[3:6])
            writer.append(RECORDS[5:7])
    with pytest.raises(wal.FencedError):
        ShardWriter.open(tmp_path, epoch=1)
    write(tmp_path, RECORDS)
    assert len(everything(tmp_path)) == len(RECORDS)
    names = sorted(path.stem for path in tmp_path.glob("*.arrows"))
    assert [name.partition("-")[0] for name in names] == ["00000001", *["00000002"] * (len(names) - 1)]


def test_shards_are_bounded_and_have_their_parquet_beside_them(tmp_path: Path) -> None:
    write(tmp_path, RECORDS)
    assert [stream(path).num_rows for path in sorted(tmp_path.glob("*.arrows"))] == [5, 5, 5, 5, 4]
    for path in sorted(tmp_path.glob("*.arrows")):
        assert parquet.read_table(path.with_suffix(".parquet")).equals(stream(path))
    with ShardWriter.open(tmp_path / "b", bytes_max=1) as writer:
        assert writer.append(RECORDS[:3]) == 3
        assert writer.append([*RECORDS[:6], RECORDS[5]]) == 3
    assert [stream(path).num_rows for path in sorted((tmp_path / "b").glob("*.arrows"))] == [3, 3]


def test_a_rollout_is_written_once_and_nothing_that_is_there_changes(tmp_path: Path) -> None:
    write(tmp_path, RECORDS[:7])
    before = {path: path.read_bytes() for path in tmp_path.glob("*.arrows")}
    write(tmp_path, RECORDS)
    assert len(everything(tmp_path)) == len(RECORDS)
    for path, data in before.items():
        assert path.read_bytes().startswith(data)


def test_one_writer_at_a_time(tmp_path: Path) -> None:
    with ShardWriter.open(tmp_path), pytest.raises(wal.LockedError):
        ShardWriter.open(tmp_path)


@pytest.mark.parametrize("lines_count", [1, 5, 6, 13])
def test_a_killed_writer_leaves_a_whole_prefix_and_the_next_one_goes_on(tmp_path: Path, lines_count: int) -> None:
    directory = tmp_path / "shards"
    (tmp_path / "tests_records.py").write_text(
        "from rollout.export.testing import made_up_record\n"
        "RECORDS = [made_up_record(f'g{i // 2}', i % 2, size=2, turns=((5, 7), (3, i))) for i in range(24)]\n"
    )
    command = [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n{WRITER}", str(directory)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdout is not None
        lines = [writer.stdout.readline() for _ in range(lines_count)]
        writer.send_signal(signal.SIGKILL)
        lines += [line for line in writer.stdout if line.endswith("\n")]
    named = [row.rollout_id for batch in Manifest(directory) for row in batch.rows]
    assert [line.strip() for line in lines] == named[: len(lines)]
    write(directory, RECORDS)
    write(tmp_path / "again", RECORDS)
    assert everything(directory) == everything(tmp_path / "again")


@pytest.mark.parametrize("rest", [b"", b"\0", b"half a batch that the manifest does not name"])
def test_what_the_manifest_does_not_name_is_gone_after_the_next_open(tmp_path: Path, rest: bytes) -> None:
    write(tmp_path, RECORDS[:7])
    leftovers = ("0-1.arrows", "0-2.arrows", "0-1-000099.safetensors", ".0-1.parquet.part")
    for name in leftovers:
        with (tmp_path / name.replace("0-", "00000000-0000000", 1)).open("ab") as file:
            file.write(rest)
    (tmp_path / "00000000-00000000.parquet").unlink()
    (tmp_path / "train-split.json").write_text("somebody else's")
    write(tmp_path, RECORDS)
    write(tmp_path / "again", RECORDS)
    assert everything(tmp_path) == everything(tmp_path / "again")
    assert {path.name for path in tmp_path.iterdir()} == {path.name for path in (tmp_path / "again").iterdir()} | {
        "again",
        "train-split.json",
    }


def test_made_again_from_the_log_it_is_the_same(tmp_path: Path) -> None:
    """However often the first writer was opened and however its appends were cut."""
    with ShardWriter.open(tmp_path / "a") as writer:
        writer.append(RECORDS[:3])
    with ShardWriter.open(tmp_path / "a") as writer:
        writer.append(RECORDS[3:])
    write(tmp_path / "b", RECORDS, rows_max=100)
    assert stream(tmp_path / "a/00000000-00000000.arrows").equals(stream(tmp_path / "b/00000000-00000000.arrows"))


def test_a_shard_that_is_missing_or_short_is_told_with_the_way_out(tmp_path: Path) -> None:
    write(tmp_path / "a", RECORDS[:4])
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    path = shard_path(tmp_path / "a", "00000000-00000000")
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ShardError, match=r"00000000-00000000.arrows has \d+ bytes, the manifest names \d+: delete"):
        ShardWriter.open(tmp_path / "a")
    shard_path(tmp_path / "b", "00000000-00000000").unlink()
    with pytest.raises(ShardError, match=r"00000000-00000000.arrows is missing: delete"):
        ShardWriter.open(tmp_path / "b")


def test_a_manifest_that_is_none_or_damaged_is_told(tmp_path: Path) -> None:
    with pytest.raises(ShardError, match="holds no shards"):
        list(Manifest(tmp_path))
    with wal.Log.open(tmp_path / "manifest") as log:
        log.append(9, b"what is this")
    with pytest.raises(ShardError, match="record 1 is of kind 9"):
        list(Manifest(tmp_path))


def test_a_disk_that_refuses_is_told_and_the_writer_wants_to_be_opened_again(tmp_path: Path) -> None:
    write(tmp_path, RECORDS[:2])
    with ShardWriter.open(tmp_path) as writer:
        shard_path(tmp_path, "00000000-00000000").unlink()
        shard_path(tmp_path, "00000000-00000000").mkdir()
        with pytest.raises(ResultsError, match="cannot write shards"):
            writer.append(RECORDS[2:3])
        with pytest.raises(ResultsError, match="open it again"):
            writer.append(RECORDS[2:3])


FILLER = """
import resource, sys
from pathlib import Path
from rollout.errors import ResultsError
from rollout.export.shards import ShardWriter
from rollout.export.testing import made_up_record

resource.setrlimit(resource.RLIMIT_FSIZE, (3 << 20, 3 << 20))  # of a file: the third batch does not fit any more
try:
    with ShardWriter.open(Path(sys.argv[1])) as writer:
        for i in range(4):
            writer.append([made_up_record(f"g{i}", turns=((70_000, 70_000),))])
            print(i, flush=True)
except ResultsError as error:
    print(error)
"""


def test_a_full_disk_leaves_a_whole_prefix_and_room_lets_it_go_on(tmp_path: Path) -> None:
    said = subprocess.run([sys.executable, "-c", FILLER, tmp_path], capture_output=True, text=True, check=True)
    *written, error = said.stdout.splitlines()
    assert written == ["0", "1"]
    assert error.startswith(f"cannot write shards to {tmp_path}: ")
    assert "File too large" in error
    write(tmp_path, [made_up_record(f"g{i}", turns=((70_000, 70_000),)) for i in range(4)])
    write(tmp_path / "again", [made_up_record(f"g{i}", turns=((70_000, 70_000),)) for i in range(4)])
    assert everything(tmp_path) == everything(tmp_path / "again")


def test_side_channels_are_read_by_others_and_come_back_as_they_were(tmp_path: Path) -> None:
    routes = [np.random.default_rng(i).integers(0, 256, (10 + i, 3, 4), np.uint8) for i in range(2)]
    hidden = np.arange(12, dtype=np.uint16).reshape(2, 6)
    channels = {
        RECORDS[i].rollout_id: {
            "routes": Channel(routes[i], "U8", (3, 4, 5)),
            "hidden": Channel(hidden + i, "BF16"),
            "mine": Channel(np.arange(2 + i, dtype=np.uint32), "U32"),
        }
        for i in range(2)
    }
    with ShardWriter.open(tmp_path) as writer:
        writer.append(RECORDS[:2], channels)
    rows = next(iter(Manifest(tmp_path))).rows
    written = stream(tmp_path / "00000000-00000000.arrows").to_pylist()
    for row, record in zip(rows, written, strict=True):
        assert [c["sha256"] for c in record["side_channels"]] == [c.sha256 for c in row.side_channels]
        for channel in row.side_channels:
            asked = channels[row.rollout_id][channel.name].array
            found = read_channel(tmp_path, channel)
            assert np.array_equal(found, asked)
            assert hashlib.sha256(asked.tobytes()).hexdigest() == channel.sha256
            assert not found.flags.writeable
    with safe_open(tmp_path / rows[0].side_channels[0].uri, "np") as file:
        assert np.array_equal(file.get_tensor("routes"), np.concatenate(routes))
        assert file.get_slice("hidden").get_dtype() == "BF16"
    assert row_of(RECORDS[0]).side_channels == ()


ONES = np.ones((2, 2, 2), np.uint8)
IDS = Channel(np.array([4, 5], np.uint32), "U32")


@pytest.mark.parametrize(
    ("channels", "error"),
    [
        ({"routes": Channel(np.zeros((2, 2, 2), np.float32), "U8")}, "'routes' of g0.0: U8 takes rows of uint8"),
        ({"routes": Channel(ONES[0], "U8")}, "'routes' of g0.0: it is U16 or U8 with 3 axes, not U8 with 2"),
        ({"routes": Channel(ONES, "U8", (1, 2, 3))}, "3 layer ids for rows of "),
        ({"mine": Channel(ONES, "INT4")}, "'INT4' is none of U8, U16"),
    ],
)
def test_a_side_channel_that_is_not_what_it_says_is_refused(
    tmp_path: Path, channels: dict[str, Channel], error: str
) -> None:
    with ShardWriter.open(tmp_path) as writer:
        with pytest.raises(RequestError, match=error):
            writer.append(RECORDS[:1], {RECORDS[0].rollout_id: channels})
        assert writer.append(RECORDS[:1], {RECORDS[0].rollout_id: {"mine": IDS}}) == 1


def test_rows_of_different_widths_do_not_fit_into_one_tensor(tmp_path: Path) -> None:
    channels = {RECORDS[i].rollout_id: {"hidden": Channel(np.ones((2, 3 + i), np.uint16), "BF16")} for i in range(2)}
    with ShardWriter.open(tmp_path) as writer, pytest.raises(RequestError, match="differs in its layout from that of"):
        writer.append(RECORDS[:2], channels)


def test_a_damaged_side_channel_is_told_by_file_and_name(tmp_path: Path) -> None:
    with ShardWriter.open(tmp_path) as writer:
        writer.append(RECORDS[:1], {RECORDS[0].rollout_id: {"routes": Channel(ONES, "U8")}})
    (channel,) = next(iter(Manifest(tmp_path))).rows[0].side_channels
    path = tmp_path / channel.uri
    data = path.read_bytes()
    for at in (0, 9, data.index(b"U8"), len(data) - 1):
        path.write_bytes(data[:at] + bytes([data[at] ^ 0xFF]) + data[at + 1 :])
        with pytest.raises(ShardError, match=r"000000.safetensors, 'routes' cannot be read"):
            read_channel(tmp_path, channel)
    for damaged in (b"", data[:5], data[:-1]):
        path.write_bytes(damaged)
        with pytest.raises(ShardError, match="cannot be read"):
            read_channel(tmp_path, channel)
    with pytest.raises(ShardError, match="no name of a file of this directory"):
        read_channel(tmp_path, msgspec.structs.replace(channel, uri="../secret"))


def test_side_channels_are_found_by_row_and_name(tmp_path: Path) -> None:
    routes = np.arange(24, dtype=np.uint16).reshape(6, 2, 2)
    with ShardWriter.open(tmp_path) as writer:
        writer.append(RECORDS[:2], {RECORDS[1].rollout_id: {"routes": Channel(routes, "U16", (0, 1))}})
    dataset = Dataset.open(tmp_path)
    assert np.array_equal(dataset.side_channel(1, "routes"), routes)
    with pytest.raises(NotFoundError, match=r"g0.0 has no side channel 'routes'"):
        dataset.side_channel(0, "routes")


def test_a_rollout_of_a_million_tokens_is_one_sequence(tmp_path: Path) -> None:
    record = made_up_record("long", turns=((1 << 19, 1 << 19),))
    with ShardWriter.open(tmp_path) as writer:
        writer.append([record, made_up_record("short")])
    dataset = Dataset.open(tmp_path)
    plan = dataset.plan(seed=0, epoch=0, token_budget=1 << 20)
    (batch,) = dataset.batches(plan)
    sizes = sorted(len(sequence) for sequence in batch)
    assert sizes == [50, 1 << 20]
    longest = max(batch, key=len)
    assert np.array_equal(longest.token_ids, np.array(record.token_ids, "u4"))
    assert longest.loss_mask.sum() == 1 << 19
