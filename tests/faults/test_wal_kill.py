"""A real writer process is killed; what it acknowledged is on disk."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from wal import LockedError, Log, Reader, tokens

WRITER = """
import asyncio, sys
from pathlib import Path
from wal import GroupCommit, Log, SyncPolicy, tokens

async def caller(commit, name):
    start = 0
    while True:
        record = tokens.TokensAppended(name, start, (start, start + 1), (-0.5, -0.25), 1)
        lsn = await commit.append(tokens.TOKENS, tokens.encode(record))
        sys.stdout.write(f"{lsn} {name} {start}\\n")
        sys.stdout.flush()
        start += 2

async def main():
    commit = GroupCommit(Log.open(Path(sys.argv[1]), segment_bytes_max=5000), SyncPolicy.parse(sys.argv[2]))
    await asyncio.gather(*(caller(commit, f"r{index}") for index in range(8)))

asyncio.run(main())
"""


@pytest.mark.parametrize("policy", ["always", "interval(2)", "os"])
def test_every_acknowledged_record_of_a_killed_writer_is_there(tmp_path: Path, policy: str) -> None:
    acknowledged: dict[int, tuple[str, int]] = {}
    for lines_count in (1, 57, 300):
        command = [sys.executable, "-c", WRITER, str(tmp_path), policy]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as writer:
            assert writer.stdout is not None
            lines = [writer.stdout.readline() for _ in range(lines_count)]
            with pytest.raises(LockedError, match=f"process {writer.pid}"):
                Log.open(tmp_path)
            writer.send_signal(signal.SIGKILL)
            lines += writer.stdout.read().splitlines(keepends=True)
        for line in lines:
            if line.endswith("\n"):
                lsn, name, start = line.split()
                acknowledged[int(lsn)] = (name, int(start))
        records = {record.lsn: record for record in Reader(tmp_path)}
        assert acknowledged.keys() <= records.keys()
        for lsn, (name, start) in acknowledged.items():
            record = tokens.decode(records[lsn].payload)
            assert (record.request, record.start) == (name, start)
        with Log.open(tmp_path) as log:
            assert log.recovery.records_count == len(records)
