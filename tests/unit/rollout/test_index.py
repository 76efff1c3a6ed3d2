"""A call of the index whose caller stops waiting."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from rollout.workers import index as module
from rollout.workers.index import Index, sqlite_url


async def test_a_cancel_is_not_lost_at_whatever_moment_it_meets_the_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index, met = Index(sqlite_url(tmp_path)), 0
    for moment in range(8):
        answer = asyncio.get_running_loop().create_future()

        async def in_thread(_work: Any, _name: str, answer: asyncio.Future[Any] = answer) -> Any:
            return await answer

        monkeypatch.setattr(module, "in_thread", in_thread)
        asking = asyncio.create_task(index.partition_of("job"))
        await asyncio.sleep(0)
        answer.set_result([])
        for _ in range(moment):
            await asyncio.sleep(0)
        if asking.cancel():
            met += 1
            with pytest.raises(asyncio.CancelledError):
                await asking
    assert met > 0
