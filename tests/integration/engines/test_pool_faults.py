"""What one request, server or caller of a pool meets is not the others' to bear."""

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
from rollout.engines.vllm.engine import VllmEngine
from rollout.engines.vllm.facts import UNSEEN_VOCAB_COUNT
from rollout.engines.vllm.testing import WireDouble, write_checkpoint
from rollout.errors import EngineError, ForeignWeightsError

MakeServer = Callable[..., Awaitable[WireDouble]]
Opened = Callable[..., Awaitable[VllmEngine]]
MakePool = Callable[..., Awaitable[EnginePool]]
Healthy = Callable[[EnginePool], Awaitable[None]]
Ask = Callable[..., SampleRequest]
Prompt = tuple[int, ...]
POISON = 13


class HeldDouble(WireDouble):
    """What it `holds` is answered when it may be; a prompt that ends with POISON by 500."""

    holds = ""
    context_tokens_max = 0
    """What it says of its context."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.is_held, self.may_answer = asyncio.Event(), asyncio.Event()

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        if request.path == self.holds:
            await self._hold()
        if request.path == "/v1/models" and self.context_tokens_max:
            model = {"id": "hash", "root": self._root, "max_model_len": self.context_tokens_max}
            return web.json_response({"data": [model]})
        return await super()._answer(request)

    async def _generate(self, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        if body["token_ids"][-1] == POISON:
            return web.json_response({"error": {"message": "a bug with this one", "code": 500}}, status=500)
        if self.holds == "prompts" and len(body["token_ids"]) > 1:  # else it is being opened
            await self._hold()
        return await super()._generate(request, body)

    async def _hold(self) -> None:
        self.is_held.set()
        await self.may_answer.wait()


@pytest.mark.parametrize("servers_count", [1, 2])
async def test_a_request_that_no_server_can_answer_fails_alone(
    make_server: MakeServer, make_pool: MakePool, ask: Ask, prompt: Prompt, servers_count: int
) -> None:
    servers = [await make_server(kind=HeldDouble) for _ in range(servers_count)]
    pool = await make_pool(*servers)
    whole, scored = await collect(pool, ask(20)), await pool.score(prompt)
    for server in servers:
        server.holds = "prompts"
    takers = [asyncio.create_task(collect(pool, ask(20, session=f"s{number}"))) for number in range(6)]
    scoring = asyncio.create_task(pool.score(prompt))
    await servers[0].is_held.wait()
    for poisoned in (collect(pool, ask(20, session="bad", token_ids=(*prompt, POISON))), pool.score((*prompt, POISON))):
        with pytest.raises(EngineError, match="a bug with this one"):
            await poisoned
    for server in servers:
        server.may_answer.set()
    assert [each.token_ids for each in await asyncio.gather(*takers)] == [whole.token_ids] * 6
    assert await scoring == scored


@pytest.mark.parametrize("comes_by", ["itself", "new weights"])
@pytest.mark.parametrize("mode", ["abort", None])
async def test_a_pause_that_changes_while_an_engine_is_taken_back_is_that_engines_too(
    make_server: MakeServer,
    make_pool: MakePool,
    healthy: Healthy,
    tmp_path: Path,
    mode: PauseMode | None,
    comes_by: str,
) -> None:
    server = await make_server(kind=HeldDouble)
    pool = await make_pool(server)
    await pool.pause("keep")
    server.shut = "/"
    with pytest.raises(EngineError, match="404"):
        await pool.pause("abort")
    server.holds, server.shut = "/pause", ""
    if comes_by == "itself":
        coming = asyncio.ensure_future(healthy(pool))
    else:
        coming = asyncio.ensure_future(pool.update(write_checkpoint(tmp_path / "new", 5), 3))
    await server.is_held.wait()
    await (pool.pause(mode) if mode else pool.resume())
    server.may_answer.set()
    await coming
    assert (server.paused, pool.is_paused, pool.faults) == (mode, mode is not None, {})


async def test_a_pause_that_only_who_came_back_meanwhile_can_make_is_made(
    make_server: MakeServer, make_pool: MakePool, healthy: Healthy
) -> None:
    servers = [await make_server(kind=HeldDouble) for _ in range(2)]
    pool = await make_pool(*servers)
    await servers[1].stop()
    await pool.pause("keep")
    await pool.resume()
    servers[0].holds = "/pause"
    pausing = asyncio.create_task(pool.pause("keep"))
    await servers[0].is_held.wait()
    await servers[1].start()
    await healthy(pool)
    await servers[0].stop()
    await pausing
    assert (servers[1].paused, list(pool.faults)) == ("keep", [servers[0].url])
    await pool.resume()
    assert (servers[1].paused, pool.is_paused) == (None, False)


@pytest.mark.parametrize("root", ["/a\0b", "/" + "a" * 5000], ids=["nul", "long root"])
@pytest.mark.parametrize("label", ["default", f"0@{'a' * 64} /{'b' * 4000}"], ids=["default", "long label"])
async def test_folders_that_no_host_can_have_are_not_seen(
    make_server: MakeServer, opened: Opened, root: str, label: str
) -> None:
    server = await make_server()
    server._root, server.label = root, label
    engine = await opened(server)
    assert (engine.checkpoint, engine.info.vocab_count) == (None, UNSEEN_VOCAB_COUNT)


async def test_an_engine_that_cannot_be_opened_for_a_reason_that_nobody_foresaw_is_asked_again(
    make_server: MakeServer, make_pool: MakePool, healthy: Healthy, caplog: pytest.LogCaptureFixture
) -> None:
    class Odd(VllmEngine):
        oddities_count = 0

        async def open(self) -> None:
            if self.oddities_count:
                Odd.oddities_count -= 1
                raise ZeroDivisionError("of all things")
            await super().open()

    server = await make_server()
    pool = await make_pool(server, kind=Odd)
    Odd.oddities_count = 3
    await server.stop()
    with pytest.raises(EngineError):
        await pool.pause("keep")
    await server.start()
    await healthy(pool)
    said = [record for record in caplog.records if "ZeroDivisionError: of all things" in record.getMessage()]
    assert [record.exc_info is not None for record in said] == [True]


async def test_no_answer_is_longer_than_the_shortest_of_the_contexts(
    make_server: MakeServer, make_pool: MakePool, ask: Ask, prompt: Prompt
) -> None:
    servers = [await make_server(), await make_server(kind=HeldDouble)]
    servers[1].context_tokens_max = len(prompt) + 40
    pool = await make_pool(*servers)
    assert pool.info.context_tokens_max == len(prompt) + 40
    whole = await collect(pool, ask(900))
    assert (len(whole.token_ids), whole.finish) == (40, "length")
    taker = Taker(pool, ask(900))
    await taker.begun()
    await servers[0].stop()
    await taker.task
    assert taker.token_ids == whole.token_ids


async def test_an_opening_that_is_given_up_leaves_no_engine_open(make_server: MakeServer) -> None:
    servers = [await make_server(), await make_server(kind=HeldDouble)]
    servers[1].holds = "/version"
    engines = {server.url: VllmEngine(server.url) for server in servers}
    pool = EnginePool(engines, 30.0)
    opening = asyncio.create_task(pool.open())
    await servers[1].is_held.wait()
    async with asyncio.timeout(20):
        while engines[servers[0].url]._facts is None:  # noqa: ASYNC110 - it is open when it is
            await asyncio.sleep(0.001)
    opening.cancel()
    with pytest.raises(asyncio.CancelledError):
        await opening
    assert all("closed" in engine.failure for engine in engines.values())
    servers[1].may_answer.set()
    await pool.open()
    assert pool.faults == {}
    await pool.close()


async def test_an_answer_that_ends_with_weights_that_nobody_told_of_goes_on_nowhere(
    make_server: MakeServer, make_pool: MakePool, ask: Ask
) -> None:
    servers = [await make_server(), await make_server()]
    pool = await make_pool(*servers)
    whole = await collect(pool, ask(60))
    taker = Taker(pool, ask(60))
    await taker.begun()
    servers[0].label = "77"
    with pytest.raises(ForeignWeightsError, match="changed to '77' behind this service"):
        await taker.task
    assert await collect(pool, ask(60)) == whole
    assert list(pool.faults) == [servers[0].url]


async def test_who_was_drawn_with_weights_that_an_update_finds_changed_goes_on_nowhere(
    make_server: MakeServer, make_pool: MakePool, ask: Ask, tmp_path: Path
) -> None:
    servers = [await make_server(), await make_server()]
    pool = await make_pool(*servers)
    taker = Taker(pool, ask(900))
    await taker.begun()
    servers[0].label = "77"
    assert (await pool.update(write_checkpoint(tmp_path / "new", 5), 3)).policy_version == 3
    with pytest.raises(ForeignWeightsError, match="77"):
        await taker.task


async def test_who_was_drawn_with_weights_that_another_finds_changed_goes_on_nowhere(
    make_server: MakeServer, make_pool: MakePool, ask: Ask
) -> None:
    servers = [await make_server(), await make_server()]
    pool = await make_pool(*servers)
    whole = await collect(pool, ask(60))
    takers = [Taker(pool, ask(900, session=f"s{number}")) for number in range(3)]
    await asyncio.gather(*(taker.begun() for taker in takers))
    servers[0].label = "77"
    assert await collect(pool, ask(60, session="late")) == whole
    for taker in takers:
        with pytest.raises(ForeignWeightsError, match="changed to '77' behind this service"):
            await taker.task
    assert list(pool.faults) == [servers[0].url]
