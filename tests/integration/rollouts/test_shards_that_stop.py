"""Shards that cannot be written any more keep nobody waiting: neither who acknowledges, nor who asks for their rows."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path
from typing import Any

import pytest

from rollout.errors import ResultsError
from rollout.export.shards import ShardWriter


async def test_what_ends_while_full_shards_close_is_acknowledged_and_has_no_rows(
    serving: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    close, may_close = ShardWriter.close, threading.Event()

    def append(*_: Any) -> int:
        raise ResultsError("the disk is full")

    def close_late(writer: ShardWriter) -> None:
        may_close.wait()
        close(writer)

    async with asyncio.timeout(60), serving(tmp_path / "run", exports_shards=True) as setting:
        try:
            monkeypatch.setattr(ShardWriter, "append", append)
            monkeypatch.setattr(ShardWriter, "close", close_late)
            asked: Any = {"fields": ("tokens",)}
            for request_id in ("first", "second"):  # the second ends in the close that the first one led to
                updates = await setting.job(request_id, **asked)
                ids = [update.rollout_id for update in updates if update.trajectory is not None]
                assert await setting.client.ack(ids) == 6
            with pytest.raises(ResultsError, match=r"side channels of .* are not written"):
                await setting.service.exporter.side_channels(ids[0])  # what a call that asks for them waits for
        finally:
            may_close.set()
