"""Files that are larger than anybody wants to hold: through an Edge, in memory that does not grow with them."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from dsec import AsyncSandbox
from dsec.files import CHUNK_BYTES

BLOCK = os.urandom(1 << 20)
BLOCKS_COUNT = 256
MEMORY_GROWTH_BYTES_MAX = 48 << 20
"""Of what is on its way through a process: windows, messages, and what an allocator keeps."""


async def blocks() -> AsyncIterator[bytes]:
    for _ in range(BLOCKS_COUNT):
        yield BLOCK


class Peak:
    """The most memory of a process since this was made, beyond what it held then."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        Path(f"/proc/{pid}/clear_refs").write_text("5")  # the peak counts from here
        self._before = self._status("VmRSS")

    def _status(self, name: str) -> int:
        lines = Path(f"/proc/{self._pid}/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith(name)).split()[1]) << 10

    def growth_bytes(self) -> int:
        return self._status("VmHWM") - self._before


async def test_a_file_of_many_times_the_memory_that_it_may_take_passes_through_an_edge(
    dsec: Any, edge_process: Any, tmp_path: Path
) -> None:
    edge = edge_process(dsec, tmp_path / "edge")
    async with await AsyncSandbox.create(url=edge.url, memory_bytes=512 << 20, disk_bytes=384 << 20) as sandbox:
        await sandbox.files.write("/tmp/small", BLOCK)  # what the first use of everything loads counts for nobody
        assert await sandbox.files.read("/tmp/small") == BLOCK
        peaks = {"edge": Peak(edge.process.pid), "client": Peak(os.getpid())}
        await sandbox.files.write("/tmp/large", blocks())
        offset, twice = 0, memoryview(BLOCK * 2)
        async for piece in sandbox.files.open_read("/tmp/large"):
            assert len(piece) <= CHUNK_BYTES
            assert piece == twice[offset % len(BLOCK) :][: len(piece)], f"at {offset}"
            offset += len(piece)
        assert offset == BLOCKS_COUNT * len(BLOCK)
        growth = {name: peak.growth_bytes() for name, peak in peaks.items()}
        print(growth)
        assert max(growth.values()) < MEMORY_GROWTH_BYTES_MAX, growth
    edge.stop()
