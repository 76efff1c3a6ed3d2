"""How long a client asks again: patience is for a server that is not there, not for one that has nothing to say."""

from __future__ import annotations

import pytest

from dsec.errors import UnreachableError
from rollout.client import connection
from rollout.client.connection import ALIVE_S, Retry

LOST = UnreachableError("nobody there")


class Clock:
    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture(autouse=True)
def _at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "DELAY_S_MIN", 0.0)


async def test_a_stream_that_was_quiet_for_longer_than_patience_lasts_is_asked_again() -> None:
    clock = Clock()
    retry = Retry(10.0, clock)
    clock.now_s += max(ALIVE_S, 10.0) + 1.0  # a long tool, or a caller that trains between two groups
    await retry.wait(LOST)
    retry.begin()
    clock.now_s += 9.0
    await retry.wait(LOST)
    retry.begin()
    clock.now_s += 2.0
    with pytest.raises(UnreachableError):
        await retry.wait(LOST)


async def test_an_answer_begins_patience_anew() -> None:
    clock = Clock()
    retry = Retry(10.0, clock)
    for _ in range(3):
        retry.begin()
        clock.now_s += 9.0
        retry.reset()
        await retry.wait(LOST)
    retry.begin()
    clock.now_s += 11.0
    with pytest.raises(UnreachableError):
        await retry.wait(LOST)
