"""The guard between an engine and everything that believes it."""

import asyncio
import math
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Any, get_args

import msgspec
import pytest

from rollout import context
from rollout.engine import Routes, Sampled, SampleRequest, Sampling, TopLogprobs
from rollout.engines.guard import Patience, guarded
from rollout.engines.testing import EngineFault, MisbehavingEngine
from rollout.errors import EngineError
from rollout.main import load_tokenizer
from rollout.testing import Reply, ScriptedEngine
from toolcall_dsl import V4

TOKENIZER = load_tokenizer()
PROMPT = tuple(i for s in context.prompt("Say something.", TOKENIZER, "high") for i in s.token_ids)
LONG_S = 3600.0


def said(_session: str, _turn: int) -> Reply:
    return Reply(reasoning="Hm.", content="Done, and the file is gone.")


def ask(count: int = 100) -> SampleRequest:
    eos = TOKENIZER.control(V4.eos)
    return SampleRequest(
        session="s",
        token_ids=PROMPT,
        sampling=Sampling(),
        stream_key=0,
        tokens_count_max=count,
        stop_ids=frozenset({eos}),
        top_logprobs_count=1,
    )


async def engine_with(fault: EngineFault | None, chunks_count: int = 3) -> MisbehavingEngine:
    engine = MisbehavingEngine(TOKENIZER, said, fault, chunks_count)
    await engine.open()
    return engine


async def taken(engine: MisbehavingEngine, silence_s_max: float = LONG_S) -> tuple[list[Sampled], str]:
    """What came through, and the error that ended it."""
    chunks: list[Sampled] = []

    async def take_all() -> None:
        stream = guarded(engine, ask(), silence_s_max)
        while True:
            chunks.append(await anext(stream))

    with pytest.raises(EngineError) as caught:
        await take_all()
    return chunks, str(caught.value)


@pytest.mark.parametrize("count", [5, 100])
async def test_what_keeps_to_the_port_comes_through_unchanged(count: int) -> None:
    engine = await engine_with(None)
    plain = [chunk async for chunk in engine.sample(ask(count))]
    assert [chunk async for chunk in guarded(engine, ask(count), LONG_S)] == plain
    assert plain[-1].finish == ("length" if count == 5 else "stop")


@pytest.mark.parametrize("fault", [fault for fault in get_args(EngineFault) if fault != "hang"])
async def test_of_a_chunk_that_cannot_be_right_nothing_comes_through(fault: EngineFault) -> None:
    good, problem = await taken(await engine_with(fault))
    assert [len(chunk.token_ids) for chunk in good] == [1, 1, 1]
    assert problem.startswith("engine scripted")


class Telling(ScriptedEngine):
    """Tells of its chunks what `change` makes of it."""

    change: Callable[[Sampled], dict[str, object]]

    async def sample(self, request: SampleRequest) -> AsyncGenerator[Sampled, None]:
        async for chunk in super().sample(request):
            yield msgspec.structs.replace(chunk, **self.change(chunk))


def routes_of(chunk: Sampled, expert_ids: bytes, later: int = 0) -> dict[str, object]:
    assert chunk.routes is not None
    return {"routes": Routes(chunk.routes.start + later, expert_ids)}


def tops_of(chunk: Sampled, *token_ids: int, logprob: float = -1.0) -> tuple[TopLogprobs, ...]:
    return (TopLogprobs(token_ids, (logprob,) * len(token_ids)),) * len(chunk.token_ids)


@pytest.mark.parametrize(
    ("said", "change"),
    [
        ("routes that were not asked for, or none", lambda _: {"routes": None}),
        ("routes that are no whole rows", lambda chunk: routes_of(chunk, b"")),
        ("routes that are no whole rows", lambda chunk: routes_of(chunk, chunk.routes.expert_ids[:-1])),
        ("not up to", lambda chunk: routes_of(chunk, chunk.routes.expert_ids, later=1)),
        ("must be below experts_count = 5", lambda chunk: routes_of(chunk, b"\5" + chunk.routes.expert_ids[1:])),
        ("must be distinct within a layer", lambda chunk: routes_of(chunk, bytes(len(chunk.routes.expert_ids)))),
        ("not one hidden state each", lambda chunk: {"hidden": chunk.hidden[2:]}),
        ("not one hidden state each", lambda _: {"hidden": b""}),
        (
            "a likeliest token that is none",
            lambda chunk: {"top_logprobs": tops_of(chunk)},
        ),
        ("a likeliest token that is none", lambda chunk: {"top_logprobs": tops_of(chunk, 1 << 30)}),
        ("a likeliest token that is none", lambda chunk: {"top_logprobs": tops_of(chunk, -1)}),
        ("a likeliest token that is none", lambda chunk: {"top_logprobs": tops_of(chunk, 1, 1)}),
        ("a likeliest token that is none", lambda chunk: {"top_logprobs": tops_of(chunk, 1, logprob=1e300)}),
        ("a likeliest token that is none", lambda chunk: {"top_logprobs": tops_of(chunk, 1, logprob=1e-9)}),
        ("a likeliest token that is none", lambda chunk: {"top_logprobs": tops_of(chunk, 1, logprob=-3.5e38)}),
        ("a likeliest token that is none", lambda chunk: {"top_logprobs": tops_of(chunk, 1, logprob=math.nan)}),
        ("a logprob that is none", lambda chunk: {"logprobs": (-3.5e38,) * len(chunk.token_ids)}),
        ("a mask without the token", lambda chunk: {"masks": tuple((token ^ 1,) for token in chunk.token_ids)}),
        ("or in disorder", lambda chunk: {"masks": tuple((token, token) for token in chunk.token_ids)}),
        ("or in disorder", lambda chunk: {"masks": tuple((token, 0) for token in chunk.token_ids)}),
        ("not one mask for each token", lambda chunk: {"masks": ((1,),) * (len(chunk.token_ids) + 1)}),
        ("a mask of ids that", lambda chunk: {"masks": ((),) * len(chunk.token_ids)}),
        ("a mask of ids that", lambda chunk: {"masks": ((1, 1 << 30),) * len(chunk.token_ids)}),
        ("a mask of ids that", lambda chunk: {"masks": ((-1, 1),) * len(chunk.token_ids)}),
    ],
)
async def test_side_channels_that_cannot_be_right_are_an_error_of_the_engine(
    said: str, change: Callable[[Sampled], dict[str, object]]
) -> None:
    engine = Telling(TOKENIZER, lambda _session, _turn: Reply(content="Done."))
    await engine.open()
    asked = msgspec.structs.replace(ask(), returns_routes=True, returns_hidden=True)
    engine.change = lambda _: {}
    assert [chunk async for chunk in guarded(engine, asked, LONG_S)]
    engine.change = change
    with pytest.raises(EngineError, match=said):
        await anext(guarded(engine, asked, LONG_S))


async def test_an_engine_that_is_silent_for_too_long_is_given_up() -> None:
    good, problem = await taken(await engine_with("hang"), silence_s_max=0.01)
    assert len(good) == 3
    assert problem == "engine scripted: silent for 0.01 s"


async def test_silence_of_a_paused_engine_is_no_failure() -> None:
    engine = await engine_with(None)
    async with aclosing(guarded(engine, ask(), 0.01)) as chunks:
        await anext(chunks)
        await engine.pause("keep")
        waiting = asyncio.ensure_future(anext(chunks))
        done, _ = await asyncio.wait([waiting], timeout=0.05)
        assert not done
        await engine.resume()
        assert (await waiting).token_ids


async def test_a_cancelled_consumer_is_cancelled_and_not_told_of_silence() -> None:
    engine = await engine_with("hang", chunks_count=0)
    waiting = asyncio.ensure_future(anext(guarded(engine, ask(), LONG_S)))
    await asyncio.sleep(0)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting


class Clock:
    """A loop's time, which passes when it is told to."""

    def __init__(self) -> None:
        self.now = 0.0
        self._due: tuple[float, Callable[[], None]] = (0.0, self.cancel)

    def time(self) -> float:
        return self.now

    def call_at(self, at: float, look: Callable[[], None]) -> "Clock":
        self._due = (at, look)
        return self

    def cancel(self) -> None:
        """There is one timer at a time, and the next one takes its place."""

    def pass_to(self, now: float) -> None:
        while self._due[0] <= now:
            (self.now, look), self._due = self._due, (math.inf, self.cancel)
            look()
        self.now = now


async def test_a_pause_that_lasts_almost_as_long_as_patience_does_not_use_it_up() -> None:
    async def nothing() -> AsyncGenerator[Sampled, None]:
        await asyncio.Event().wait()
        yield Sampled(token_ids=(), logprobs=())

    engine, clock = await engine_with(None), Clock()
    patience: Any = Patience(engine, 100.0)
    patience.close()
    patience._loop = clock
    clock.call_at(0.0, patience._look)
    waiting = asyncio.create_task(patience.next(nothing()))
    await asyncio.sleep(0)
    clock.pass_to(1.0)
    await engine.pause("keep")
    clock.pass_to(98.0)
    await engine.resume()
    clock.pass_to(190.0)
    await asyncio.sleep(0)
    assert not waiting.done()
    clock.pass_to(198.0)
    with pytest.raises(EngineError, match="silent for 100 s"):
        await waiting
