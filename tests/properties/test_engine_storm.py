"""Whatever happens to a request of the embedded engine between two tokens, the tokens are the same."""

import asyncio
import contextlib
import json
import random
import shutil
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from tempfile import mkdtemp

import pytest

from rollout.engine import PauseMode, SampleRequest, Sampling, Scored
from rollout.engines.embedded.batching import Limits
from rollout.engines.embedded.binding import Drawn, Model, Stream
from rollout.engines.embedded.checkpoint import DEFAULT_CHECKPOINT
from rollout.engines.embedded.engine import EmbeddedEngine
from rollout.errors import EngineError, PreemptedError

GOLDEN = json.loads((Path(__file__).parents[1] / "golden/embedded_prompts.json").read_text())
PROMPTS = [(*GOLDEN[i % 2]["token_ids"][:120], 17 + i) for i in range(12)]
COUNT = 60
LANES_FROM = 8
"""Sequences from which on each of two threads has some to itself."""


def request(number: int, token_ids: tuple[int, ...]) -> SampleRequest:
    return SampleRequest(
        session=str(number),
        token_ids=token_ids,
        sampling=Sampling(temperature=1.5, top_p=0.95, seed=3),
        stream_key=number,
        tokens_count_max=len(PROMPTS[number]) + COUNT - len(token_ids),
        stop_ids=frozenset(),
        on_update=("keep", "cut", "pin")[number % 3],
    )


class Storm:
    """Sessions that go on until they have all their tokens, and one who disturbs them."""

    def __init__(self, engine: EmbeddedEngine, folder: Path, source: random.Random) -> None:
        self.engine = engine
        self.folder = folder
        self.source = source
        self.tokens = list(PROMPTS)
        self.logprobs: list[tuple[float, ...]] = [()] * len(PROMPTS)
        self.scores: list[Scored] = []
        self.cached_count = 0

    async def live(self, number: int) -> None:
        """One session: it takes what comes and goes on after each interruption, sometimes in a new session."""
        while len(self.tokens[number]) < len(PROMPTS[number]) + COUNT:
            path = self.folder / str(number)
            with contextlib.suppress(PreemptedError):
                async for chunk in self.engine.sample(request(number, self.tokens[number])):
                    self.tokens[number] += chunk.token_ids
                    self.logprobs[number] += chunk.logprobs
                    self.cached_count += chunk.cached_tokens_count
            if self.source.random() < 0.5:
                await self.engine.save(str(number), path)
                await self.engine.release(str(number))
                await self.engine.restore(str(number), path)

    async def disturb(self) -> None:
        """One thing after the other, for as long as it is let."""
        while True:
            await asyncio.sleep(0)
            match self.source.randrange(6):
                case 0 | 1:
                    await self.engine.preempt(str(self.source.randrange(len(PROMPTS))))
                case 2:
                    modes: tuple[PauseMode, ...] = ("keep", "abort")
                    await self.engine.pause(self.source.choice(modes))
                    await self.engine.resume()
                case 3:
                    with contextlib.suppress(EngineError):  # too many are pinned
                        await self.engine.update(DEFAULT_CHECKPOINT, self.engine.info.policy_version + 1)
                case 4:
                    with contextlib.suppress(PreemptedError):
                        self.scores.append(await self.engine.score(PROMPTS[0]))
                case _:
                    number = self.source.randrange(len(PROMPTS))
                    await self.engine.release(str(number))

    async def damage(self, cache: Path) -> None:
        """What a disk, or another process on it, does to the files of a cache, for as long as it is let."""
        while True:
            await asyncio.sleep(0.001)
            with contextlib.suppress(OSError, IndexError):
                path = self.source.choice([*cache.iterdir()])
                data = bytearray(path.read_bytes())
                match self.source.randrange(4):
                    case 0:
                        data[self.source.randrange(len(data))] ^= 1
                        path.write_bytes(data)
                    case 1:
                        path.write_bytes(data[: len(data) // 2])
                    case 2:
                        path.unlink()
                    case _:
                        shutil.rmtree(cache)


@pytest.fixture
async def expected() -> AsyncIterator[Storm]:
    engine = EmbeddedEngine()
    await engine.open()
    calm = Storm(engine, Path(), random.Random(0))
    for number, prompt in enumerate(PROMPTS):
        async for chunk in engine.sample(request(number, prompt)):
            calm.tokens[number] += chunk.token_ids
            calm.logprobs[number] += chunk.logprobs
    calm.scores.append(await engine.score(PROMPTS[0]))
    yield calm
    await engine.close()


@pytest.mark.parametrize("seed", range(2))
async def test_tokens_do_not_depend_on_what_became_of_states_on_disk(
    tmp_path: Path, expected: Storm, seed: int
) -> None:
    cache, limits = tmp_path / "cache", Limits(running_max=4, state_bytes_max=400_000, prefill_tokens_max=16)

    async def weather(number: int, *, is_damaged: bool = False) -> None:
        engine = EmbeddedEngine(limits=limits, cache=cache)
        await engine.open()
        storm = Storm(engine, Path(mkdtemp(dir=tmp_path)), random.Random(seed + number))
        disturbers = [asyncio.create_task(storm.disturb())]
        if is_damaged:
            disturbers.append(asyncio.create_task(storm.damage(cache)))
        await asyncio.gather(*(storm.live(number) for number in range(len(PROMPTS))))
        for disturber in disturbers:
            disturber.cancel()
        await asyncio.wait(disturbers)
        await engine.close()
        assert (storm.tokens, storm.logprobs) == (expected.tokens, expected.logprobs)
        assert storm.cached_count > 0

    await weather(0)
    await asyncio.gather(weather(1), weather(2))  # two on one directory
    await weather(3, is_damaged=True)


@pytest.mark.parametrize(("seed", "running_max"), [(0, 4), (1, 4), (2, 10), (3, 12)])
async def test_tokens_do_not_depend_on_what_happens_between_them(
    tmp_path: Path, expected: Storm, seed: int, running_max: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    together, decode = set[int](), Model.decode

    def watched(model: Model, streams: Sequence[Stream]) -> list[list[Drawn]]:
        together.add(len(streams))
        return decode(model, streams)

    monkeypatch.setattr(Model, "decode", watched)
    engine = EmbeddedEngine(limits=Limits(running_max=running_max, state_bytes_max=1_000_000, prefill_tokens_max=16))
    await engine.open()
    storm = Storm(engine, tmp_path, random.Random(seed))
    disturber = asyncio.create_task(storm.disturb())
    await asyncio.gather(*(storm.live(number) for number in range(len(PROMPTS))))
    disturber.cancel()
    await asyncio.wait([disturber])
    await engine.close()
    assert disturber.cancelled()
    assert (max(together) >= LANES_FROM) == (running_max >= LANES_FROM), together
    assert (storm.tokens, storm.logprobs) == (expected.tokens, expected.logprobs)
    assert {score.logprobs for score in storm.scores} <= {expected.scores[0].logprobs}
