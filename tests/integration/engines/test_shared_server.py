"""Two services on one server: what one does to its weights gives no token of the other a wrong name."""

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from rollout.conformance.check import chunks_of, collect
from rollout.conformance.pauses import Taker
from rollout.engine import EngineInfo, SampleRequest
from rollout.engines import pool as pool_module
from rollout.engines.pool import EnginePool
from rollout.engines.vllm.engine import VllmEngine
from rollout.engines.vllm.testing import WireDouble, write_checkpoint
from rollout.errors import EngineError

MakeServer = Callable[..., Awaitable[WireDouble]]
Opened = Callable[..., Awaitable[VllmEngine]]
Ask = Callable[..., SampleRequest]
Prompt = tuple[int, ...]


async def test_who_opens_a_server_while_its_weights_change_is_sent_away_and_ends_no_pause(
    make_server: MakeServer, opened: Opened, ask: Ask, tmp_path: Path
) -> None:
    server = await make_server()
    one, other = await opened(server), await opened(server)
    taker = Taker(other, ask(900))
    await taker.begun()
    server.may_load.clear()
    changing = asyncio.create_task(one.update(write_checkpoint(tmp_path / "new", 5), 3))
    await server.is_loading.wait()
    with pytest.raises(EngineError, match="somebody else aborted"):
        await taker.task
    await other.close()
    for engine in (other, VllmEngine(server.url)):
        with pytest.raises(EngineError, match=r"are being changed; if nobody does, .* start this vLLM again"):
            await engine.open()
    assert server.paused == "abort"
    server.may_load.set()
    info = await changing
    await other.open()
    assert other.info == info
    assert {chunk.policy_version for chunk in await chunks_of(other, ask(5))} == {3}


async def test_a_request_that_waited_while_others_changed_the_weights_hands_no_token_over(
    make_server: MakeServer, opened: Opened, ask: Ask, prompt: Prompt, tmp_path: Path
) -> None:
    server = await make_server()
    one, other = await opened(server), await opened(server)
    server.may_load.clear()
    changing = asyncio.create_task(one.update(write_checkpoint(tmp_path / "new", 5), 3))
    await server.is_loading.wait()
    calls_count = len(server.calls)
    takers = [Taker(other, ask(count, session=f"s{count}")) for count in (1, 40)]
    scored = asyncio.create_task(other.score(prompt))
    async with asyncio.timeout(60):
        while len(server.calls) < calls_count + 3:  # noqa: ASYNC110 - they are asked when they are
            await asyncio.sleep(0.001)
    server.may_load.set()
    await changing
    said = "weights are being changed|somebody else aborted|behind this service, which knows version 0"
    for task in (takers[0].task, takers[1].task, scored):
        with pytest.raises(EngineError, match=said):
            await task
    assert [taker.chunks for taker in takers] == [[], []]


async def test_of_two_that_change_the_weights_the_later_one_is_refused_and_disturbs_nobody(
    make_server: MakeServer, opened: Opened, tmp_path: Path
) -> None:
    server = await make_server()
    one, other = await opened(server), await opened(server)
    server.may_load.clear()
    changing = asyncio.create_task(one.update(write_checkpoint(tmp_path / "new", 5), 3))
    await server.is_loading.wait()
    with pytest.raises(EngineError, match="are being changed"):
        await other.update(write_checkpoint(tmp_path / "newer", 6), 4)
    assert server.paused == "abort"
    server.may_load.set()
    await changing
    assert (server.paused, server.label[:2]) == (None, "3@")


async def test_what_a_process_left_that_was_killed_while_it_loaded_draws_for_nobody(
    make_server: MakeServer, opened: Opened, ask: Ask, tmp_path: Path
) -> None:
    server = await make_server()
    one = await opened(server)

    async def die(info: EngineInfo) -> None:
        server.shut = "/"  # nothing that it does now arrives
        raise EngineError("killed")

    with pytest.raises(EngineError, match="killed"):
        await one.update(write_checkpoint(tmp_path / "new", 5), 3, die)
    server.shut = ""
    with pytest.raises(EngineError, match="start this vLLM again"):
        await opened(server)
    await one.close()
    await server.stop()
    await server.start()
    assert (await opened(server)).info.policy_version == 0


async def test_a_pause_is_ended_by_who_made_it_and_by_who_comes_after_all_of_them(
    make_server: MakeServer, opened: Opened
) -> None:
    server = await make_server()
    one, other = await opened(server), await opened(server)
    await one.pause("keep")
    await other.close()
    with pytest.raises(EngineError, match="somebody else paused it"):
        await other.open()
    assert server.paused == "keep"
    server.shut = "/resume"  # it cannot be told that this pause has ended
    await one.close()
    server.shut = ""
    await one.open()
    assert server.paused is None
    await one.pause("keep")
    await opened(server)
    assert server.paused is None


async def test_a_pool_waits_until_others_have_loaded_and_goes_on_with_what_it_is_told_of(
    make_server: MakeServer, ask: Ask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool_module, "AGAIN_S_MIN", 0.01)
    monkeypatch.setattr(pool_module, "AGAIN_S_MAX", 0.05)
    server = await make_server()
    one, other = (EnginePool({server.url: VllmEngine(server.url)}, 30.0) for _ in range(2))
    await one.open()
    await other.open()
    taker = Taker(other, ask(300))
    await taker.begun()
    server.may_load.clear()
    changing = asyncio.create_task(one.update(write_checkpoint(tmp_path / "new", 5), 3))
    async with asyncio.timeout(60):
        while "are being changed" not in "".join(other.faults.values()):  # noqa: ASYNC110 - mended by the clock
            await asyncio.sleep(0.005)
    assert server.paused == "abort"
    count = len(taker.chunks)
    server.may_load.set()
    info = await changing
    announced: list[EngineInfo] = []

    async def refuse(info: EngineInfo) -> None:
        raise OSError("the log is full")

    async def announce(info: EngineInfo) -> None:
        assert len(taker.chunks) == count
        announced.append(info)

    with pytest.raises(OSError, match="the log is full"):
        await other.update(tmp_path / "new", 3, refuse)
    assert other.info.policy_version == 0
    assert await other.update(tmp_path / "new", 3, announce) == info
    assert announced == [info]
    assert await other.update(tmp_path / "new", 3, refuse) == info  # again: nothing changes
    await taker.task
    versions = [chunk.policy_version for chunk in taker.chunks]
    assert versions == [0] * count + [3] * (len(versions) - count)
    assert len((await collect(one, ask(5))).token_ids) == 5
    await one.close()
    await other.close()
