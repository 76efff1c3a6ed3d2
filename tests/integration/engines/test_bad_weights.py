"""Weights that a vLLM loads and cannot draw with: a token is drawn before they count, and without a logprob they go."""

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from rollout.conformance.check import collect
from rollout.conformance.pauses import Taker
from rollout.engine import EngineInfo, PauseMode, SampleRequest
from rollout.engines.pool import EnginePool
from rollout.engines.vllm.engine import VllmEngine
from rollout.engines.vllm.testing import WireDouble, write_checkpoint
from rollout.errors import EngineError

MakeServer = Callable[..., Awaitable[WireDouble]]
MakePool = Callable[..., Awaitable[EnginePool]]
Opened = Callable[..., Awaitable[VllmEngine]]
Ask = Callable[..., SampleRequest]


async def never(info: EngineInfo) -> None:
    """Announce nothing."""
    raise AssertionError(f"announced: {info}")


@pytest.mark.parametrize("mode", [None, "keep", "abort"])
async def test_weights_that_are_nan_are_refused_and_the_old_ones_draw_on_in_a_pause_too(
    make_server: MakeServer, opened: Opened, ask: Ask, tmp_path: Path, mode: PauseMode | None
) -> None:
    server = await make_server()
    engine = await opened(server)
    whole, info = await collect(engine, ask(40)), engine.info
    if mode is not None:
        await engine.pause(mode)
    running = Taker(engine, ask(40))
    if mode is None:
        await running.begun()
    nan = write_checkpoint(tmp_path / "nan", None)
    for _ in range(2):
        with pytest.raises(EngineError, match=f"weights of {nan} are refused: .* without a logprob, or NaN"):
            await engine.update(nan, 3, never)
        assert (engine.info, engine.failure, server.label) == (info, "", "default")
    if mode is not None:
        assert (engine.is_paused, server.paused, running.chunks) == (True, "abort", [])
        await engine.resume()
    await running.task
    assert running.token_ids == whole.token_ids
    assert (server.paused, await collect(engine, ask(40))) == (None, whole)
    assert (await engine.update(write_checkpoint(tmp_path / "new", 5), 3)).policy_version == 3


async def test_a_pool_refuses_weights_that_are_nan_and_leaves_nobody_out(
    make_server: MakeServer, make_pool: MakePool, ask: Ask, tmp_path: Path
) -> None:
    servers = [await make_server(), await make_server()]
    pool = await make_pool(*servers)
    whole, info = await collect(pool, ask(40)), pool.info
    with pytest.raises(EngineError, match="without a logprob, or NaN"):
        await pool.update(write_checkpoint(tmp_path / "nan", None), 3, never)
    assert (pool.info, pool.faults, [server.label for server in servers]) == (info, {}, ["default"] * 2)
    assert await collect(pool, ask(40)) == whole


async def test_a_trainers_own_weights_that_are_nan_are_refused_until_it_puts_others_there(
    make_server: MakeServer, opened: Opened, ask: Ask, tmp_path: Path
) -> None:
    server = await make_server()
    engine = await opened(server)
    nan, new = write_checkpoint(tmp_path / "nan", None), write_checkpoint(tmp_path / "new", 5)
    await engine.pause("abort")
    server._weights, server.label = (nan / "model.safetensors").read_bytes(), "3"
    with pytest.raises(EngineError, match=r"are refused: .*NaN; .* put others there, or start it again"):
        await engine.update(nan, 3, never)
    assert (engine.info.policy_version, server.label, server.paused) == (0, "3", "abort")
    server._weights = (new / "model.safetensors").read_bytes()
    info = await engine.update(new, 3)
    await engine.resume()
    assert (info.policy_version, len((await collect(engine, ask(5))).token_ids)) == (3, 5)
    assert not [path for path, _ in server.calls if path == "/collective_rpc"]


async def test_a_server_whose_weights_are_nan_is_not_opened(make_server: MakeServer, opened: Opened) -> None:
    server = await make_server(None)
    with pytest.raises(EngineError, match="to try its weights: a token without a logprob, or NaN"):
        await opened(server)


class _SlowToTry(WireDouble):
    """Answers in one piece when it may."""

    def __init__(self, folder: Path, **options: Any) -> None:
        super().__init__(folder, **options)
        self.is_asked, self.may_answer = asyncio.Event(), asyncio.Event()
        self.may_answer.set()

    async def _whole(self, *given: Any) -> dict[str, Any]:
        self.is_asked.set()
        await self.may_answer.wait()
        return await super()._whole(*given)


async def test_a_pause_that_comes_while_new_weights_are_tried_begins_behind_that_and_lasts(
    make_server: MakeServer, opened: Opened, ask: Ask, tmp_path: Path
) -> None:
    server = await make_server(kind=_SlowToTry)
    assert isinstance(server, _SlowToTry)
    engine = await opened(server)
    server.is_asked.clear()
    server.may_answer.clear()
    update = asyncio.create_task(engine.update(write_checkpoint(tmp_path / "new", 5), 3))
    async with asyncio.timeout(60):
        await server.is_asked.wait()
        pause = asyncio.create_task(engine.pause("keep"))
        waiting = Taker(engine, ask(5))
        await asyncio.sleep(0)
        assert (server.paused, pause.done(), engine.is_paused) == (None, False, True)
        server.may_answer.set()
        info = await update
        await pause
    assert (info.policy_version, server.paused, waiting.chunks) == (3, "keep", [])
    await engine.resume()
    await waiting.task
    assert {chunk.policy_version for chunk in waiting.chunks} == {3}
