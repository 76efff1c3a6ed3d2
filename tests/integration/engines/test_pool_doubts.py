"""Servers that say nothing, and what happens to rollouts while it is asked whose weights drew them."""

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
from aiohttp import web

from rollout.conformance.check import collect
from rollout.conformance.pauses import Taker
from rollout.engine import SampleRequest
from rollout.engines.pool import EnginePool
from rollout.engines.vllm import pauses, stream
from rollout.engines.vllm.testing import WireDouble, write_checkpoint
from rollout.errors import EngineError, ForeignWeightsError

MakeServer = Callable[..., Awaitable[WireDouble]]
MakePool = Callable[..., Awaitable[EnginePool]]
Ask = Callable[..., SampleRequest]


class MuteDouble(WireDouble):
    """Does not answer on paths that begin with one of `mute`."""

    mute: tuple[str, ...] = ()

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.may_speak = asyncio.Event()

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        if request.path.startswith(self.mute):
            await self.may_speak.wait()
        return await super()._answer(request)


async def doubted(make_server: MakeServer, make_pool: MakePool, ask: Ask, count: int) -> tuple[EnginePool, Taker]:
    """A pool of so many, and an answer whose server has failed, with weights that are nobody's, and does not say so."""
    servers = [await make_server(kind=MuteDouble) for _ in range(count)]
    pool = await make_pool(*servers)
    home = servers[0]
    home.fault_at = 60
    taker = Taker(pool, ask(900))
    await asyncio.wait_for(taker.begun(), 20)
    assert isinstance(home, MuteDouble)
    home.label, home.fault, home.mute = "77", "cut", ("/weight_info",)
    async with asyncio.timeout(20):
        while not pool.faults:  # noqa: ASYNC110 - a state, not an event
            await asyncio.sleep(0.001)
    asyncio.get_running_loop().call_later(0.2, home.may_speak.set)
    home.fault = None
    return pool, taker


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """However busy the host is."""
    monkeypatch.setattr(stream, "VOUCH_S_MAX", 60.0)


@pytest.mark.parametrize("by", ["preempt", "pause"])
async def test_who_is_ended_while_its_server_is_in_doubt_is_told_whose_weights_drew_it(
    make_server: MakeServer, make_pool: MakePool, ask: Ask, by: str
) -> None:
    pool, taker = await doubted(make_server, make_pool, ask, 2)
    await (pool.preempt("s") if by == "preempt" else pool.pause("abort"))
    with pytest.raises(ForeignWeightsError):
        await asyncio.wait_for(taker.task, 20)


async def test_an_update_of_a_server_in_doubt_hears_first_whose_weights_it_had(
    make_server: MakeServer, make_pool: MakePool, ask: Ask, tmp_path: Path
) -> None:
    pool, taker = await doubted(make_server, make_pool, ask, 1)
    await asyncio.wait_for(pool.update(write_checkpoint(tmp_path / "new", 5), 78), 20)
    with pytest.raises(ForeignWeightsError):
        await asyncio.wait_for(taker.task, 20)
    assert {chunk.policy_version for chunk in taker.chunks} == {0}
    assert len((await collect(pool, ask(5))).token_ids) == 5


async def test_a_server_that_says_nothing_at_all_is_not_asked_for_longer_than_its_callers_wait(
    make_server: MakeServer, make_pool: MakePool, ask: Ask
) -> None:
    servers = [await make_server(kind=MuteDouble), await make_server()]
    pool = await make_pool(*servers, silence_s_max=2.0)
    whole = await collect(pool, ask(60))
    servers[0].fault, servers[0].mute = "hang", ("/",)
    assert await asyncio.wait_for(collect(pool, ask(60)), 20) == whole
    servers[0].may_speak.set()


async def test_a_pause_that_waits_gives_up_an_idle_server_that_says_nothing(
    make_server: MakeServer, make_pool: MakePool, ask: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pauses, "DRAIN_S_MAX", 0.3)
    monkeypatch.setattr(pauses, "ASKED_S_MAX", 0.3)
    servers = [await make_server(kind=MuteDouble), await make_server()]
    pool = await make_pool(*servers)
    servers[0].mute = ("/pause", "/is_paused", "/resume")
    await asyncio.wait_for(pool.pause("wait"), 20)
    assert list(pool.faults) == [servers[0].url]
    await pool.resume()
    assert len((await asyncio.wait_for(collect(pool, ask(5)), 20)).token_ids) == 5
    servers[0].may_speak.set()


async def test_a_pause_that_waits_does_so_for_the_answers_of_others_while_the_server_is_there(
    make_server: MakeServer, make_pool: MakePool, ask: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pauses, "DRAIN_S_MAX", 0.05)
    monkeypatch.setattr(pauses, "ASKED_S_MAX", 60.0)
    server = await make_server()
    one, other = await make_pool(server), await make_pool(server)
    taker = Taker(other, ask(900))
    await asyncio.wait_for(taker.begun(), 20)
    await asyncio.wait_for(one.pause("wait"), 60)
    assert (server.requests_count, one.faults) == (0, {})
    assert sum(path.startswith("/pause") for path, _ in server.calls) > 1, "it took longer than one question"
    await one.resume()
    await taker.task
    assert (len(taker.token_ids), other.faults) == (900, {})


async def test_who_is_preempted_and_cut_for_new_weights_is_at_its_end_before_they_are_loaded(
    make_server: MakeServer, make_pool: MakePool, ask: Ask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream, "ABORTED_S_MAX", 0.05)
    server = await make_server(kind=MuteDouble)
    pool = await make_pool(server)
    server.mute = ("/inference/v1/generate",)
    taker = Taker(pool, ask(60))
    updating = asyncio.create_task(pool.update(write_checkpoint(tmp_path / "new", 5), 3))
    async with asyncio.timeout(20):
        while not server.label.startswith("changing"):  # noqa: ASYNC110 - a state, not an event
            await asyncio.sleep(0.001)
    await pool.preempt("s")
    await asyncio.sleep(0.5)
    assert not server.is_loading.is_set()
    server.may_speak.set()
    await asyncio.wait_for(asyncio.gather(updating, taker.task, return_exceptions=True), 20)
    with pytest.raises(EngineError, match="preempted"):
        await taker.task
    assert (await updating).policy_version == 3
