"""Batching of the embedded engine: what is computed once, what is bounded, what a lagging consumer gets."""

import asyncio
import json
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec
import pytest

from rollout.engine import SampleRequest, Sampling
from rollout.engines.embedded.batching import Batch, Limits
from rollout.engines.embedded.binding import Chunk, Model
from rollout.engines.embedded.checkpoint import load_checkpoint
from rollout.engines.embedded.engine import EmbeddedEngine
from rollout.engines.embedded.jobs import BRANCH_TOKENS_MIN, Job, Outcome
from rollout.engines.embedded.retained import RetainedStates
from rollout.engines.embedded.versions import Versions
from rollout.errors import EngineError, RequestError

PROMPTS = [
    tuple(p["token_ids"]) for p in json.loads((Path(__file__).parents[2] / "golden/embedded_prompts.json").read_text())
]
CHECKPOINT = load_checkpoint()
FORK_ID = CHECKPOINT.fork_token_id
PREFIX_COUNT = PROMPTS[0].index(FORK_ID)


class RecordingModel(Model):
    """The model, counting the tokens that were prefilled."""

    prefilled_count = 0

    def step(self, chunks: Sequence[Chunk]) -> list[list[float] | None]:
        self.prefilled_count += sum(len(chunk.token_ids) for chunk in chunks)
        return super().step(chunks)


@pytest.fixture(scope="module")
def model() -> Iterator[RecordingModel]:
    model = RecordingModel(CHECKPOINT)
    yield model
    model.close()


def batch_of(model: Model, limits: Limits) -> Batch:
    return Batch(model, limits, RetainedStates(limits.state_bytes_max))


@pytest.fixture
def batch(model: RecordingModel) -> Iterator[Batch]:
    model.prefilled_count = 0
    batch = batch_of(model, Limits())
    yield batch
    batch.close()


def job(token_ids: tuple[int, ...], count: int = 2, session: str = "s", priority: int = 0) -> Job:
    return Job(
        SampleRequest(
            session=session,
            token_ids=token_ids,
            sampling=Sampling(),
            stream_key=0,
            tokens_count_max=count,
            stop_ids=frozenset(),
            priority=priority,
        )
    )


def run(batch: Batch | Versions, *jobs: Job) -> None:
    for each in jobs:
        batch.add(each)
    while any(batch.jobs):
        batch.turn()


def test_the_constant_prefix_is_computed_once_for_all_sessions(batch: Batch, model: RecordingModel) -> None:
    run(batch, *(job(prompt, session=f"s{i}") for i, prompt in enumerate(PROMPTS)))
    own = sum(len(prompt) - 1 - PREFIX_COUNT for prompt in PROMPTS)
    assert PREFIX_COUNT > 300
    assert model.prefilled_count == PREFIX_COUNT + own


def test_samples_of_one_prompt_pay_for_it_once_even_when_they_come_together(
    batch: Batch, model: RecordingModel
) -> None:
    run(batch, *(job(PROMPTS[0], session=f"s{i}") for i in range(6)))
    assert PROMPTS[0][-2] == CHECKPOINT.header_token_id
    assert model.prefilled_count == len(PROMPTS[0]) - 1 + 5, "and each its own header"


def test_prompts_that_part_in_the_middle_share_what_they_have_in_common_even_when_they_come_together(
    batch: Batch, model: RecordingModel
) -> None:
    common = tuple(range(5, 105))
    run(batch, *(job((*common, 200 + i, *range(300, 310)), session=f"s{i}") for i in range(4)))
    assert model.prefilled_count == len(common) + 4 * 10


def test_where_a_prompt_leaves_what_another_went_through_the_next_one_goes_on(
    batch: Batch, model: RecordingModel
) -> None:
    common, counts = tuple(range(5, 105)), []
    for i in range(4):
        model.prefilled_count = 0
        run(batch, job((*common, 200 + i, *range(300, 310)), session=f"s{i}"))
        counts.append(model.prefilled_count)
    assert counts == [110, 110, 10, 10]


def test_a_prompt_that_is_asked_again_is_not_computed_again(batch: Batch, model: RecordingModel) -> None:
    run(batch, job(tuple(range(5, 105))))
    model.prefilled_count = 0
    run(batch, *(job(tuple(range(5, 105)), session=f"s{i}") for i in range(3)))
    assert model.prefilled_count == 0


def test_few_tokens_in_common_are_not_worth_a_state(batch: Batch, model: RecordingModel) -> None:
    run(batch, *(job((*range(5, 5 + BRANCH_TOKENS_MIN - 1), 200 + i), session=f"s{i}") for i in range(4)))
    assert model.prefilled_count == 4 * (BRANCH_TOKENS_MIN - 1)
    assert len(batch.retained) == 4


def test_a_question_about_a_context_computes_only_itself(batch: Batch, model: RecordingModel) -> None:
    first = job(PROMPTS[0], count=20)
    run(batch, first)
    model.prefilled_count = 0
    asked = [job((*PROMPTS[0][:-2], 100 + i, 101), session=f"q{i}") for i in range(3)]
    behind = [job((*first.tokens, 100 + i, 101), session=f"a{i}") for i in range(3)]
    run(batch, *asked, *behind)
    assert model.prefilled_count == 3 * 1 + 3 * 2
    assert [each.cached_count for each in asked] == [0] * 3, "told with the first tokens"


def test_what_a_session_leaves_behind_serves_others(model: RecordingModel) -> None:
    versions = Versions(model, Limits())
    first = job(PROMPTS[0], count=20)
    run(versions, first)
    versions.release("s")
    model.prefilled_count = 0
    run(versions, job((*first.tokens, 100, 101), session="other"))
    assert model.prefilled_count == 2
    versions.newest.close()


def test_the_next_turn_of_a_session_computes_only_what_is_new(batch: Batch, model: RecordingModel) -> None:
    first = job(PROMPTS[0], count=9)
    run(batch, first)
    model.prefilled_count = 0
    run(batch, job((*first.tokens, 40, 41, 42)))
    assert model.prefilled_count == 3, "the last drawn token and two of the three new ones"


def test_a_stopped_request_keeps_what_it_computed(batch: Batch, model: RecordingModel) -> None:
    stopped = job(PROMPTS[0], count=100)
    batch.add(stopped)
    while stopped.drawn_count == 0:
        batch.turn()
    batch.remove(stopped)
    model.prefilled_count = 0
    run(batch, job(tuple(stopped.tokens)))
    assert model.prefilled_count == 0


def test_a_released_session_is_forgotten_now_and_when_its_request_ends() -> None:
    versions = Versions(Model(CHECKPOINT), Limits())
    run(versions, job(PROMPTS[0]))
    assert versions.retained.own("s") is not None
    versions.release("s")
    assert versions.retained.own("s") is None
    running = job(PROMPTS[0], count=5)
    versions.add(running)
    versions.turn()
    versions.release("s")
    run(versions)
    assert versions.retained.own("s") is None
    versions.close()


def test_retained_states_stay_within_their_bytes_and_the_oldest_goes_first(model: RecordingModel) -> None:
    batch = batch_of(model, Limits(state_bytes_max=400_000))
    for i in range(6):
        run(batch, job((0, 100 + i, *PROMPTS[0][1:80]), session=f"s{i}"))
        assert batch.retained.bytes_held <= 400_000
    assert [batch.retained.own(f"s{i}") is not None for i in range(6)] == [False, False, False, False, True, True]
    batch.close()


def test_a_long_prompt_does_not_hold_up_the_others_for_its_length(batch: Batch) -> None:
    talker = job((0, 5, 6), count=1000, session="talker")
    batch.add(talker)
    batch.turn()
    long = job(PROMPTS[1], session="long")
    batch.add(long)
    before, turns = talker.drawn_count, 0
    while long.drawn_count == 0:
        batch.turn()
        turns += 1
    assert turns >= len(PROMPTS[1]) // Limits().prefill_tokens_max
    assert talker.drawn_count - before >= turns


def test_who_ends_cuts_no_turn_short_for_the_others(batch: Batch) -> None:
    brief, long = (job(PROMPTS[0], count, session=f"s{count}") for count in (3, 40))
    batch.add(brief)
    batch.add(long)
    told = [(each.job is brief, len(each.drawn)) for _ in range(20) for each in batch.turn()]
    assert told == [(True, 3), (False, 16), (False, 16), (False, 8)]


def test_at_most_running_max_requests_step_together(model: RecordingModel) -> None:
    batch = batch_of(model, Limits(running_max=2))
    jobs = [job((0, 9 + i), count=50, session=str(i)) for i in range(5)]
    for each in jobs:
        batch.add(each)
    batch.turn()
    batch.turn()
    assert [each.state is not None for each in jobs] == [True, True, False, False, False]
    run(batch)
    assert [each for each in jobs if each.drawn_count != 50] == []
    batch.close()


def test_a_request_of_a_higher_priority_waits_for_no_place_and_no_prompt_of_a_lower_one(model: RecordingModel) -> None:
    batch = batch_of(model, Limits(running_max=2, state_bytes_max=0))
    ends: list[str] = []
    for name, priority in (("first", 0), ("long", 0), ("third", 0), ("high", 1), ("highest", 2)):
        batch.add(job((0, *PROMPTS[0]) if name == "long" else (0, 9), count=1, session=name, priority=priority))
    while any(batch.jobs):
        ends += [outcome.job.request.session for outcome in batch.turn() if outcome.finish]
    assert ends == ["highest", "high", "first", "third", "long"]
    batch.add(job((0, *PROMPTS[0]), session="long"))
    batch.turn()
    batch.add(job((0, 9, 8, 7), count=1, session="high", priority=1))
    assert [outcome.job.request.session for outcome in batch.turn() if outcome.finish] == ["high"]
    batch.close()


async def test_a_full_queue_refuses_and_recovers() -> None:
    engine = EmbeddedEngine(limits=Limits(running_max=1, queue_max=2))
    await engine.open()
    streams = [engine.sample(job((0, 5), count=1000, session=str(i)).request) for i in range(3)]
    waits = [asyncio.ensure_future(anext(stream)) for stream in streams]
    await waits[0]
    with pytest.raises(EngineError, match="queue is full"):
        await anext(engine.sample(job((0, 5)).request))
    for wait, stream in zip(waits, streams, strict=True):
        wait.cancel()
        await asyncio.wait([wait])
        await stream.aclose()  # type: ignore[attr-defined]
    assert len([chunk async for chunk in engine.sample(job((0, 5)).request)]) >= 1
    await engine.close()


async def test_a_lagging_consumer_gets_its_tokens_merged() -> None:
    engine = EmbeddedEngine()
    await engine.open()
    slow = engine.sample(job((0, 5), count=40, session="slow").request)
    first = await anext(slow)
    assert [chunk async for chunk in engine.sample(job((0, 5), count=400, session="fast").request)]
    rest = [chunk async for chunk in slow]
    assert len(rest) <= 1  # none, where a loaded machine was late with the first, too
    assert sum(len(chunk.token_ids) for chunk in [first, *rest]) == 40
    await engine.close()


@pytest.mark.parametrize(
    "limits",
    [
        Limits(running_max=0),
        Limits(running_max=129),
        Limits(prefill_tokens_max=0),
        Limits(rounds_max=0),
        Limits(threads_count=0),
        Limits(threads_count=17),
    ],
)
def test_limits_out_of_bounds_are_refused(limits: Limits) -> None:
    with pytest.raises(RequestError, match="must be"):
        EmbeddedEngine(limits=limits)


async def test_a_temperature_that_is_neither_greedy_nor_usable_is_refused() -> None:
    engine = EmbeddedEngine()
    await engine.open()
    asked = job((0, 5)).request
    for temperature in (5e-324, 1e-39, 9.9e-4):
        request = msgspec.structs.replace(asked, sampling=Sampling(temperature=temperature))
        with pytest.raises(RequestError, match=r"use 0 for greedy, or at least 0\.001"):
            await anext(engine.sample(request))
    lowest = msgspec.structs.replace(asked, sampling=Sampling(temperature=0.001))
    assert [chunk async for chunk in engine.sample(lowest)]
    await engine.close()


class FailingVersions(Versions):
    def turn(self) -> list[Outcome]:
        raise ArithmeticError("a bug in the third layer")


class FailingEngine(EmbeddedEngine):
    fails = True

    def _load(self) -> Versions:
        versions = super()._load()
        return FailingVersions(versions.newest.model, versions.limits) if self.fails else versions


async def test_the_failure_of_the_thread_is_what_every_caller_sees_until_the_engine_is_opened_again() -> None:
    engine = FailingEngine()
    await engine.open()
    request = job((0, 5)).request
    for _ in range(3):
        with pytest.raises(EngineError, match=r"thread failed: ArithmeticError\('a bug in the third layer'\)") as why:
            await anext(engine.sample(request))
        assert isinstance(why.value.__cause__, ArithmeticError)
    await engine.close()
    engine.fails = False
    await engine.open()
    assert [chunk async for chunk in engine.sample(request)]
    await engine.close()


async def test_an_engine_that_is_not_open_says_so() -> None:
    engine = EmbeddedEngine()
    with pytest.raises(EngineError, match="closed"):
        await anext(engine.sample(job((0, 5)).request))
    with pytest.raises(EngineError, match="closed"):
        _ = engine.info
    await engine.open()
    with pytest.raises(EngineError, match="already open"):
        await engine.open()
    await engine.close()


async def test_an_engine_that_is_opened_and_closed_by_several_at_once_is_opened_once_and_closed_whole() -> None:
    before = set(threading.enumerate())
    engine = EmbeddedEngine()
    opened = await asyncio.gather(engine.open(), engine.open(), return_exceptions=True)
    assert [str(error) for error in opened if error] == ["the engine is already open"]
    await engine.close()
    opening = asyncio.create_task(engine.open())
    await asyncio.sleep(0)
    await engine.close()
    await opening
    assert engine.failure
    assert [each for each in threading.enumerate() if each not in before and each.name == "embedded-engine"] == []
