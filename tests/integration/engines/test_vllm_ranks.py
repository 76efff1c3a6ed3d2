"""A server with several data-parallel ranks: each context is drawn where its beginning is cached."""

import asyncio
import random
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from rollout.conformance.check import Taker, chunks_of, collect
from rollout.engine import Engine, SampleRequest
from rollout.engines.homes import PREFIX_TOKENS
from rollout.engines.pool import EnginePool
from rollout.engines.vllm.engine import VllmEngine
from rollout.engines.vllm.testing import VOCAB_COUNT, WireDouble, write_checkpoint
from rollout.engines.vllm.testing_ranks import BLOCK_TOKENS

MakeServer = Callable[..., Awaitable[WireDouble]]
MakePool = Callable[..., Awaitable[EnginePool]]
Opened = Callable[..., Awaitable[VllmEngine]]
Ask = Callable[..., SampleRequest]
Prompt = tuple[int, ...]
RANKS_COUNT = 4


def stranger(number: int) -> Prompt:
    """A context of its own, long enough for its beginning to be known."""
    source = random.Random(number)
    return tuple(source.randrange(2, VOCAB_COUNT) for _ in range(PREFIX_TOKENS + 50))


async def cached(engine: Engine, request: SampleRequest) -> int:
    """How many tokens of the prompt were cached."""
    return sum(chunk.cached_tokens_count for chunk in await chunks_of(engine, request))


async def test_strangers_spread_and_turns_group_mates_and_questions_go_where_their_beginning_is(
    make_server: MakeServer, opened: Opened, ask: Ask
) -> None:
    server = await make_server(ranks_count=RANKS_COUNT)
    engine = await opened(server)
    turns = {f"s{number}": stranger(number) for number in range(2 * RANKS_COUNT)}
    for session, token_ids in turns.items():
        drawn = await collect(engine, ask(20, session=session, token_ids=token_ids))
        turns[session] = token_ids + drawn.token_ids
    homes = list(server.ranks.placed)
    assert Counter(homes) == dict.fromkeys(range(RANKS_COUNT), 2)
    for kind in ("turn", "question", "mate"):
        server.ranks.placed.clear()
        for session, token_ids in turns.items():
            asked = token_ids if kind == "mate" else (*token_ids, 7, len(kind))
            name = session if kind == "turn" else f"{session}/{kind}"
            found = await cached(engine, ask(5, session=name, token_ids=asked))
            assert found == (len(token_ids) - (kind == "mate")) // BLOCK_TOKENS * BLOCK_TOKENS
        assert server.ranks.placed == homes


async def test_the_rest_of_an_answer_is_drawn_at_the_rank_of_its_beginning_after_a_cut_and_a_broken_stream(
    make_server: MakeServer, make_pool: MakePool, ask: Ask, tmp_path: Path
) -> None:
    server = await make_server(ranks_count=RANKS_COUNT)
    pool = await make_pool(server)
    for number in range(2):
        await collect(pool, ask(5, session=f"s{number}", token_ids=stranger(number)))
    whole = await collect(pool, ask(200, session="s1", token_ids=stranger(1)))
    home = server.ranks.placed[-1]
    assert home != server.ranks.placed[0]
    server.fault, server.fault_at = "cut", 3
    taker = Taker(pool, ask(200, session="s1", token_ids=stranger(1)))
    async with asyncio.timeout(60):
        while not pool.faults:  # noqa: ASYNC110 - the socket breaks when it does
            await asyncio.sleep(0.001)
    server.fault = None
    await taker.task
    assert taker.token_ids == whole.token_ids
    crossed = Taker(pool, ask(900, session="s1", token_ids=stranger(1)))
    await crossed.begun()
    await pool.update(write_checkpoint(tmp_path / "new", 5), 3)
    await crossed.task
    assert server.ranks.placed[2:] == [home] * 5


async def test_a_rank_has_room_again_for_strangers_when_its_sessions_are_released(
    make_server: MakeServer, opened: Opened, ask: Ask
) -> None:
    server = await make_server(ranks_count=2)
    engine = await opened(server)
    for number in range(4):
        await collect(engine, ask(2, session=f"s{number}", token_ids=stranger(number)))
    assert server.ranks.placed == [0, 1, 0, 1]
    await engine.release("s1")
    await engine.release("s3")
    for number in range(4, 6):
        await collect(engine, ask(2, session=f"s{number}", token_ids=stranger(number)))
    assert server.ranks.placed[4:] == [1, 1]


@pytest.mark.parametrize("ranks_count", [1, 2, 6])
async def test_a_server_that_comes_back_with_another_number_of_ranks_draws_at_those_that_it_has(
    make_server: MakeServer, make_pool: MakePool, ask: Ask, ranks_count: int
) -> None:
    server = await make_server(ranks_count=RANKS_COUNT)
    pool = await make_pool(server)
    whole = [
        await collect(pool, ask(5, session=f"s{number}", token_ids=stranger(number))) for number in range(RANKS_COUNT)
    ]
    assert server.ranks.placed == [0, 1, 2, 3]
    await server.stop()
    server.ranks_count = ranks_count
    await server.start()
    async with asyncio.timeout(60):
        for number in reversed(range(RANKS_COUNT)):
            assert await collect(pool, ask(5, session=f"s{number}", token_ids=stranger(number))) == whole[number]
    assert pool.faults == {}
    assert all(rank < ranks_count for rank in server.ranks.placed)


async def test_where_there_is_one_rank_none_is_named_nor_for_a_score(
    make_server: MakeServer, opened: Opened, ask: Ask, prompt: Prompt
) -> None:
    for ranks_count in (1, 2):
        server = await make_server(ranks_count=ranks_count)
        engine = await opened(server)
        await engine.score(prompt)
        assert server.ranks.placed == []
        await collect(engine, ask(5))
        assert server.ranks.placed == [0] * (ranks_count - 1)
