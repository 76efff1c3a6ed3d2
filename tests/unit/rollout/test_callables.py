"""Functions of the operator's that give rewards: what one that hangs, or ends its process, does to the others."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest

from rollout.errors import VerifierError
from rollout.rewards.callables import CALLS_COUNT_MAX, call

HERE = "tests.unit.rollout.test_callables"
RECORD: Any = None
GATE = threading.Event()


def hangs(_record: object) -> float:
    GATE.wait()
    return 1.0


def answers(_record: object) -> float:
    return 2.0


def exits(_record: object) -> float:
    raise SystemExit(3)


async def test_functions_that_hang_keep_their_own_places_and_nobody_elses_threads() -> None:
    GATE.clear()
    try:
        hanging = [call(f"{HERE}:hangs", RECORD, 0.05) for _ in range(CALLS_COUNT_MAX)]
        for outcome in await asyncio.gather(*hanging, return_exceptions=True):
            assert isinstance(outcome, VerifierError)
            assert "no reward within 0.05 s" in str(outcome)
        async with asyncio.timeout(60):
            assert await asyncio.to_thread(int, "1") == 1
        with pytest.raises(VerifierError, match=r"no reward within 0\.05 s"):
            await call(f"{HERE}:answers", RECORD, 0.05)
    finally:
        GATE.set()
    assert await call(f"{HERE}:answers", RECORD, 30) == (2.0, {"reward": 2.0})


async def test_a_function_that_would_end_the_process_ends_its_own_call() -> None:
    with pytest.raises(VerifierError, match="raised SystemExit: 3"):
        await call(f"{HERE}:exits", RECORD, 30)
