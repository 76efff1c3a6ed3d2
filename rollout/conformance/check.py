"""A check: one behaviour of engines, a name that states it, and a coroutine that fails if it does not hold.

What an engine need not have is a trait: a double draws nothing by chance, and an engine may keep nothing
between requests.  Checks that need it are left out by name.

See: rollout/conformance/suite.py, the list.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Literal

import msgspec

from dsec.conformance.check import NotConformingError, require
from rollout.engine import Engine, Sampled, SampleRequest, Sampling
from rollout.errors import RolloutError

Trait = Literal["draws", "keeps", "exact", "versions", "masks", "fills", "shapes"]
"""It draws by chance as `Sampling` says; it keeps states between requests; it gives the same bits whatever was batched,
kept or computed again, by chance too; it holds several weights at once; it tells what a cut kept; its context is so
short that a check may fill it; it tells weights of another shape from its own."""
WARM = Sampling(temperature=1.5, top_p=0.95, seed=4)
CLOSE = 1e-3
"""How far logprobs of the same tokens may lie apart where an engine is not exact."""
LULL_S_MIN, LULL_STEPS, LULL_TIMES = 0.05, 10, 2
"""Silence must last so long, in so many steps, and so many times as long as the engine took for a chunk before."""


class Subject(msgspec.Struct, frozen=True, kw_only=True):
    """A kind of engine.

    `make` gives a new one, closed, on weights that are always the same; `checkpoint(n)` a folder with other weights
    for it, n = 1, 2, ...  `prompts` are at least four contexts after which it has 20 tokens and more to say,
    `stop_id` not among them; after `vague` no token is likely (where it draws).  `folder` is scratch space.
    Answers that a check interrupts have `long_count` tokens: enough that it comes in time.  What need not be exact is
    compared for the likeliest tokens alone: nobody else draws them again.  `misfit` makes a folder with weights of
    another shape, where it has shapes.  A check that has not ended after `patience_s` has failed.
    """

    make: Callable[[], Engine]
    checkpoint: Callable[[int], Path]
    folder: Path
    prompts: tuple[tuple[int, ...], ...]
    stop_id: int
    vague: tuple[int, ...] = ()
    long_count: int = 60
    traits: frozenset[Trait] = frozenset({"draws", "keeps", "exact", "versions", "masks", "fills", "shapes"})
    misfit: Callable[[], Path] | None = None
    patience_s: float = 120.0

    def ask(
        self, token_ids: tuple[int, ...], count: int, stop_ids: frozenset[int] = frozenset(), **more: Any
    ) -> SampleRequest:
        """A request; `more` are fields of SampleRequest."""
        fields: dict[str, Any] = {"session": "s", "sampling": self.repeatable(WARM), "stream_key": 1}
        return SampleRequest(token_ids=token_ids, tokens_count_max=count, stop_ids=stop_ids, **fields | more)

    def repeatable(self, sampling: Sampling) -> Sampling:
        """So, or as a request must draw that is compared with another one."""
        return sampling if "exact" in self.traits else Sampling()

    def same(self, *outputs: Sampled) -> bool:
        """Whether these are one answer."""
        first = outputs[0]
        if "exact" in self.traits:
            return all(each == first for each in outputs)
        return all(
            (each.token_ids, each.finish) == (first.token_ids, first.finish)
            and self.close(each.logprobs, first.logprobs)
            for each in outputs
        )

    def close(self, logprobs: Sequence[float], others: Sequence[float]) -> bool:
        """Whether these are the same logprobs."""
        distance = 0.0 if "exact" in self.traits else CLOSE
        return len(logprobs) == len(others) and all(
            abs(one - other) <= distance for one, other in zip(logprobs, others, strict=True)
        )


class Check(msgspec.Struct, frozen=True):
    """One behaviour; `run` raises NotConformingError if the engine lacks it."""

    name: str
    needs: frozenset[Trait]
    run: Callable[[Subject], Coroutine[Any, Any, None]]


def check(*needs: Trait) -> Callable[[Callable[[Subject], Coroutine[Any, Any, None]]], Check]:
    """Turn a coroutine function into a check of the same name."""
    return lambda function: Check(function.__name__, frozenset(needs), function)


@asynccontextmanager
async def opened(subject: Subject) -> AsyncIterator[Engine]:
    """An engine for the time of a block."""
    engine = subject.make()
    await engine.open()
    try:
        yield engine
    finally:
        await engine.close()


class Taker:
    """A consumer that takes all that it gets."""

    def __init__(self, engine: Engine, request: SampleRequest) -> None:
        self.chunks: list[Sampled] = []
        self.lull_s = 0.0
        """The longest that it has waited for a chunk."""
        self._is_told = asyncio.Event()
        self.task = asyncio.create_task(self._take(engine, request))
        self.task.add_done_callback(lambda task: task.cancelled() or task.exception())

    async def _take(self, engine: Engine, request: SampleRequest) -> None:
        clock = asyncio.get_running_loop().time
        since = clock()
        try:
            async for chunk in engine.sample(request):
                self.chunks.append(chunk)
                self.lull_s, since = max(self.lull_s, clock() - since), clock()
                self._is_told.set()
        finally:
            self._is_told.set()

    async def begun(self) -> None:
        """Wait for its first chunk; what ends it before is raised."""
        await self._is_told.wait()
        if not self.chunks:
            await self.task
            raise NotConformingError("a stream without a chunk")

    @property
    def token_ids(self) -> tuple[int, ...]:
        """What it has got."""
        return tuple(i for chunk in self.chunks for i in chunk.token_ids)


async def settled(*takers: Taker) -> None:
    """Let happen what is not to happen, in an engine that took so long for the chunks of these.

    Real time passes, in steps: an engine in this process and one behind a network have both had a turn in each.
    """
    lull_s = max([LULL_S_MIN, *(LULL_TIMES * taker.lull_s for taker in takers)])
    for _ in range(LULL_STEPS):
        await asyncio.sleep(lull_s / LULL_STEPS)


def joined(chunks: list[Sampled]) -> Sampled:
    """The tokens of all chunks as one, each checked against the port."""
    require(all(len(chunk.token_ids) == len(chunk.logprobs) >= 1 for chunk in chunks), chunks)
    require([chunk.finish is None for chunk in chunks] == [True] * (len(chunks) - 1) + [False], chunks)
    return Sampled(
        token_ids=tuple(i for chunk in chunks for i in chunk.token_ids),
        logprobs=tuple(p for chunk in chunks for p in chunk.logprobs),
        finish=chunks[-1].finish,
    )


def after(output: Sampled, count: int) -> Sampled:
    """What is left of an answer behind its first tokens."""
    return Sampled(token_ids=output.token_ids[count:], logprobs=output.logprobs[count:], finish=output.finish)


async def chunks_of(engine: Engine, request: SampleRequest) -> list[Sampled]:
    """The whole answer."""
    return [chunk async for chunk in engine.sample(request)]


async def collect(engine: Engine, request: SampleRequest) -> Sampled:
    """The whole answer as one chunk."""
    return joined(await chunks_of(engine, request))


async def refusal_of(attempt: Awaitable[object]) -> RolloutError:
    """The error that `attempt` must end with."""
    try:
        result = await attempt
    except RolloutError as error:
        return error
    raise NotConformingError(f"not refused: {result}")
