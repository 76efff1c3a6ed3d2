"""What every engine behind `rollout/engine.py` must do; one list of behaviours, run against each engine."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from pathlib import Path

import pytest

from rollout.engine import Engine, Sampled, SampleRequest, Sampling
from rollout.engines.embedded.batching import Limits
from rollout.engines.embedded.engine import EmbeddedEngine
from rollout.errors import EngineError, RequestError

pytestmark = pytest.mark.asyncio

PROMPTS = [
    tuple(p["token_ids"]) for p in json.loads((Path(__file__).parents[1] / "golden/embedded_prompts.json").read_text())
]
EOS_ID = 1
WARM = Sampling(temperature=1.5, top_p=0.95, seed=4)
VAGUE = (0, 17, 900)  # a context after which no token is likely

ENGINES: dict[str, Callable[[], Engine]] = {
    "embedded": EmbeddedEngine,
    "embedded, one at a time and nothing kept": lambda: EmbeddedEngine(
        limits=Limits(running_max=1, state_bytes_max=0, prefill_tokens_max=7, rounds_max=1)
    ),
}


@pytest.fixture(params=ENGINES)
async def engine(request: pytest.FixtureRequest) -> AsyncIterator[Engine]:
    engine = ENGINES[request.param]()
    await engine.open()
    yield engine
    await engine.close()


def ask(
    token_ids: tuple[int, ...],
    count: int,
    *,
    sampling: Sampling = WARM,
    session: str = "s",
    stream_key: int = 1,
    stops: frozenset[int] = frozenset({EOS_ID}),
) -> SampleRequest:
    return SampleRequest(
        session=session,
        token_ids=token_ids,
        sampling=sampling,
        stream_key=stream_key,
        tokens_count_max=count,
        stop_ids=stops,
    )


async def collect(engine: Engine, request: SampleRequest) -> Sampled:
    """All chunks as one, after checking each."""
    chunks = [chunk async for chunk in engine.sample(request)]
    assert all(len(chunk.token_ids) == len(chunk.logprobs) >= 1 for chunk in chunks)
    assert [chunk.finish is None for chunk in chunks] == [True] * (len(chunks) - 1) + [False]
    return Sampled(
        token_ids=tuple(i for chunk in chunks for i in chunk.token_ids),
        logprobs=tuple(p for chunk in chunks for p in chunk.logprobs),
        finish=chunks[-1].finish,
    )


async def test_info_names_the_weights_and_the_build(engine: Engine) -> None:
    assert engine.info.name
    assert engine.info.build
    assert len(engine.info.weights_digest) == 64
    assert engine.info.vocab_count > max(max(prompt) for prompt in PROMPTS)
    assert engine.info.context_tokens_max >= 512


async def test_an_output_ends_with_a_stop_id_or_at_its_length(engine: Engine) -> None:
    short = await collect(engine, ask(PROMPTS[0], 5))
    assert (len(short.token_ids), short.finish) == (5, "length")
    stop = short.token_ids[2]
    stopped = await collect(engine, ask(PROMPTS[0], 5, stops=frozenset({stop})))
    count = short.token_ids.index(stop) + 1
    assert stopped == Sampled(token_ids=short.token_ids[:count], logprobs=short.logprobs[:count], finish="stop")


async def test_a_request_gives_the_same_bits_again_whatever_was_kept(engine: Engine) -> None:
    first = await collect(engine, ask(PROMPTS[0], 20))
    again = await collect(engine, ask(PROMPTS[0], 20, session="other"))
    await engine.release("s")
    await engine.release("never seen")
    assert first == again == await collect(engine, ask(PROMPTS[0], 20))


async def test_requests_do_not_notice_each_other(engine: Engine) -> None:
    requests = [
        ask(
            PROMPTS[i % 4][: 40 + 83 * i],
            6 + 3 * i,
            session=f"s{i}",
            stream_key=i,
            sampling=Sampling(temperature=i / 4),
        )
        for i in range(5)
    ]
    alone = [await collect(engine, request) for request in requests]
    for request in requests:
        await engine.release(request.session)
    assert list(await asyncio.gather(*(collect(engine, request) for request in requests))) == alone


async def test_continuing_after_any_prefix_of_the_output_yields_the_rest(engine: Engine) -> None:
    whole = await collect(engine, ask(VAGUE, 16, stops=frozenset()))
    greedy = await collect(engine, ask(VAGUE, 16, stops=frozenset(), sampling=Sampling()))
    assert whole.token_ids != greedy.token_ids, "this must be about sampled tokens"
    for cut in range(1, 16):
        rest = await collect(engine, ask(VAGUE + whole.token_ids[:cut], 16 - cut, stops=frozenset()))
        assert (rest.token_ids, rest.logprobs) == (whole.token_ids[cut:], whole.logprobs[cut:])


async def test_samples_of_one_prompt_differ_by_their_stream(engine: Engine) -> None:
    outputs = [collect(engine, ask(VAGUE, 12, session=f"s{i}", stream_key=i)) for i in range(4)]
    assert len({output.token_ids for output in await asyncio.gather(*outputs)}) == 4


async def test_closing_the_iterator_early_stops_the_request_and_no_other(engine: Engine) -> None:
    expected = await collect(engine, ask(PROMPTS[0], 30, session="a"))
    other = asyncio.create_task(collect(engine, ask(PROMPTS[0], 30, session="a")))
    async with aclosing(engine.sample(ask(PROMPTS[1], 1000, session="b", stops=frozenset()))) as chunks:  # type: ignore[type-var]
        async for _ in chunks:
            break
    assert await other == expected


async def test_a_cancelled_consumer_leaves_the_engine_usable(engine: Engine) -> None:
    task = asyncio.create_task(collect(engine, ask(PROMPTS[1], 1000, stops=frozenset())))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert (await collect(engine, ask(PROMPTS[0], 3))).finish == "length"


async def test_a_context_that_fills_up_ends_with_length(engine: Engine) -> None:
    limit = engine.info.context_tokens_max
    prompt = (PROMPTS[0] * 10)[: limit - 4]
    output = await collect(engine, ask(prompt, 50, stops=frozenset()))
    assert (len(output.token_ids), output.finish) == (4, "length")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"token_ids": ()}, "token_ids"),
        ({"token_ids": (0, -1)}, "token_ids"),
        ({"token_ids": (0, 10**9)}, "token_ids"),
        ({"token_ids": (5,) * 10**6}, "token_ids"),
        ({"count": 0}, "tokens_count_max"),
        ({"sampling": Sampling(temperature=-0.1)}, "temperature"),
        ({"sampling": Sampling(temperature=float("nan"))}, "temperature"),
        ({"sampling": Sampling(temperature=1.0, top_p=0.0)}, "top_p"),
        ({"sampling": Sampling(temperature=1.0, top_p=1.1)}, "top_p"),
        ({"sampling": Sampling(temperature=1.0, top_k=-1)}, "top_k"),
        ({"stops": frozenset({10**9})}, "stop_ids"),
    ],
    ids=str,
)
async def test_a_request_that_can_never_run_is_refused_by_name(engine: Engine, change: dict, named: str) -> None:
    arguments = {"token_ids": PROMPTS[0], "count": 3} | change
    with pytest.raises(RequestError, match=named):
        await collect(engine, ask(**arguments))


async def test_closing_the_engine_ends_what_runs_and_refuses_what_comes(engine: Engine) -> None:
    running = [
        asyncio.create_task(collect(engine, ask(PROMPTS[i], 1500, session=f"s{i}", stops=frozenset())))
        for i in range(3)
    ]
    await asyncio.sleep(0)
    await engine.close()
    for task in running:
        with pytest.raises(EngineError):
            await task
    with pytest.raises(EngineError):
        await collect(engine, ask(PROMPTS[0], 1))
    await engine.close()


async def test_an_engine_opens_again_after_it_was_closed(engine: Engine) -> None:
    before = await collect(engine, ask(PROMPTS[0], 4))
    await engine.close()
    await engine.open()
    assert await collect(engine, ask(PROMPTS[0], 4)) == before
