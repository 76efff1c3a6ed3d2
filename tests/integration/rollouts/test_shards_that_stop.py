"""Shards that are slow, or cannot be written any more, keep nobody waiting for longer than what has ended takes."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
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


async def test_a_bug_of_the_writer_is_told_when_it_strikes_and_when_the_service_ends(
    serving: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: Any) -> int:
        raise ZeroDivisionError("a bug")

    async def serve() -> None:
        async with asyncio.timeout(60), serving(tmp_path / "run", exports_shards=True) as setting:
            updates = await setting.job()
            ids = [update.rollout_id for update in updates if update.trajectory is not None]
            await setting.until(lambda: "shards are written no more" in caplog.text)
            assert await setting.client.ack(ids) == 6

    monkeypatch.setattr(ShardWriter, "append", fail)
    with pytest.raises(ZeroDivisionError):
        await serve()


async def test_an_acknowledgement_waits_for_what_had_ended_and_not_for_what_ends_meanwhile(
    serving: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    append, is_writing, may_write = ShardWriter.append, threading.Semaphore(0), threading.Semaphore(0)

    def append_slowly(*given: Any) -> int:
        is_writing.release()
        may_write.acquire()
        return append(*given)

    async with asyncio.timeout(60), serving(tmp_path / "run", exports_shards=True) as setting:
        monkeypatch.setattr(ShardWriter, "append", append_slowly)
        prompts, asked = [setting.ask("one")], {"fields": ("tokens", "routes")}
        following = []
        for request_id in ("first", "second", "third"):  # each ends while the one before is being written
            updates = setting.client.submit(prompts, request_id=request_id, **asked)
            following.append(asyncio.create_task(drain(updates)))
            await setting.until(lambda name=f"{request_id}/one.0": setting.service.ledger.is_done(name))
            if request_id == "first":
                acknowledging = asyncio.create_task(setting.service.retention.acknowledge(["first/one.0"]))
            else:
                may_write.release()
            await asyncio.to_thread(is_writing.acquire)
        assert await acknowledging == 1
        assert not following[-1].done()
        may_write.release()
        await asyncio.gather(*following)


async def drain(updates: AsyncIterator[Any]) -> None:
    async for _ in updates:
        pass
