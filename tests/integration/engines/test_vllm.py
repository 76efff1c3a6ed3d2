"""The adapter over a double of vLLM's wire: what it asks, and what each way to break does to it."""

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from pathlib import Path

import pytest

from rollout.conformance.check import after, chunks_of, collect
from rollout.conformance.pauses import Taker
from rollout.engine import EngineInfo, Routes, Sampled, SampleRequest, Sampling
from rollout.engines.guard import guarded
from rollout.engines.vllm import engine as engine_module
from rollout.engines.vllm.engine import VllmEngine
from rollout.engines.vllm.stream import ROUTED_TOKENS_MAX
from rollout.engines.vllm.testing import VOCAB_COUNT, WireDouble, WireFault, route_of, write_checkpoint
from rollout.engines.vllm.wire import seed_of
from rollout.errors import EngineError, PreemptedError, RequestError

MakeServer = Callable[..., Awaitable[WireDouble]]
Opened = Callable[..., Awaitable[VllmEngine]]
Ask = Callable[..., SampleRequest]
Prompt = tuple[int, ...]

FAULTS: dict[WireFault, str] = {
    "error in stream": r"EngineCore \\x1b\[31mdied",
    "cut": "Error",
    "no end": "ended before the answer did",
    "too many": "more tokens than were asked for",
    "nan": "without a logprob",
    "unknown id": "a token id that the vocabulary does not have",
    "endless line": "a line of more than",
    "noise": "not an event",
    "no text": "not an event",
    "nested": "not an event",
    "hang": "silent for",
    "status 500": r"answered 500: EngineCore \\x1b\[31mdied",
    "aborts": "somebody else aborted",
    "other version": "were changed to '77' behind this service",
}


async def until(holds: object) -> None:
    """Wait for what the loop is about to do."""
    async with asyncio.timeout(60):
        while not holds():  # type: ignore[operator]  # noqa: ASYNC110 - a count of what streams have brought
            await asyncio.sleep(0.001)


@pytest.mark.parametrize("fault", FAULTS)
async def test_a_fault_is_a_typed_error_and_leaves_others_and_nothing_open(
    make_server: MakeServer, opened: Opened, fault: WireFault, ask: Ask, prompt: Prompt
) -> None:
    server = await make_server()
    engine = await opened(server)
    whole = await collect(engine, ask())
    server.fault = fault
    chunks: list[Sampled] = []

    async def draw() -> None:
        async with aclosing(guarded(engine, ask(), 0.3 if fault == "hang" else 30.0)) as stream:
            async for chunk in stream:
                chunks.append(chunk)  # noqa: PERF401 - kept when it breaks

    with pytest.raises(EngineError, match=FAULTS[fault]) as caught:
        await draw()
    drawn = tuple(token for chunk in chunks for token in chunk.token_ids)
    assert str(caught.value).isprintable()
    assert caught.value.retryable
    assert drawn == whole.token_ids[: len(drawn)]
    server.fault, server.label = None, "default"
    rest = await collect(engine, ask(20 - len(drawn), token_ids=prompt + drawn))
    assert rest == after(whole, len(drawn))
    await server.idle()


async def test_a_server_that_is_killed_breaks_its_streams_and_the_rest_comes_from_its_successor(
    make_server: MakeServer, opened: Opened, ask: Ask, prompt: Prompt
) -> None:
    server = await make_server()
    engine = await opened(server)
    whole = await collect(engine, ask(60))
    running = Taker(engine, ask(60))
    await running.begun()
    await server.stop()
    with pytest.raises(EngineError, match=server.url):
        await running.task
    with pytest.raises(EngineError, match=server.url):
        await collect(engine, ask())
    await engine.close()
    await server.start()
    await engine.open()
    drawn = running.token_ids
    assert await collect(engine, ask(60 - len(drawn), token_ids=prompt + drawn)) == after(whole, len(drawn))


async def test_leaving_a_stream_ends_its_request_at_the_server(
    make_server: MakeServer, opened: Opened, ask: Ask
) -> None:
    server = await make_server()
    engine = await opened(server)
    async with aclosing(engine.sample(ask(900))) as stream:
        await anext(stream)
    await server.idle()


async def test_what_was_cached_is_told_at_the_end_and_only_for_these_weights(
    make_server: MakeServer, opened: Opened, tmp_path: Path, ask: Ask
) -> None:
    server = await make_server()
    engine = await opened(server)
    counts = []
    for checkpoint in (None, None, write_checkpoint(tmp_path / "other", 5)):
        if checkpoint is not None:
            await engine.update(checkpoint, 4)
        chunks = await chunks_of(engine, ask(5))
        counts.append(chunks[-1].cached_tokens_count)
        assert [chunk for chunk in chunks[:-1] if chunk.cached_tokens_count] == []
    assert counts == [0, 64, 0]
    assert not [path for path, _ in server.calls if path.startswith("/pause") and "clear_cache=false" not in path]


async def test_an_update_is_labelled_with_version_and_digest_and_found_again(
    make_server: MakeServer, opened: Opened, tmp_path: Path
) -> None:
    server = await make_server()
    engine = await opened(server)
    first, newer = engine.info, await engine.update(write_checkpoint(tmp_path / "new", 5), 7)
    assert server.label == f"7@{newer.weights_digest} {tmp_path}/new"
    await engine.close()
    assert first.weights_digest != newer.weights_digest
    again = await opened(server)
    assert again.info == newer


async def test_weights_that_a_trainer_put_there_are_taken_and_not_loaded(
    make_server: MakeServer, opened: Opened, tmp_path: Path
) -> None:
    server = await make_server()
    engine = await opened(server)
    server.label = "3"
    info = await engine.update(write_checkpoint(tmp_path / "new", 5), 3)
    assert (info.policy_version, server.label) == (3, f"3@{info.weights_digest} {tmp_path}/new")
    assert not [path for path, _ in server.calls if path == "/collective_rpc"]
    server.label = "9"
    with pytest.raises(EngineError, match="version 9, of which nobody told"):
        await engine.update(tmp_path / "new", 4)


async def test_an_announcement_that_fails_gives_the_server_its_weights_back(
    make_server: MakeServer, opened: Opened, tmp_path: Path, ask: Ask
) -> None:
    server = await make_server()
    engine = await opened(server)
    whole = await collect(engine, ask(40))
    running = asyncio.create_task(collect(engine, ask(40)))

    async def refuse(info: EngineInfo) -> None:
        raise EngineError("the log is full")

    for _ in range(2):
        with pytest.raises(EngineError, match="the log is full"):
            await engine.update(write_checkpoint(tmp_path / "new", 5), 3, refuse)
    assert await running == whole == await collect(engine, ask(40))
    assert server.label == "default"


async def test_what_fails_names_its_server(make_server: MakeServer, opened: Opened, ask: Ask, prompt: Prompt) -> None:
    server = await make_server()
    engine = await opened(server)
    server.fault = "status 500"
    for failing in (collect(engine, ask()), engine.score(prompt)):
        with pytest.raises(EngineError, match=f"^{server.url}: vLLM answered 500: EngineCore"):
            await failing


async def test_a_server_that_lost_its_weights_draws_nothing_until_it_is_opened_again(
    make_server: MakeServer, opened: Opened, tmp_path: Path, ask: Ask, prompt: Prompt
) -> None:
    server = await make_server()
    engine = await opened(server)
    whole = await collect(engine, ask(200))
    taker = Taker(engine, ask(200))
    await taker.begun()

    async def lose(info: EngineInfo) -> None:
        (server.folder / "model.safetensors").rename(tmp_path / "away")
        raise EngineError("the log is full")

    with pytest.raises(EngineError, match="the log is full"):
        await engine.update(write_checkpoint(tmp_path / "new", 5), 3, lose)
    for failing in (taker.task, collect(engine, ask()), engine.score(prompt)):
        with pytest.raises(EngineError, match="no weights any more"):
            await failing
    (tmp_path / "away").rename(server.folder / "model.safetensors")
    await engine.close()
    await server.stop()
    await server.start()
    await engine.open()
    assert await collect(engine, ask(200)) == whole


@pytest.mark.parametrize("is_cancelled", [True, False])
async def test_a_mark_whose_answer_nobody_hears_is_taken_away(
    make_server: MakeServer, opened: Opened, tmp_path: Path, ask: Ask, is_cancelled: bool
) -> None:
    server = await make_server()
    engine = await opened(server)
    whole = await collect(engine, ask())
    server.fault = "mark unanswered"
    if is_cancelled:
        server.may_load.clear()
    update = asyncio.create_task(engine.update(write_checkpoint(tmp_path / "new", 5), 3))
    await server.is_loading.wait()
    if is_cancelled:
        update.cancel()
    with pytest.raises(asyncio.CancelledError if is_cancelled else EngineError):
        await update
    server.fault = None
    server.may_load.set()
    assert await collect(engine, ask()) == whole
    assert (await engine.update(tmp_path / "new", 3)).policy_version == 3


async def test_an_update_is_given_up_where_the_server_never_answers_a_request(
    make_server: MakeServer, opened: Opened, tmp_path: Path, ask: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_module, "CUT_S_MAX", 0.05)
    server = await make_server()
    engine = await opened(server)
    whole = await collect(engine, ask())
    server.fault, server.fault_at = "hang", 0
    async with aclosing(engine.sample(ask(session="other"))) as stream:
        waiting = asyncio.ensure_future(anext(stream))
        await until(lambda: server.requests_count)
        async with asyncio.timeout(60):
            with pytest.raises(EngineError, match="neither answers a request nor ends it"):
                await engine.update(write_checkpoint(tmp_path / "new", 5), 3)
        server.fault = None
        assert (server.label, engine.is_paused) == ("default", False)
        assert await collect(engine, ask()) == whole
        waiting.cancel()
        await asyncio.wait([waiting])


async def test_streams_that_an_update_crosses_are_cut_and_stamped_to_the_token(
    make_server: MakeServer, opened: Opened, tmp_path: Path, ask: Ask, prompt: Prompt
) -> None:
    server = await make_server()
    engine = await opened(server)
    (tmp_path / "new-0").symlink_to(server.folder)
    running = [Taker(engine, ask(120, session=f"s{number}", stream_key=number)) for number in range(8)]
    (tmp_path / "new-3").symlink_to(server.folder)  # the first weights again: with all that was cached for them
    for version in (1, 2, 3):
        seen = sum(len(each.chunks) for each in running)
        await until(lambda seen=seen: sum(len(each.chunks) for each in running) > seen + 20)
        folder = tmp_path / f"new-{version}"
        await engine.update(folder if version == 3 else write_checkpoint(folder, version), version)
    await asyncio.gather(*(each.task for each in running))
    for number, chunks in enumerate(each.chunks for each in running):
        versions = [chunk.policy_version for chunk in chunks]
        assert versions == sorted(versions)
        assert len(set(versions)) > 1
        context = prompt
        for chunk in chunks:  # each, drawn again alone by the weights that it names
            folder = tmp_path / f"new-{chunk.policy_version}"
            assert chunk.token_ids == drawn_alone(folder, context, number, len(chunk.token_ids))
            context += chunk.token_ids
        assert max(chunk.cached_tokens_count for chunk in chunks) == 0
        breaks = [chunk.kv for chunk in chunks if chunk.kv]
        assert breaks == ["rebuilt"] * (len(set(versions)) - 1)


def drawn_alone(folder: Path, context: tuple[int, ...], stream_key: int, count: int) -> tuple[int, ...]:
    """What the double draws with these weights, without a server."""
    params = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "seed": seed_of(3, stream_key)}
    ids = list(context)
    WireDouble(folder)._choice(ids, params, [], len(ids), count)
    return tuple(ids[len(context) :])


async def test_routes_come_in_parts_with_their_tokens_and_again_after_a_crash(
    make_server: MakeServer, opened: Opened, ask: Ask, prompt: Prompt
) -> None:
    server = await make_server(tells_routes=True)
    engine = await opened(server)
    count = 2 * ROUTED_TOKENS_MAX + 5
    chunks = await chunks_of(engine, ask(count, returns_routes=True))
    drawn = tuple(token for chunk in chunks for token in chunk.token_ids)
    assert [len(chunk.token_ids) for chunk in chunks] == [ROUTED_TOKENS_MAX, ROUTED_TOKENS_MAX, 5]
    rows = b"".join(map(route_of, prompt + drawn[:-1]))
    told = b""
    for chunk in chunks:
        assert chunk.routes is not None
        assert chunk.routes.start == len(told) // 6
        told += chunk.routes.expert_ids
    assert told == rows
    (again,) = await chunks_of(engine, ask(7, token_ids=prompt + drawn[:100], returns_routes=True))
    assert again.routes == Routes(0, rows[: 6 * (len(prompt) + 106)])
    for server.fault in ("no routes", "vast routes"):
        with pytest.raises(EngineError, match="routed_experts"):
            await collect(engine, ask(7, returns_routes=True))


async def test_a_pause_that_waits_lets_an_answer_finish_that_comes_in_parts(
    make_server: MakeServer, opened: Opened, ask: Ask
) -> None:
    server = await make_server(tells_routes=True)
    engine = await opened(server)
    running = asyncio.create_task(collect(engine, ask(ROUTED_TOKENS_MAX + 50, returns_routes=True)))
    await until(lambda: server.requests_count)
    await engine.pause("wait")
    late = asyncio.create_task(collect(engine, ask(3, session="late")))
    assert len((await running).token_ids) == ROUTED_TOKENS_MAX + 50
    assert (server.paused, server.requests_count, late.done()) == ("wait", 0, False)
    await engine.resume()
    assert len((await late).token_ids) == 3


async def test_what_stood_still_or_was_cut_finishes_in_a_pause_that_waits(
    make_server: MakeServer, opened: Opened, ask: Ask, tmp_path: Path
) -> None:
    server = await make_server()
    engine = await opened(server)
    running = Taker(engine, ask(60))
    await running.begun()
    await engine.pause("keep")
    async with asyncio.timeout(60):
        await engine.pause("wait")
    assert (len(running.token_ids), server.paused) == (60, "wait")
    await engine.resume()
    running = Taker(engine, ask(200))
    await running.begun()
    server.may_load.clear()
    update = asyncio.create_task(engine.update(write_checkpoint(tmp_path / "new", 5), 3))
    await server.is_loading.wait()
    pause = asyncio.create_task(engine.pause("wait"))
    await asyncio.sleep(0)
    server.may_load.set()
    async with asyncio.timeout(60):
        await asyncio.gather(update, pause)
    assert (len(running.token_ids), server.paused) == (200, "wait")


async def test_a_preemption_that_comes_before_the_server_heard_of_the_request_is_kept(
    make_server: MakeServer, opened: Opened, ask: Ask
) -> None:
    server = await make_server()
    engine = await opened(server)
    for _ in range(5):
        running = asyncio.create_task(collect(engine, ask(900)))
        await asyncio.sleep(0)
        await engine.preempt("s")
        with pytest.raises(PreemptedError):
            await running
    await server.idle()


async def test_a_server_whose_routes_are_shut_is_refused_with_what_opens_them(
    make_server: MakeServer, opened: Opened
) -> None:
    server = await make_server()
    for server.shut in ("/is_paused", "/server_info", "/weight_info", "/inference"):
        with pytest.raises(EngineError, match=r"404: Not Found; .*serve-vllm.* VLLM_SERVER_DEV_MODE=1"):
            await opened(server)


async def test_a_key_is_shown_and_a_wrong_one_is_said(make_server: MakeServer, opened: Opened, ask: Ask) -> None:
    server = await make_server(key="right")
    engine = await opened(server, key="right")
    assert len((await collect(engine, ask(3))).token_ids) == 3
    await engine.close()
    with pytest.raises(EngineError, match="401"):
        await opened(server, key="wrong")


async def test_a_model_that_this_host_does_not_see_may_draw_what_no_tokenizer_knows(
    make_server: MakeServer, opened: Opened, ask: Ask
) -> None:
    engine = await opened(await make_server(shows_folder=False))
    assert engine.info.vocab_count > VOCAB_COUNT
    assert len((await collect(engine, ask(3))).token_ids) == 3


async def test_what_this_server_cannot_do_is_refused_by_name(make_server: MakeServer, opened: Opened, ask: Ask) -> None:
    engine = await opened(await make_server())
    for more, named in (
        ({"sampling": Sampling(temperature=0.005)}, "temperature"),
        ({"returns_hidden": True}, "returns_hidden"),
        ({"returns_routes": True}, "returns_routes"),
    ):
        with pytest.raises(RequestError, match=named):
            await collect(engine, ask(3, **more))
