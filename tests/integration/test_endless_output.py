"""A command that writes for a whole minute: what it costs is bounded, and everybody else is answered meanwhile."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Any

from dsec.client.substrate import RemoteSubstrate
from dsec.conformance.check import ENV, shell
from dsec.types import Command, SandboxSpec

MINUTE_S = 60.0
INLINE_BYTES_MAX = 64 << 10
SPOOL_BYTES_MAX = 8 << 20
LINE = b"0123456789abcdef\n"
MEMORY_GROWTH_BYTES_MAX = 32 << 20


def resident_bytes(pid: int) -> int:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmRSS")).split()[1]) << 10


def disk_bytes(directory: Path) -> int:
    return sum(os.stat(Path(path, name)).st_blocks * 512 for path, _, names in os.walk(directory) for name in names)


async def test_a_minute_of_output_is_counted_and_costs_no_more_than_its_bounds(
    dsec: Any, edge_process: Any, tmp_path: Path
) -> None:
    edge = edge_process(dsec, tmp_path, DSEC_EDGE_SPOOL_BYTES_MAX=str(SPOOL_BYTES_MAX))
    substrate = RemoteSubstrate(edge.url)
    await substrate.open()
    loud, quiet = [await substrate.create(SandboxSpec(cpu_cores=0.5)) for _ in range(2)]
    await shell(quiet, "true")
    spool = tmp_path / "state/spool"
    argv = ("yes", LINE.decode().strip())
    memory_before, disk_before = resident_bytes(edge.ready["pid"]), disk_bytes(spool)
    flood = await loud.start(Command(argv=argv, env=ENV, timeout_s=MINUTE_S, output_bytes_max=INLINE_BYTES_MAX))
    unread = flood.follow()
    await anext(unread)  # and then takes no more of it
    end = asyncio.create_task(flood.wait())
    memory_bytes, disk_used_bytes = 0, 0
    while not end.done():
        for sandbox in (quiet, loud):
            assert (await shell(sandbox, "echo ok-$((6*7))")).stdout.data == b"ok-42\n"
        short_lived = await substrate.create(SandboxSpec())
        await short_lived.destroy()
        assert (await flood.read_output("stdout", 0, len(LINE))) == LINE
        memory_bytes = max(memory_bytes, resident_bytes(edge.ready["pid"]) - memory_before)
        disk_used_bytes = max(disk_used_bytes, disk_bytes(spool) - disk_before)
    result = await end
    assert (result.timed_out, result.exit_code) == (True, 137)
    assert (result.stdout.is_truncated, len(result.stdout.data)) == (True, INLINE_BYTES_MAX)
    assert result.stdout.head.startswith(LINE * 1000)
    assert result.stdout.total_bytes == len(result.stdout.data) + result.stdout.dropped_bytes > 8 * SPOOL_BYTES_MAX
    assert SPOOL_BYTES_MAX <= disk_used_bytes < 2 * SPOOL_BYTES_MAX
    assert memory_bytes < MEMORY_GROWTH_BYTES_MAX
    await unread.aclose()
    await substrate.close()
    edge.stop()
