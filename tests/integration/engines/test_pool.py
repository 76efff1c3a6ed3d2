"""Several servers as one engine: who fails is left out, mended and taken back, and nothing is drawn twice."""

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest

from dsec.testing import FakeSubstrate
from rollout.config import RolloutConfig
from rollout.conformance.check import chunks_of, collect, joined
from rollout.conformance.pauses import Taker
from rollout.engine import SampleRequest, Sampling
from rollout.engines.homes import SESSIONS_SLACK
from rollout.engines.pool import EnginePool
from rollout.engines.vllm.engine import VllmEngine
from rollout.engines.vllm.testing import WireDouble, WireFault, write_checkpoint
from rollout.errors import EngineError, PreemptedError
from rollout.generation import Ask as Generation
from rollout.generation import Drawn, generate
from rollout.jobs import make_conversation
from rollout.main import load_tokenizer
from rollout.service import RolloutService

MakeServer = Callable[..., Awaitable[WireDouble]]
Ask = Callable[..., SampleRequest]
Prompt = tuple[int, ...]
MakePool = Callable[..., Awaitable[EnginePool]]
Healthy = Callable[[EnginePool], Awaitable[None]]


def drew(server: WireDouble) -> int:
    """Requests that a server got for an answer."""
    return sum(path.endswith("/generate") and "stream" in body for path, body in server.calls)


@pytest.mark.parametrize(
    "fault", ["cut", "error in stream", "no end", "too many", "nan", "unknown id", "noise", "no text", "nested", "hang"]
)
async def test_what_one_engine_breaks_another_goes_on_with(
    make_server: MakeServer, make_pool: MakePool, healthy: Healthy, ask: Ask, fault: WireFault
) -> None:
    servers = [await make_server(), await make_server()]
    pool = await make_pool(*servers, silence_s_max=2.0 if fault == "hang" else 30.0)
    whole = await collect(pool, ask(40))
    (home,) = [server for server in servers if drew(server)]
    (other,) = [server for server in servers if server is not home]
    home.fault = fault
    chunks = await chunks_of(pool, ask(40))
    assert joined(chunks) == whole
    assert drew(other) == 1
    assert [chunk.kv for chunk in chunks if chunk.kv] == ["rebuilt"]
    home.fault = None
    await healthy(pool)


async def test_an_engine_that_is_killed_comes_back_by_itself_with_the_weights_of_the_others(
    make_server: MakeServer, make_pool: MakePool, healthy: Healthy, ask: Ask, tmp_path: Path
) -> None:
    servers = [await make_server(), await make_server()]
    pool = await make_pool(*servers)
    await pool.update(write_checkpoint(tmp_path / "new", 5), 3)
    whole = await collect(pool, ask(300))
    takers = [Taker(pool, ask(300, session=f"s{number}")) for number in range(12)]
    await asyncio.gather(*(taker.begun() for taker in takers))
    assert [server for server in servers if drew(server) <= 1] == []
    await servers[1].stop()
    await asyncio.gather(*(taker.task for taker in takers))
    assert {joined(taker.chunks).token_ids for taker in takers} == {whole.token_ids}
    assert list(pool.faults) == [servers[1].url]
    await servers[1].start()
    assert servers[1].label == "default"
    await healthy(pool)
    assert servers[1].label == servers[0].label == f"3@{pool.info.weights_digest} {tmp_path}/new"


async def test_an_update_that_one_engine_misses_leaves_it_out_until_it_has_it(
    make_server: MakeServer, make_pool: MakePool, healthy: Healthy, ask: Ask, tmp_path: Path
) -> None:
    servers = [await make_server(), await make_server()]
    pool = await make_pool(*servers)
    taker = Taker(pool, ask(400))
    await taker.begun()
    await servers[1].stop()
    info = await pool.update(write_checkpoint(tmp_path / "new", 5), 3)
    assert pool.info == info
    assert list(pool.faults) == [servers[1].url]
    chunks = await chunks_of(pool, ask(5, session="other"))
    assert {chunk.policy_version for chunk in chunks} == {3}
    await servers[1].start()
    await healthy(pool)
    await taker.task
    assert {chunk.policy_version for chunk in taker.chunks} == {0, 3}


async def test_a_pool_that_is_made_anew_finds_the_weights_and_brings_the_others_to_them(
    make_server: MakeServer, make_pool: MakePool, healthy: Healthy, ask: Ask, tmp_path: Path
) -> None:
    servers = [await make_server(), await make_server()]
    first = await make_pool(*servers)
    info = await first.update(write_checkpoint(tmp_path / "new", 5), 3)
    whole = await collect(first, ask(20))
    await first.close()
    await servers[0].stop()
    await servers[0].start()
    pool = await make_pool(*servers)
    assert pool.info == info
    assert list(pool.faults) == [servers[0].url]
    assert await collect(pool, ask(20)) == whole
    await healthy(pool)
    assert servers[0].label == servers[1].label
    assert await pool.update(tmp_path / "new", 3) == info


async def test_a_server_that_is_not_there_yet_draws_once_it_is(
    make_server: MakeServer, make_pool: MakePool, healthy: Healthy, ask: Ask
) -> None:
    servers = [await make_server(), await make_server()]
    await servers[1].stop()
    pool = await make_pool(*servers)
    assert list(pool.faults) == [servers[1].url]
    await servers[1].start()
    await healthy(pool)
    await servers[0].stop()
    assert len((await collect(pool, ask(20))).token_ids) == 20
    assert drew(servers[1]) == 1


async def test_what_one_service_updates_another_on_the_same_server_draws_with_once_it_is_told(
    make_server: MakeServer, make_pool: MakePool, ask: Ask, tmp_path: Path
) -> None:
    server = await make_server()
    one, other = await make_pool(server), await make_pool(server)
    taker = Taker(other, ask(300))
    await taker.begun()
    info = await one.update(write_checkpoint(tmp_path / "new", 5), 3)
    async with asyncio.timeout(20):
        while "policy_version 3, not 0" not in "".join(other.faults.values()):  # noqa: ASYNC110 - mended by the clock
            await asyncio.sleep(0.005)
    count = len(taker.chunks)
    assert await other.update(tmp_path / "new", 3) == info
    await taker.task
    versions = [chunk.policy_version for chunk in taker.chunks]
    assert versions == [0] * count + [3] * (len(versions) - count)
    assert other.faults == {}


async def test_weights_that_none_can_take_change_nothing(
    make_server: MakeServer, make_pool: MakePool, ask: Ask, tmp_path: Path
) -> None:
    pool = await make_pool(await make_server(), await make_server())
    before = pool.info
    with pytest.raises(EngineError, match="nowhere"):
        await pool.update(tmp_path / "nowhere", 3)
    await collect(pool, ask(5, on_update="pin"))
    with pytest.raises(EngineError, match=r"1 sessions pin .* release"):
        await pool.update(write_checkpoint(tmp_path / "new", 5), 3)
    await pool.release("s")
    assert (pool.info, pool.faults) == (before, {})
    assert (await pool.update(write_checkpoint(tmp_path / "new", 5), 3)).policy_version == 3


async def test_an_engine_that_fails_while_it_loads_is_let_do_so_and_then_opened_once(
    make_server: MakeServer, make_pool: MakePool, healthy: Healthy, ask: Ask, tmp_path: Path
) -> None:
    server = await make_server()
    pool = await make_pool(server)
    server.may_load.clear()
    changing = asyncio.create_task(pool.update(write_checkpoint(tmp_path / "new", 5), 3))
    await server.is_loading.wait()
    server.shut = "/pause"
    with pytest.raises(EngineError, match="404"):
        await pool.pause("keep")
    assert list(pool.faults) == [server.url]
    server.shut = ""
    server.may_load.set()
    assert (await changing).policy_version == 3
    await healthy(pool)
    versions = [path for path, _ in server.calls if path == "/version"]
    assert {chunk.policy_version for chunk in await chunks_of(pool, ask(40))} == {3}
    assert len(versions) == 2


async def test_a_pool_waits_for_its_only_engine_and_can_be_preempted_and_closed_meanwhile(
    make_server: MakeServer, make_pool: MakePool, ask: Ask
) -> None:
    server = await make_server()
    pool = await make_pool(server)
    whole = await collect(pool, ask(200))
    takers = [Taker(pool, ask(200, session=f"s{number}")) for number in range(3)]
    await asyncio.gather(*(taker.begun() for taker in takers))
    await server.stop()
    async with asyncio.timeout(20):
        while not pool.faults:  # noqa: ASYNC110 - the socket breaks when it does
            await asyncio.sleep(0.005)
    await pool.preempt("s0")
    with pytest.raises(PreemptedError):
        await takers[0].task
    await server.start()
    await takers[1].task
    assert joined(takers[1].chunks).token_ids == whole.token_ids
    await takers[2].task
    late = Taker(pool, ask(900))
    await late.begun()
    await server.stop()
    await pool.close()
    with pytest.raises(EngineError, match="closed"):
        await late.task


async def test_a_request_that_kills_every_engine_is_given_up(
    make_server: MakeServer, make_pool: MakePool, ask: Ask
) -> None:
    servers = [await make_server(), await make_server()]
    pool = await make_pool(*servers)
    for server in servers:
        server.fault, server.fault_at = "error in stream", 0
    with pytest.raises(EngineError, match="died"):
        await collect(pool, ask(5))


async def test_a_pause_is_of_all_and_of_those_that_come_back(
    make_server: MakeServer, make_pool: MakePool, healthy: Healthy, ask: Ask
) -> None:
    servers = [await make_server(), await make_server()]
    pool = await make_pool(*servers)
    await pool.pause("keep")
    assert [server.paused for server in servers] == ["keep", "keep"]
    assert pool.is_paused
    await servers[1].stop()
    await pool.pause("abort")
    assert list(pool.faults) == [servers[1].url]
    await servers[1].start()
    await healthy(pool)
    assert [server.paused for server in servers] == ["abort", "abort"]
    taker = Taker(pool, ask(5))
    await pool.resume()
    assert [server.paused for server in servers] == [None, None]
    await taker.task
    assert pool.failure == ""
    for server in servers:
        await server.stop()
    with pytest.raises(EngineError, match=f"{servers[0].url}: .*{servers[1].url}: "):
        await pool.pause("keep")
    assert all(pool.failure.count(f"{server.url}: ") == 1 for server in servers)


async def test_engines_that_can_never_be_one_are_named_with_what_they_differ_in(make_server: MakeServer) -> None:
    servers = [await make_server(0), await make_server(1)]
    pool = EnginePool({server.url: VllmEngine(server.url) for server in servers}, 1.0)
    with pytest.raises(EngineError, match=rf"{servers[1].url} and .*cannot be one pool: weights_digest"):
        await pool.open()
    nobody = EnginePool({"http://127.0.0.1:1": VllmEngine("http://127.0.0.1:1")}, 1.0)
    with pytest.raises(EngineError, match="Connect"):
        await nobody.open()
    await nobody.close()


async def test_group_mates_and_followers_go_where_their_prefix_is_until_that_is_too_full(
    make_server: MakeServer, make_pool: MakePool, ask: Ask, prompt: Prompt
) -> None:
    servers = [await make_server(), await make_server()]
    pool = await make_pool(*servers)
    for number in range(SESSIONS_SLACK + 1):
        await collect(pool, ask(2, session=f"s{number}"))
    assert [drew(server) for server in servers] == [SESSIONS_SLACK + 1, 0]
    await collect(pool, ask(2, session="one too many"))
    assert [drew(server) for server in servers] == [SESSIONS_SLACK + 1, 1]
    stranger = tuple(reversed(prompt))
    await collect(pool, ask(2, session="stranger", token_ids=stranger))
    assert drew(servers[1]) == 2
    for number in range(SESSIONS_SLACK + 1):
        await pool.release(f"s{number}")
    await collect(pool, ask(2, session="stranger", token_ids=(*stranger, 7)))
    assert drew(servers[1]) == 3
    await collect(pool, ask(2, session="new stranger", token_ids=tuple(range(2, 60))))
    assert drew(servers[0]) == SESSIONS_SLACK + 2


async def test_a_service_outlives_its_only_server(make_pool: MakePool, tmp_path: Path) -> None:
    tokenizer = load_tokenizer()
    server = WireDouble(write_checkpoint(tmp_path / "weights", 0, tokenizer.vocab_count))
    await server.start()
    asked = Generation(
        request_id="g",
        prompts=(make_conversation("p", token_ids=[0, 5, 6, 7]),),
        sampling=Sampling(temperature=1.0, seed=2),
        tokens_count_max=80,
        is_named=True,
    )

    async def drawn_by(directory: str, disturb: Callable[[], Awaitable[Any]]) -> list[int]:
        pool = EnginePool({server.url: VllmEngine(server.url)}, 30.0)
        config = RolloutConfig(context_tokens_count_max=1024)
        async with RolloutService(tmp_path / directory, pool, FakeSubstrate(), tokenizer, config) as service:
            await service.start()
            drawn: list[int] = []
            async with aclosing(generate(service, asked)) as pieces:
                async for piece in pieces:
                    if isinstance(piece, Drawn):
                        had = bool(drawn)
                        drawn += piece.token_ids
                        if not had and drawn:
                            await disturb()
            assert not service.ledger.tokens_regenerated["g/p.0"]
            return drawn

    async def kill() -> None:
        await server.stop()
        await server.start()

    whole = await drawn_by("calm", lambda: asyncio.sleep(0))
    assert len(whole) == 80
    assert await drawn_by("killed", kill) == whole
    await server.stop()
