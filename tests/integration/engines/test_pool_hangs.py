"""Servers that hang, or break once somebody gave them weights: nobody waits, and what they drew is vouched for."""

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from rollout.conformance.check import collect
from rollout.conformance.pauses import Taker
from rollout.engine import SampleRequest
from rollout.engines.pool import EnginePool
from rollout.engines.vllm import stream
from rollout.engines.vllm.engine import VllmEngine
from rollout.engines.vllm.testing import WireDouble, WireFault, write_checkpoint
from rollout.errors import EngineError, ForeignWeightsError, PreemptedError

MakeServer = Callable[..., Awaitable[WireDouble]]
Opened = Callable[..., Awaitable[VllmEngine]]
MakePool = Callable[..., Awaitable[EnginePool]]
Healthy = Callable[[EnginePool], Awaitable[None]]
Ask = Callable[..., SampleRequest]
DIGEST = "a" * 64


async def begun(taker: Taker) -> Taker:
    """A consumer, once it has something."""
    async with asyncio.timeout(20):
        await taker.begun()
    return taker


@pytest.mark.parametrize("fault_at", [0, 1])
async def test_a_pause_that_waits_gives_up_a_server_that_hangs(
    make_server: MakeServer, make_pool: MakePool, ask: Ask, fault_at: int
) -> None:
    servers = [await make_server(), await make_server()]
    pool = await make_pool(*servers, silence_s_max=2.0)
    whole = await collect(pool, ask(60))
    servers[0].fault, servers[0].fault_at = "hang", fault_at
    taker = Taker(pool, ask(60))
    async with asyncio.timeout(20):
        while not servers[0].requests_count:  # noqa: ASYNC110 - a count of what has come
            await asyncio.sleep(0.001)
        await pool.pause("wait")
    late = Taker(pool, ask(20, session="late"))
    await asyncio.sleep(2.5)  # longer than an engine may be silent that is not paused
    assert (late.chunks, taker.task.done(), servers[1].paused) == ([], False, "wait")
    servers[0].fault = None
    await pool.resume()
    await asyncio.gather(taker.task, late.task)
    assert (taker.token_ids, late.token_ids) == (whole.token_ids, whole.token_ids[:20])


async def test_who_waits_until_a_pause_has_waited_for_others_is_not_thought_silent(
    make_server: MakeServer, make_pool: MakePool, ask: Ask
) -> None:
    pool = await make_pool(await make_server(), silence_s_max=2.0)
    taker = await begun(Taker(pool, ask(900)))
    pausing = asyncio.create_task(pool.pause("wait"))
    await asyncio.sleep(0)
    late = Taker(pool, ask(20, session="late"))
    async with asyncio.timeout(60):
        await pausing
    await asyncio.sleep(2.5)  # longer than an engine may be silent that is not paused
    assert (len(taker.token_ids), pool.faults, late.chunks) == (900, {}, [])
    await pool.resume()
    await late.task


@pytest.mark.parametrize("fault", ["cut", "error in stream", "no end", "hang", "nan", "refused pause"])
async def test_what_a_server_drew_before_it_failed_goes_on_nowhere_if_its_weights_are_nobodys(
    make_server: MakeServer, make_pool: MakePool, ask: Ask, fault: WireFault
) -> None:
    servers = [await make_server(), await make_server()]
    pool = await make_pool(*servers, silence_s_max=2.0 if fault == "hang" else 30.0)
    servers[0].fault_at = 60
    takers = [await begun(Taker(pool, ask(900, session=f"s{number}"))) for number in range(3)]
    assert servers[1].requests_count == 0
    servers[0].label, servers[0].fault = "77", fault
    if fault == "refused pause":
        servers[0].shut = "/pause"
        await pool.pause("keep")
    for taker in takers:
        with pytest.raises(ForeignWeightsError, match="changed to '77' behind this service"):
            async with asyncio.timeout(20):
                await taker.task
    await pool.resume()
    assert len((await collect(pool, ask(5))).token_ids) == 5
    assert list(pool.faults) == [servers[0].url]


async def test_who_streamed_from_a_server_that_was_started_again_goes_on(
    make_server: MakeServer, make_pool: MakePool, ask: Ask, tmp_path: Path
) -> None:
    servers = [await make_server(), await make_server()]
    pool = await make_pool(*servers)
    await pool.update(write_checkpoint(tmp_path / "new", 5), 3)
    takers = [await begun(Taker(pool, ask(300, session=f"s{number}"))) for number in range(3)]
    await servers[0].stop()
    await servers[0].start()
    assert servers[0].label == "default"
    await asyncio.gather(*(taker.task for taker in takers))
    whole = await collect(pool, ask(300))
    assert {taker.token_ids for taker in takers} == {whole.token_ids}


async def test_what_another_service_cut_before_it_gave_the_server_weights_goes_on(
    make_server: MakeServer, make_pool: MakePool, ask: Ask, tmp_path: Path
) -> None:
    server = await make_server()
    one, other = await make_pool(server), await make_pool(server)
    takers = [await begun(Taker(other, ask(300, session=f"s{number}"))) for number in range(5)]
    info = await one.update(write_checkpoint(tmp_path / "new", 5), 3)
    async with asyncio.timeout(20):
        while "policy_version 3, not 0" not in "".join(other.faults.values()):  # noqa: ASYNC110 - mended by the clock
            await asyncio.sleep(0.005)
    assert await other.update(tmp_path / "new", 3) == info
    await asyncio.gather(*(taker.task for taker in takers))
    assert {chunk.policy_version for taker in takers for chunk in taker.chunks} == {0, 3}


@pytest.mark.parametrize(
    ("label", "is_foreign"),
    [
        ("77", True),
        ("3", False),
        (f"3@{DIGEST} /w", False),
        ("default", False),
        ("2", False),
        (f"4@{DIGEST} /w", False),
        ("changing 77", False),
        ("", False),
    ],
)
async def test_weights_are_vouched_for_unless_they_are_newer_and_nobody_cut_a_request_for_them(
    make_server: MakeServer, opened: Opened, label: str, is_foreign: bool
) -> None:
    server = await make_server()
    server.label = f"3@{DIGEST} /w"
    engine = await opened(server)
    server.label, server.shut = label, "" if label else "/weight_info"
    if is_foreign:
        with pytest.raises(ForeignWeightsError, match="77"):
            await engine.vouch()
    else:
        await engine.vouch()


@pytest.mark.parametrize("fault_at", [0, 1])
@pytest.mark.parametrize("by", ["preempt", "pause"])
async def test_a_server_that_hangs_holds_up_no_preemption_and_is_left_alone(
    make_server: MakeServer, make_pool: MakePool, ask: Ask, monkeypatch: pytest.MonkeyPatch, by: str, fault_at: int
) -> None:
    monkeypatch.setattr(stream, "ABORTED_S_MAX", 0.2)
    server = await make_server()
    pool = await make_pool(server)
    whole = await collect(pool, ask(60))
    server.fault, server.fault_at = "hang", fault_at
    taker = Taker(pool, ask(60))
    async with asyncio.timeout(10):
        while not server.requests_count or (fault_at and not taker.chunks):  # noqa: ASYNC110 - as above
            await asyncio.sleep(0.001)
        await (pool.preempt("s") if by == "preempt" else pool.pause("abort"))
        with pytest.raises(PreemptedError):
            await taker.task
        server.fault = None
        await server.idle()
    assert (taker.token_ids, pool.faults) == (whole.token_ids[: len(taker.token_ids)], {})
    await pool.resume()
    assert await collect(pool, ask(60)) == whole


async def test_who_is_preempted_at_a_server_that_hangs_with_weights_that_are_nobodys_is_told_so(
    make_server: MakeServer, make_pool: MakePool, ask: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream, "ABORTED_S_MAX", 0.2)
    server = await make_server()
    pool = await make_pool(server)
    server.fault, server.fault_at = "hang", 1
    taker = await begun(Taker(pool, ask(60)))
    server.label = "77"
    await pool.preempt("s")
    with pytest.raises(EngineError, match="changed to '77'"):
        async with asyncio.timeout(10):
            await taker.task
