"""Pauses that are given up halfway, or cross a resume: engine and server agree on who paused, and all can be ended."""

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from rollout.conformance.check import collect
from rollout.conformance.pauses import Taker
from rollout.engine import PauseMode, SampleRequest
from rollout.engines.pool import EnginePool
from rollout.engines.vllm import engine as engine_module
from rollout.engines.vllm import pauses, stream
from rollout.engines.vllm.engine import VllmEngine
from rollout.engines.vllm.testing import WireDouble, write_checkpoint
from rollout.errors import EngineError, PreemptedError

MakeServer = Callable[..., Awaitable[WireDouble]]
MakePool = Callable[..., Awaitable[EnginePool]]
Opened = Callable[..., Awaitable[VllmEngine]]
Ask = Callable[..., SampleRequest]
Prompt = tuple[int, ...]


class LateDouble(WireDouble):
    """What it `holds` is done, and answered when it may be."""

    holds = ""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.is_held, self.may_answer = asyncio.Event(), asyncio.Event()

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        response = await super()._answer(request)
        if request.path == self.holds:
            self.is_held.set()
            await self.may_answer.wait()
        return response

    async def held(self) -> None:
        """Wait until something is."""
        await asyncio.wait_for(self.is_held.wait(), 60)


async def until(holds: Callable[[], object]) -> None:
    """Wait for what a server is about to be told."""
    async with asyncio.timeout(60):
        while not holds():  # noqa: ASYNC110 - a state of another
            await asyncio.sleep(0.001)


async def begun(taker: Taker) -> Taker:
    """A consumer, once it has something."""
    await asyncio.wait_for(taker.begun(), 60)
    return taker


async def give_up(task: asyncio.Task[Any]) -> None:
    """As a caller whose deadline is over."""
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_a_pause_that_is_given_up_while_answers_finish_pauses_nothing(
    make_server: MakeServer, make_pool: MakePool, ask: Ask
) -> None:
    server = await make_server()
    pool = await make_pool(server)
    whole = await collect(pool, ask())
    long = await begun(Taker(pool, ask(900, session="long")))
    pausing = asyncio.create_task(pool.pause("wait"))
    await until(lambda: pool.is_paused)
    await give_up(pausing)
    assert await asyncio.wait_for(collect(pool, ask()), 60) == whole
    assert (server.paused, pool.faults) == (None, {})
    await long.task


@pytest.mark.parametrize("mode", ["keep", "wait", "abort"])
@pytest.mark.parametrize("ends_by", ["resume", "close"])
async def test_a_pause_that_is_given_up_when_the_server_has_it_ends_as_any_other(
    make_server: MakeServer, make_pool: MakePool, ask: Ask, ends_by: str, mode: PauseMode
) -> None:
    server = await make_server(kind=LateDouble)
    assert isinstance(server, LateDouble)
    pool = await make_pool(server)
    whole = await collect(pool, ask())
    server.holds = "/pause"
    pausing = asyncio.create_task(pool.pause(mode))
    await server.held()
    await give_up(pausing)
    assert (server.paused, pool.is_paused) == (mode, False)
    if ends_by == "close":
        await pool.close()
        assert server.paused is None
    else:
        await pool.resume()
        assert server.paused is None
        assert await asyncio.wait_for(collect(pool, ask()), 60) == whole


async def test_who_leaves_a_server_whose_weights_change_lets_nobody_draw_meanwhile(
    make_server: MakeServer, opened: Opened, tmp_path: Path
) -> None:
    server = await make_server()
    one, other = await opened(server), await opened(server)
    await one.pause("keep")
    server.may_load.clear()
    changing = asyncio.create_task(other.update(write_checkpoint(tmp_path / "new", 5), 3))
    await asyncio.wait_for(server.is_loading.wait(), 60)
    await one.close()
    assert server.paused == "abort"
    server.may_load.set()
    await changing
    assert server.paused is None


async def test_a_pause_that_waits_for_others_is_not_made_again_once_it_has_ended(
    make_server: MakeServer, opened: Opened, prompt: Prompt, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pauses, "DRAIN_S_MAX", 0.2)
    server = await make_server(kind=LateDouble)
    assert isinstance(server, LateDouble)
    engine, other = await opened(server), await opened(server)
    server.holds_scores = True
    scoring = asyncio.create_task(other.score(prompt))  # which the pause waits for
    await until(lambda: server.requests_count)
    server.holds = "/is_paused"
    pausing = asyncio.create_task(engine.pause("wait"))
    await server.held()
    await engine.resume()
    calls_count = len(server.calls)
    server.may_answer.set()
    await asyncio.wait_for(pausing, 60)
    assert (server.paused, server.calls[calls_count:]) == (None, [])
    await give_up(scoring)


@pytest.mark.parametrize("mode", ["keep", "wait", "abort"])
async def test_a_pause_that_begins_while_another_ends_lasts_until_it_is_ended(
    make_server: MakeServer, opened: Opened, ask: Ask, mode: PauseMode
) -> None:
    server = await make_server(kind=LateDouble)
    assert isinstance(server, LateDouble)
    engine = await opened(server)
    whole = await collect(engine, ask())
    await engine.pause("keep")
    server.holds = "/resume"
    resuming = asyncio.create_task(engine.resume())
    await server.held()
    pausing = asyncio.create_task(engine.pause(mode))
    await asyncio.sleep(0)  # it has asked
    server.may_answer.set()
    await asyncio.wait_for(asyncio.gather(resuming, pausing), 60)
    assert (server.paused, engine.is_paused) == (mode, True)
    await engine.resume()
    assert server.paused is None
    assert await asyncio.wait_for(collect(engine, ask()), 60) == whole


async def test_who_gives_up_a_pause_takes_none_back_that_was_asked_for_since(
    make_server: MakeServer, opened: Opened, ask: Ask
) -> None:
    server = await make_server()
    engine = await opened(server)
    long = await begun(Taker(engine, ask(400)))
    first, second = (asyncio.create_task(engine.pause("wait")) for _ in range(2))
    await asyncio.sleep(0)  # both have asked
    await give_up(first)
    await asyncio.wait_for(second, 60)
    assert (server.paused, engine.is_paused, long.task.done()) == ("wait", True, True)


async def test_a_pause_that_never_reached_the_server_does_not_end_that_of_another(
    make_server: MakeServer, opened: Opened, ask: Ask
) -> None:
    server = await make_server()
    engine, other = await opened(server), await opened(server)
    long = await begun(Taker(engine, ask(900)))
    pausing = asyncio.create_task(engine.pause("wait"))
    await asyncio.sleep(0)  # it waits for the answer
    await engine.close(keeps_pause=True)
    with pytest.raises(EngineError, match="closed"):
        await asyncio.wait_for(pausing, 60)
    with pytest.raises(EngineError, match="closed"):
        await long.task
    await other.pause("keep")
    with pytest.raises(EngineError, match="somebody else paused it"):
        await engine.open()
    assert server.paused == "keep"


async def test_a_request_that_hangs_and_was_cut_for_weights_that_failed_holds_up_no_preemption(
    make_server: MakeServer, opened: Opened, tmp_path: Path, ask: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_module, "CUT_S_MAX", 0.05)
    monkeypatch.setattr(stream, "ABORTED_S_MAX", 0.2)
    server = await make_server()
    engine = await opened(server)
    server.fault, server.fault_at = "hang", 0
    taker = Taker(engine, ask())
    await until(lambda: server.requests_count)
    with pytest.raises(EngineError, match="neither answers a request nor ends it"):
        await asyncio.wait_for(engine.update(write_checkpoint(tmp_path / "new", 5), 3), 60)
    await engine.preempt("s")
    with pytest.raises(PreemptedError):
        await asyncio.wait_for(taker.task, 60)
    await asyncio.wait_for(server.idle(), 60)
