"""Quick Instructions about rollouts that are anywhere on their way: answered, before all else, and not noticed."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import msgspec
import pytest

from dsec.errors import StateError, UnreachableError
from rollout.engine import Sampling
from rollout.engines.embedded.engine import EmbeddedEngine
from rollout.errors import ConflictError, NotFoundError
from rollout.quick import ask
from rollout.record import QuickAnswer
from rollout.request import Limits
from rollout.testing import Reply
from toolcall_dsl import token_ids_of
from toolcall_dsl.quick import Answer, instruction

DONE = Reply(reasoning="Good.", content="Done.")
LOOK = Reply(reasoning="Look.", calls=[("bash", {"command": "look"})])
SIX: list[Any] = ["action", "query", "authority", "domain", "title", ("read_url", "https://a.example/b")]
FIVE = [each for each in SIX if each != "title"]
"""Those that stand behind any question, answered or not."""
ONE = "job/one.0"


def look_once(session: str, turn: int) -> Reply:
    """A rollout looks, then is done; what is asked behind a turn is read as its next one."""
    if session.startswith("job/"):
        return DONE if turn else LOOK
    return Reply(content="Search")


def texts_of(answers: Any) -> list[str]:
    return [answer.text for answer in answers]


async def in_mid_turn(here: Any) -> None:
    await here.until(lambda: here.sampled(ONE) == 3)


async def in_a_tool(here: Any) -> None:
    await here.until(lambda: here.tools_count == 1)


async def preempted(here: Any) -> None:
    await in_a_tool(here)
    await here.service.preempt([ONE])


async def ended(here: Any) -> None:
    here.tool_may_end.set()
    await here.service.wait("job")


async def cancelled(here: Any) -> None:
    await in_a_tool(here)
    await here.service.cancel("job")


@pytest.mark.parametrize("moment", [in_mid_turn, in_a_tool, preempted, ended, cancelled])
async def test_a_rollout_is_asked_wherever_it_is_and_its_end_is_the_same(world: Any, moment: Any) -> None:
    here = world(look_once)
    async with here.serving() as service:
        await here.submit("job", "one")
        await moment(here)
        before = service.ledger.rollouts[ONE]
        questions = FIVE if moment is in_mid_turn else SIX
        answers = await ask(service, ONE, questions, request_id="asked")
        assert texts_of(answers) == ["Search"] * len(questions)
        assert answers[0].action == "search"
        assert moment is in_mid_turn or service.ledger.rollouts[ONE] is before
        here.tool_may_end.set()
        service.resume([ONE] if moment is preempted else [])
        await service.wait("job")
        record = here.record(ONE)
        assert service.ledger.tokenizer.decode(record.token_ids).count("Done.") == (moment is not cancelled)
        assert record.tokens_regenerated == 0


async def run(here: Any, *, is_asked: bool) -> dict[str, tuple[Any, ...]]:
    """Two tasks and a conversation, by the embedded model, with or without questions all the way."""
    async with here.serving() as service:
        here.tool_may_end.set()
        drawn = {"sampling": Sampling(temperature=1.0, seed=3), "limits": Limits(turns_count_max=4)}
        await here.submit("job", "Sort-a.txt", "Count-b.txt", **drawn)
        await here.ask("talk", 1, sampling=drawn["sampling"])
        resting = asyncio.gather(service.wait("job"), service.wait("talk"))
        asked_count = 0
        while is_asked and not resting.done():
            await asyncio.sleep(0)
            known = [*service.ledger.rollouts.values()]
            for state in [state for state in known if state.job.request_id in {"job", "talk"} and not state.finished]:
                asked_count += len(await ask(service, state.opened.rollout_id, FIVE, answer_tokens_count_max=4))
        await resting
        assert bool(asked_count) == is_asked
        records = [here.record(rollout_id) for rollout_id in here.ended() if rollout_id.startswith(("job/", "talk/"))]
    return {each.rollout_id: (each.token_ids, each.logprobs, each.spans, each.finish_reason) for each in records}


async def test_tokens_and_logprobs_are_the_same_bits_with_questions_all_the_way(world: Any) -> None:
    calm, busy = world(), world()
    calm.make_engine = busy.make_engine = EmbeddedEngine
    busy.directory = Path(f"{calm.directory}-asked")
    expected = await run(calm, is_asked=False)
    assert await run(busy, is_asked=True) == expected
    assert len(expected) == 3


async def test_a_question_computes_itself_alone_while_its_rollout_is_sampled_and_when_it_has_ended(world: Any) -> None:
    here, name = world(), "job/Sort-a.txt.0"
    here.make_engine = EmbeddedEngine
    tasks = [(each, None) if isinstance(each, str) else each for each in SIX]
    async with here.serving() as service:
        tokenizer = service.ledger.tokenizer
        asked = [instruction(task, thinking=True, url=url).segments(tokenizer) for task, url in tasks]
        own = {task: len(token_ids_of(segments)) for (task, _), segments in zip(tasks, asked, strict=True)}
        here.tool_may_end.set()
        await here.submit("job", "Sort-a.txt", limits=Limits(turns_count_max=3))
        await here.until(lambda: here.sampled(name) > 0)
        while_sampled = await ask(service, name, FIVE)
        await service.wait("job")
        after = await ask(service, name, SIX)
    for answers, end in ((while_sampled, 0), (after, 1)):  # of its last turn, the end token was drawn and not computed
        computed = {each.task: each.prompt_tokens_count - each.cached_tokens_count for each in answers}
        assert computed == {each.task: own[each.task] + end * (each.task == "title") for each in answers}


async def test_one_request_made_by_many_while_the_context_goes_on_is_one_job(world: Any) -> None:
    here = world(look_once)
    async with here.serving() as service:
        await here.submit("job", "one")
        await in_a_tool(here)
        async with service.admission:  # the first has read the context, and is not yet a job
            first = asyncio.create_task(ask(service, ONE, SIX, request_id="asked"))
            await asyncio.sleep(0)
            here.tool_may_end.set()
            await here.until(lambda: ONE in here.ended())
            others = [asyncio.create_task(ask(service, ONE, SIX, request_id="asked")) for _ in range(8)]
            await asyncio.sleep(0)
        said = await asyncio.gather(first, *others)
        assert [answers for answers in said if answers != said[0]] == []
        assert service.ledger.jobs.keys() == {"job", "asked"}
        fresh = await ask(service, ONE, SIX)
        assert fresh[0].prompt_tokens_count > said[0][0].prompt_tokens_count
        with pytest.raises(ConflictError, match="'asked' was submitted before"):
            await ask(service, ONE, SIX[:2], request_id="asked")


async def test_answers_outlive_what_was_asked_about_and_unnamed_ones_leave_the_log(world: Any) -> None:
    here = world(look_once)
    async with here.serving() as service:
        await here.submit("job", "one")
        await ended(here)
        named = await ask(service, ONE, SIX, request_id="asked")
        await ask(service, ONE, SIX)
        await service.retention.acknowledge([ONE])
        while service.ledger.jobs.keys() != {"asked"}:  # noqa: ASYNC110  # the server lets go in its own time
            await asyncio.sleep(0.001)
        assert await ask(service, ONE, SIX, request_id="asked") == named
        with pytest.raises(NotFoundError, match=r"no rollout 'job/one\.0'"):
            await ask(service, ONE, SIX)


async def test_who_goes_while_the_question_is_taken_leaves_nothing_behind(world: Any) -> None:
    here = world(look_once)
    async with here.serving() as service:
        await here.submit("job", "one")
        await ended(here)
        for _ in range(3):
            asking = asyncio.create_task(ask(service, ONE, SIX))
            await here.until(lambda: len(service.ledger.jobs) == 2)
            asking.cancel()
            await asyncio.gather(asking, return_exceptions=True)
            while service.ledger.jobs.keys() != {"job"}:  # noqa: ASYNC110  # the server lets go in its own time
                await asyncio.sleep(0.001)


async def test_a_context_that_is_full_says_that_no_answer_has_room(world: Any) -> None:
    here = world(look_once, context_tokens_count_max=512)
    async with here.serving() as service:
        await here.submit("job", "one", limits=Limits(context_tokens_count_max=512))
        await ended(here)
        with pytest.raises(
            StateError, match=r"read_url: \d+ tokens leave no room for an answer about job/one\.0: .* 512"
        ):
            await ask(service, ONE, [("read_url", "https://a.example/" + "b" * 2000)])
        room = 512 - (await ask(service, ONE, ["title"]))[0].prompt_tokens_count
        (answer,) = await ask(service, ONE, ["title"], answer_tokens_count_max=room)
        assert answer.title == "Search"


async def test_an_answer_outlives_the_cancel_of_what_it_is_about(world: Any) -> None:
    here = world(look_once)
    async with here.serving() as service:
        await here.submit("job", "one")
        await in_a_tool(here)
        await service.engine.pause("keep")
        asking = asyncio.create_task(ask(service, ONE, SIX))
        await here.until(lambda: any(job.request_id != "job" for job in service.ledger.jobs.values()))
        await service.cancel("job")
        await service.engine.resume()
        assert texts_of(await asking) == ["Search"] * len(SIX)


async def test_a_named_question_is_answered_by_the_next_process_and_an_unnamed_one_has_gone(world: Any) -> None:
    here = world(look_once)
    async with here.serving() as service:
        await here.submit("job", "one")
        await in_a_tool(here)
        await service.engine.pause("keep")
        both = (ask(service, ONE, SIX, request_id="asked"), ask(service, ONE, SIX))
        asking = asyncio.gather(*both, return_exceptions=True)
        await here.until(lambda: len(service.ledger.jobs) == 3)
    assert [type(each) for each in await asking] == [UnreachableError] * 2
    here.tool_may_end.set()
    async with here.serving() as service:
        assert texts_of(await ask(service, ONE, SIX, request_id="asked")) == ["Search"] * len(SIX)
        await service.wait("job")
        assert {job for job in service.ledger.jobs if job.startswith("quick-")} <= set(service.ledger.cancelled)


async def test_questions_go_before_a_full_queue_and_who_holds_the_only_slot(world: Any) -> None:
    def script(session: str, turn: int) -> Reply:
        return Reply(content="word " * 400) if session.startswith("talk/") else look_once(session, turn)

    here = world(script, concurrency=1, sandboxes_count_max=1, queued_count_max=2)
    async with here.serving() as service:
        await here.submit("job", "one")
        await in_a_tool(here)
        await here.submit("queued", "two", "three")
        await here.ask("talk", 1, priority=1)
        await here.until(lambda: here.sampled("talk/0.0") > 3)
        answers = await ask(service, ONE, FIVE)
        assert texts_of(answers) == ["Search"] * 5
        assert here.ended() == [answer.rollout_id for answer in answers]
        here.tool_may_end.set()
        for request_id in ("talk", "job", "queued"):
            await service.wait(request_id)


def test_every_field_of_a_reading_is_told() -> None:
    assert Answer.__dataclass_fields__.keys() <= {field.name for field in msgspec.structs.fields(QuickAnswer)}
