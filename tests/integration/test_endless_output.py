"""A command that writes for a whole minute: what it costs is bounded, and everybody else is answered meanwhile.

Whoever prints its output hears what is missing of it.
"""

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


def largest_file_bytes(directory: Path) -> int:
    """What the largest file needs on disk: the flood's, since every other command here writes a line."""
    files = [Path(path, name) for path, _, names in os.walk(directory) for name in names]
    return max((file.stat().st_blocks * 512 for file in files), default=0)


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
    memory_before = resident_bytes(edge.ready["pid"])
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
        disk_used_bytes = max(disk_used_bytes, largest_file_bytes(spool))
    result = await end
    assert (result.timed_out, result.exit_code) == (True, 137)
    assert (result.stdout.is_truncated, len(result.stdout.data)) == (True, INLINE_BYTES_MAX)
    assert result.stdout.head.startswith(LINE * 1000)
    assert result.stdout.total_bytes == len(result.stdout.data) + result.stdout.dropped_bytes > 8 * SPOOL_BYTES_MAX
    assert SPOOL_BYTES_MAX <= disk_used_bytes < 1.1 * SPOOL_BYTES_MAX
    assert memory_bytes < MEMORY_GROWTH_BYTES_MAX
    await unread.aclose()
    await substrate.close()
    edge.stop()


def test_output_that_is_not_kept_is_told_with_its_size_and_ends_with_125(
    dsec: Any, edge_process: Any, tmp_path: Path
) -> None:
    edge = edge_process(dsec, tmp_path, DSEC_EDGE_SPOOL_BYTES_MAX=str(4 << 20))
    sandbox = edge.done("create").strip()
    for key, size, code in (("whole", 4 << 20, 0), ("cut", 20 << 20, 125), ("failed", 20 << 20, 7)):
        line = f"head -c {size} /dev/zero; exit {code % 125}"
        ran = edge("exec", sandbox, "--key", key, "--", "bash", "-c", line)
        again = edge("logs", sandbox, key)
        said = "" if key == "whole" else told_of(size, len(ran.out))
        assert (ran.code, ran.err) == (code, said), key
        assert again.code == (0 if key == "whole" else 125)
        for printed in (ran.out, again.out):  # who reads along may get more of the end than is kept of it
            assert len(printed) == size if key == "whole" else 4 << 20 < len(printed) < size
    as_json = edge("exec", sandbox, "--json", "--", "head", "-c", 20 << 20, "/dev/zero")
    assert (as_json.code, as_json.err, as_json.json()["truncated"]) == (0, "", True)
    edge.done("rm", sandbox)
    kept = edge("logs", sandbox, "cut")
    assert (kept.code, kept.err) == (125, told_of(20 << 20, len(kept.out)))
    edge.stop()


def told_of(size: int, printed: int) -> str:
    way = "let the command write to a file there, and take it with dsec cp"
    return (
        f"dsec: {size - printed} of the {size} bytes of stdout were not kept by the Edge and are missing here: {way}\n"
    )
