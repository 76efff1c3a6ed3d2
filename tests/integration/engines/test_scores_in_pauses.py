"""Scores and pauses: what a pause ends, holds up or leaves alone, and that a pause lasts while an engine is mended."""

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from dsec.testing import FakeSubstrate
from rollout.client import AsyncRolloutClient
from rollout.config import RolloutConfig
from rollout.engine import Engine, PauseMode
from rollout.engines.embedded.engine import EmbeddedEngine
from rollout.engines.pool import EnginePool
from rollout.engines.vllm import engine as engine_module
from rollout.engines.vllm import stream
from rollout.engines.vllm.engine import VllmEngine
from rollout.engines.vllm.testing import WireDouble, write_checkpoint
from rollout.errors import EngineError, PreemptedError
from rollout.main import load_tokenizer
from rollout.rpc.grpc_server import start_server
from rollout.rpc.listening import listen_at
from rollout.service import RolloutService

MakeServer = Callable[..., Awaitable[WireDouble]]
MakePool = Callable[..., Awaitable[EnginePool]]
Opened = Callable[..., Awaitable[VllmEngine]]
Healthy = Callable[[EnginePool], Awaitable[None]]
Prompt = tuple[int, ...]


async def until(holds: Callable[[], object]) -> None:
    """Wait for what a server is about to be told."""
    async with asyncio.timeout(60):
        while not holds():  # noqa: ASYNC110 - a state of another
            await asyncio.sleep(0.001)


async def at_work(engine: Engine, server: WireDouble, prompt: Prompt) -> asyncio.Task[Any]:
    """A score that the server has begun."""
    scoring = asyncio.create_task(engine.score(prompt))
    await until(lambda: server.requests_count)
    return scoring


def told(server: WireDouble, *paths: str) -> int:
    """How often the server was asked one of these."""
    return sum(path.startswith(paths) for path, _ in server.calls)


async def test_a_score_that_a_pause_ends_is_preempted_and_its_server_has_not_failed(
    make_server: MakeServer, make_pool: MakePool, prompt: Prompt
) -> None:
    server = await make_server()
    pool = await make_pool(server)
    whole = await pool.score(prompt)
    server.holds_scores = True
    scoring = await at_work(pool, server, prompt)
    calls_count = len(server.calls)
    await pool.pause("abort")
    with pytest.raises(PreemptedError):
        await asyncio.wait_for(scoring, 60)
    assert (pool.faults, pool.failure, server.paused) == ({}, "", "abort")
    late = asyncio.create_task(pool.score(prompt))
    server.holds_scores = False
    await pool.resume()
    assert await late == whole
    assert [path for path, _ in server.calls[calls_count:]].count("/resume") == 1


@pytest.mark.parametrize("mode", ["keep", "wait"])
async def test_a_score_that_waits_in_a_pause_is_preempted_when_that_becomes_an_abort(
    make_server: MakeServer, make_pool: MakePool, opened: Opened, prompt: Prompt, mode: PauseMode
) -> None:
    pool, engine = await make_pool(await make_server()), await opened(await make_server())
    for each in (pool, engine):
        await each.pause(mode)
        scoring = asyncio.create_task(each.score(prompt))
        await asyncio.sleep(0)
        await each.pause("abort")
        with pytest.raises(PreemptedError):
            await asyncio.wait_for(scoring, 60)
    assert pool.faults == {}


async def test_a_score_stands_in_a_pause_for_longer_than_it_may_last_and_goes_on(
    make_server: MakeServer, make_pool: MakePool, prompt: Prompt, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = await make_server()
    pool = await make_pool(server)
    whole = await pool.score(prompt)
    monkeypatch.setattr(engine_module, "SCORE_S_MAX", 4.0)
    server.paused = "keep"  # so that it finds the score there
    scoring = await at_work(pool, server, prompt)
    await pool.pause("keep")
    await asyncio.sleep(5)  # longer than a score may last that stands in no pause
    assert (scoring.done(), pool.faults) == (False, {})
    await pool.resume()
    assert await scoring == whole
    assert told(server, "/inference/v1/generate") == 3, "the probe, and two scores"


async def test_a_score_that_lasts_too_long_without_a_pause_is_a_failure_of_its_server(
    make_server: MakeServer, make_pool: MakePool, prompt: Prompt, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_module, "SCORE_S_MAX", 2.0)
    servers = [await make_server(), await make_server()]
    pool = await make_pool(*servers)
    servers[0].fault = "hang"
    await pool.score(prompt)
    assert list(pool.faults) == [servers[0].url]
    assert "silent for 2 s" in pool.faults[servers[0].url]


async def test_a_pause_that_waits_gives_up_a_score_that_never_ends(
    make_server: MakeServer, opened: Opened, prompt: Prompt, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_module, "SCORE_S_MAX", 2.0)
    server = await make_server()
    engine = await opened(server)
    server.fault = "hang"
    scoring = await at_work(engine, server, prompt)
    await asyncio.wait_for(engine.pause("wait"), 60)
    with pytest.raises(EngineError, match="silent for 2 s"):
        await scoring
    assert (server.paused, engine.is_paused) == ("wait", True)


async def test_a_server_that_hangs_holds_up_no_score_that_a_pause_ends(
    make_server: MakeServer, make_pool: MakePool, prompt: Prompt, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream, "ABORTED_S_MAX", 0.2)
    server = await make_server()
    pool = await make_pool(server)
    server.fault = "hang"
    scoring = await at_work(pool, server, prompt)
    await pool.pause("abort")
    with pytest.raises(PreemptedError):
        await asyncio.wait_for(scoring, 60)
    assert pool.faults == {}
    await asyncio.wait_for(server.idle(), 60)


@pytest.mark.parametrize("mode", ["keep", None])
async def test_a_score_that_new_weights_meet_is_asked_again_and_holds_them_up_in_no_pause(
    make_server: MakeServer, make_pool: MakePool, prompt: Prompt, tmp_path: Path, mode: PauseMode | None
) -> None:
    server = await make_server()
    pool = await make_pool(server)
    server.holds_scores = True
    scoring = await at_work(pool, server, prompt)
    if mode:
        await pool.pause(mode)
    server.holds_scores = False
    await asyncio.wait_for(pool.update(write_checkpoint(tmp_path / "new", 5), 3), 60)
    await pool.resume()
    assert (await scoring).policy_version == 3
    assert await pool.score(prompt) == await scoring


async def test_a_score_that_somebody_else_ended_is_asked_again_where_nobody_did(
    make_server: MakeServer, make_pool: MakePool, prompt: Prompt
) -> None:
    servers = [await make_server(), await make_server()]
    one, other = await make_pool(*servers), await make_pool(servers[0])
    whole = await one.score(prompt)
    servers[0].holds_scores = True
    scoring = await at_work(one, servers[0], prompt)
    await other.pause("abort")
    assert await asyncio.wait_for(scoring, 60) == whole
    assert list(one.faults) == [servers[0].url]
    assert servers[0].paused == "abort"


async def test_a_score_at_an_engine_that_closes_is_an_error(
    make_server: MakeServer, opened: Opened, prompt: Prompt
) -> None:
    server = await make_server()
    engine = await opened(server)
    server.holds_scores = True
    scoring = await at_work(engine, server, prompt)
    await engine.close()
    with pytest.raises(EngineError, match="closed"):
        await asyncio.wait_for(scoring, 60)


async def test_a_server_that_fails_in_a_pause_comes_back_in_it_and_draws_nothing_meanwhile(
    make_server: MakeServer, make_pool: MakePool, healthy: Healthy, prompt: Prompt
) -> None:
    server = await make_server()
    pool = await make_pool(server)
    await pool.pause("keep")
    calls_count = len(server.calls)
    server.shut = "/pause"
    with pytest.raises(EngineError, match="404"):
        await pool.pause("abort")
    server.shut = ""
    await healthy(pool)
    drew_or_resumed = ("/resume", "/inference")
    assert [path for path, _ in server.calls[calls_count:] if path.startswith(drew_or_resumed)] == []
    assert (server.paused, pool.is_paused) == ("keep", True)
    await pool.resume()
    assert len((await pool.score(prompt)).logprobs) == len(prompt) - 1


@pytest.mark.parametrize("ends_by", ["resume", "close"])
async def test_a_pause_that_ends_while_a_server_is_out_ends_there_too(
    make_server: MakeServer, make_pool: MakePool, healthy: Healthy, ends_by: str
) -> None:
    server = await make_server()
    pool = await make_pool(server)
    await pool.pause("keep")
    server.shut = "/"
    with pytest.raises(EngineError, match="404"):
        await pool.pause("abort")
    failing = pool.faults[server.url]
    await until(lambda: pool.faults[server.url] != failing)  # it was asked again, and so is closed
    server.shut = ""
    if ends_by == "close":
        await pool.close()
    else:
        await pool.resume()
        await healthy(pool)
    assert server.paused is None


@pytest.mark.parametrize("kind", ["embedded", "vllm"])
async def test_who_asked_a_service_for_a_score_that_a_pause_ends_is_told_so(tmp_path: Path, kind: str) -> None:
    tokenizer = load_tokenizer()
    server = WireDouble(write_checkpoint(tmp_path / "weights", 0, tokenizer.vocab_count))
    await server.start()
    embedded, pool = EmbeddedEngine(), EnginePool({"one": VllmEngine(server.url)}, 30.0)
    engine: Engine = embedded if kind == "embedded" else pool
    config = RolloutConfig(context_tokens_count_max=1024)
    async with RolloutService(tmp_path / "run", engine, FakeSubstrate(), tokenizer, config) as service:
        await service.start()
        listening = await start_server(service, listen_at("127.0.0.1:0"))
        await listening.serve()
        async with AsyncRolloutClient(f"127.0.0.1:{listening.port}") as client:
            await client.pause_engine("keep")
            scoring = asyncio.create_task(client.score_tokens([0, 5, 9]))
            await until(lambda: embedded._mailboxes or pool._runs)
            await client.pause_engine("abort")
            with pytest.raises(PreemptedError):
                await asyncio.wait_for(scoring, 60)
            await client.resume_engine()
            assert len((await client.score_tokens([0, 5, 9])).logprobs) == 2
        await listening.stop()
    await server.stop()
