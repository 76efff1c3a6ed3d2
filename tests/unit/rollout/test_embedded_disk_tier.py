"""The embedded engine over a cache of states: what comes from disk, when, and that nobody can tell by the tokens."""

import asyncio
import json
import logging
import shutil
import subprocess
import sys
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from rollout.engine import Sampled, SampleRequest, Sampling
from rollout.engines.embedded.batching import Limits
from rollout.engines.embedded.checkpoint import DEFAULT_CHECKPOINT
from rollout.engines.embedded.engine import EmbeddedEngine
from rollout.engines.embedded.library import build_digest
from rollout.engines.kept_state import KeptState, read_state, write_state
from rollout.errors import EngineError, PreemptedError

GOLDEN = Path(__file__).parents[2] / "golden/embedded_prompts.json"
PROMPTS = [tuple(prompt["token_ids"]) for prompt in json.loads(GOLDEN.read_text())]
ANOTHER_PROCESS = """
import asyncio, json, resource, sys
from pathlib import Path
from rollout.engine import SampleRequest, Sampling
from rollout.engines.embedded.engine import EmbeddedEngine

async def main(folder, prompt, file_bytes_max):
    resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes_max, file_bytes_max))
    engine = EmbeddedEngine(cache=Path(folder))
    await engine.open()
    request = SampleRequest(session="s", token_ids=tuple(prompt), sampling=Sampling(), stream_key=0,
                            tokens_count_max=8, stop_ids=frozenset())
    chunks = [chunk async for chunk in engine.sample(request)]
    await engine.close()
    drawn = [token for chunk in chunks for token in chunk.token_ids]
    print(json.dumps([chunks[0].cached_tokens_count, drawn]))

asyncio.run(main(sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3])))
"""


def ask(
    token_ids: tuple[int, ...], session: str = "s", *, count: int = 8, returns_routes: bool = False
) -> SampleRequest:
    return SampleRequest(
        session=session,
        token_ids=token_ids,
        sampling=Sampling(),
        stream_key=0,
        tokens_count_max=count,
        stop_ids=frozenset(),
        returns_routes=returns_routes,
    )


@asynccontextmanager
async def opened(cache: Path | None, limits: Limits | None = None) -> AsyncIterator[EmbeddedEngine]:
    engine = EmbeddedEngine(limits=limits, cache=cache)
    await engine.open()
    try:
        yield engine
    finally:
        await engine.close()


async def answer(engine: EmbeddedEngine, request: SampleRequest) -> tuple[int, tuple[int, ...], tuple[float, ...]]:
    """Tokens that were not computed, tokens, logprobs."""
    chunks: list[Sampled] = [chunk async for chunk in engine.sample(request)]
    assert [chunk for chunk in chunks if chunk.kv] == [], "who is spared a prefill is told of nothing else"
    ids = tuple(token for chunk in chunks for token in chunk.token_ids)
    return chunks[0].cached_tokens_count, ids, tuple(logprob for chunk in chunks for logprob in chunk.logprobs)


def elsewhere(cache: Path, prompt: tuple[int, ...], file_bytes_max: int = 1 << 30) -> tuple[int, list[int], str]:
    command = [sys.executable, "-c", ANOTHER_PROCESS, str(cache), json.dumps(prompt), str(file_bytes_max)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    count, drawn = json.loads(done.stdout)
    return count, drawn, done.stderr


async def test_the_next_engine_goes_on_from_what_the_last_one_left(tmp_path: Path) -> None:
    async with opened(tmp_path) as engine:
        first = await answer(engine, ask(PROMPTS[0]))
    async with opened(None) as engine:
        whole = await answer(engine, ask(PROMPTS[0] + first[1] + (7, 8)))
    async with opened(tmp_path) as engine:
        again, further = (
            await answer(engine, ask(PROMPTS[0], "a")),
            await answer(engine, ask(whole_context(first), "b")),
        )
    assert (first[0], whole[0]) == (0, 0)
    assert again == (PROMPTS[0].__len__() - 2, *first[1:])
    assert further == (len(PROMPTS[0]) + 7, *whole[1:])


def whole_context(first: tuple[int, tuple[int, ...], tuple[float, ...]]) -> tuple[int, ...]:
    return PROMPTS[0] + first[1] + (7, 8)


async def test_another_process_goes_on_from_it_and_the_other_way_round(tmp_path: Path) -> None:
    count, drawn, said = await asyncio.to_thread(elsewhere, tmp_path, PROMPTS[0])
    assert (count, said) == (0, "")
    async with opened(tmp_path) as engine:
        assert (await answer(engine, ask(PROMPTS[0])))[:2] == (len(PROMPTS[0]) - 2, tuple(drawn))
        await answer(engine, ask(PROMPTS[1]))
    count, _, said = await asyncio.to_thread(elsewhere, tmp_path, PROMPTS[1])
    assert (count, said) == (len(PROMPTS[1]) - 2, "")


async def test_processes_that_write_the_same_states_at_once_disturb_nobody(tmp_path: Path) -> None:
    told = await asyncio.gather(*(asyncio.to_thread(elsewhere, tmp_path, PROMPTS[i % 2]) for i in range(4)))
    assert [said for _, _, said in told] == [""] * 4
    assert told[0][1] == told[2][1] != told[1][1] == told[3][1]
    async with opened(tmp_path) as engine:
        for prompt, (_, drawn, _) in zip(PROMPTS[:2], told, strict=False):
            assert (await answer(engine, ask(prompt)))[:2] == (len(prompt) - 2, tuple(drawn))


async def test_a_full_disk_is_said_and_leaves_nothing_half_written(tmp_path: Path) -> None:
    _, drawn, said = await asyncio.to_thread(elsewhere, tmp_path, PROMPTS[0], 100_000)
    async with opened(None) as engine:
        assert (await answer(engine, ask(PROMPTS[0])))[1] == tuple(drawn)
    assert said.count("states are not kept on disk") == 1
    assert "File too large" in said
    assert not [*tmp_path.iterdir()]


async def test_what_memory_has_no_room_for_comes_back_from_disk(tmp_path: Path) -> None:
    limits = Limits(state_bytes_max=1_300_000)  # two contexts of this length do not fit
    async with opened(tmp_path, limits) as engine:
        expected = [await answer(engine, ask(prompt, str(i))) for i, prompt in enumerate(PROMPTS)]
        contexts = [prompt + drawn[1] for prompt, drawn in zip(PROMPTS, expected, strict=True)]
        found = [await answer(engine, ask(context, str(i), count=1)) for i, context in enumerate(contexts)]
    assert found[0][0] == len(contexts[0]) - 1
    async with opened(None) as engine:
        assert [(await answer(engine, ask(context, count=1)))[1:] for context in contexts] == [
            each[1:] for each in found
        ]


@pytest.mark.parametrize("damage", ["flipped", "forged"])
async def test_a_damaged_or_forged_state_is_computed_again_and_the_log_says_why(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    caplog.set_level(logging.WARNING)
    async with opened(tmp_path) as engine:
        weights = engine.info.weights_digest
        expected = await answer(engine, ask(PROMPTS[0]))
    for path in tmp_path.iterdir():
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        if damage == "flipped":
            path.write_bytes(data)
        else:
            state = read_state(path, build_digest(), weights)
            write_state(path, KeptState(state.build, state.weights, state.tokens, state.packed[:-4]))
    async with opened(tmp_path) as engine:
        assert await answer(engine, ask(PROMPTS[0])) == expected
    assert "computed again" in caplog.text
    assert ("damaged" if damage == "flipped" else "not a packed state") in caplog.text


async def test_samples_of_one_prompt_read_its_state_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async with opened(tmp_path) as engine:
        expected = await answer(engine, ask(PROMPTS[0]))
    for path in tmp_path.iterdir():
        path.write_bytes(b"")
    async with opened(tmp_path) as engine:
        answers = await asyncio.gather(*(answer(engine, ask(PROMPTS[0], str(i))) for i in range(6)))
    assert {each[1:] for each in answers} == {expected[1:]}
    assert len(caplog.records) == 1, "all waited for the same reading"


async def test_who_waits_for_the_disk_can_be_preempted_and_can_leave(tmp_path: Path) -> None:
    async with opened(tmp_path) as engine:
        expected = await answer(engine, ask(PROMPTS[0]))
    async with opened(tmp_path) as engine:
        waiting = asyncio.create_task(answer(engine, ask(PROMPTS[0])))
        leaving = asyncio.create_task(answer(engine, ask(PROMPTS[0], "leaving")))
        staying = asyncio.create_task(answer(engine, ask(PROMPTS[0], "staying")))
        await asyncio.sleep(0)
        leaving.cancel()
        await engine.preempt("s")
        with pytest.raises(PreemptedError):
            await waiting
        assert (await staying)[1:] == expected[1:]


async def test_one_who_wants_the_routes_of_its_prompt_computes_it(tmp_path: Path) -> None:
    async with opened(tmp_path) as engine:
        expected = await answer(engine, ask(PROMPTS[0]))
    async with opened(tmp_path) as engine:
        assert await answer(engine, ask(PROMPTS[0], returns_routes=True)) == expected


async def test_engines_are_opened_and_closed_whole_whoever_is_cancelled_or_closes_twice(tmp_path: Path) -> None:
    for steps in range(6):
        engine = EmbeddedEngine(cache=tmp_path / "states")
        opening = asyncio.create_task(engine.open())
        for _ in range(steps):
            await asyncio.sleep(0)
        opening.cancel()
        (outcome,) = await asyncio.gather(opening, return_exceptions=True)
        if outcome is None:  # it was faster than this task, on a machine that is busy elsewhere
            await engine.close()
        else:
            assert isinstance(outcome, asyncio.CancelledError)
        assert not [thread for thread in threading.enumerate() if thread.name == "embedded-engine"]
        await engine.open()
        await asyncio.gather(engine.close(), engine.close(), engine.close())


async def test_an_engine_that_fails_to_open_leaves_nothing_behind_and_opens_when_it_can(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(DEFAULT_CHECKPOINT, tmp_path / "checkpoint"))
    whole = (folder / "config.json").read_bytes()
    (folder / "config.json").write_text("{")
    engine = EmbeddedEngine(folder, cache=tmp_path / "states")
    for _ in range(3):
        with pytest.raises(EngineError, match="cannot be read as JSON"):
            await engine.open()
    for thread in threading.enumerate():
        if thread.name == "state-cache-writer":
            await asyncio.to_thread(thread.join, 10.0)
            assert not thread.is_alive(), "it waits for states of an engine that never was"
    (folder / "config.json").write_bytes(whole)
    await engine.open()
    assert (await answer(engine, ask(PROMPTS[0])))[0] == 0
    await engine.close()
