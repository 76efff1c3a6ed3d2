"""Checks of pauses and preemptions: they fall between two tokens, and nothing that was drawn is lost."""

# ruff: noqa: D103  (a check is described by its name)

from __future__ import annotations

import asyncio
from pathlib import Path

from dsec.conformance.check import require
from rollout.conformance.check import Check, Subject, after, check, chunks_of, collect, joined, opened
from rollout.engine import Engine, Sampled, SampleRequest
from rollout.errors import PreemptedError


class Taker:
    """A consumer that takes all that it gets."""

    def __init__(self, engine: Engine, request: SampleRequest) -> None:
        self.chunks: list[Sampled] = []
        self.has_begun = asyncio.Event()
        self.task = asyncio.create_task(self._take(engine, request))

    async def _take(self, engine: Engine, request: SampleRequest) -> None:
        async for chunk in engine.sample(request):
            self.chunks.append(chunk)
            self.has_begun.set()

    @property
    def token_ids(self) -> tuple[int, ...]:
        """What it has got."""
        return tuple(i for chunk in self.chunks for i in chunk.token_ids)


async def settled(engine: Engine) -> None:
    """Let everything happen that is going to happen in a paused engine."""
    for _ in range(3):
        await engine.save("nobody", Path("nothing"))
        await asyncio.sleep(0)


@check()
async def a_paused_engine_stands_still_between_two_tokens_and_goes_on(subject: Subject) -> None:
    async with opened(subject) as engine:
        whole = await collect(engine, subject.ask(subject.prompts[0], subject.long_count, session="alone"))
        running = Taker(engine, subject.ask(subject.prompts[0], subject.long_count))
        await running.has_begun.wait()
        await engine.pause("keep")
        await engine.pause("keep")
        require(engine.is_paused)
        await settled(engine)
        seen = running.token_ids
        late = Taker(engine, subject.ask(subject.prompts[1], 4, session="late"))
        await settled(engine)
        require(running.token_ids == seen and not running.task.done() and not late.chunks, (seen, running.chunks))
        await engine.resume()
        await engine.resume()
        require(not engine.is_paused)
        await asyncio.gather(running.task, late.task)
        require(subject.same(joined(running.chunks), whole) and len(late.token_ids) == 4)


@check()
async def a_pause_that_waits_lets_running_requests_finish_and_starts_no_other(subject: Subject) -> None:
    async with opened(subject) as engine:
        running = Taker(engine, subject.ask(subject.prompts[0], subject.long_count))
        await running.has_begun.wait()
        await engine.pause("wait")
        await settled(engine)
        require(len(joined(running.chunks).token_ids) == subject.long_count)
        late = Taker(engine, subject.ask(subject.prompts[1], 4, session="late"))
        await settled(engine)
        require(not late.chunks)
        await engine.resume()
        await late.task
        require(len(late.token_ids) == 4)


@check()
async def a_pause_that_aborts_hands_over_what_was_drawn_and_then_says_so(subject: Subject) -> None:
    async with opened(subject) as engine:
        whole = await collect(engine, subject.ask(subject.prompts[0], subject.long_count, session="alone"))
        running = [
            Taker(engine, subject.ask(subject.prompts[0], subject.long_count, session=f"s{i}")) for i in range(3)
        ]
        await running[0].has_begun.wait()
        await engine.pause("abort")
        ended = await asyncio.gather(*(taker.task for taker in running), return_exceptions=True)
        require(all(isinstance(error, PreemptedError) and error.retryable for error in ended), ended)
        late = Taker(engine, subject.ask(subject.prompts[1], 4, session="late"))
        await settled(engine)
        require(not late.chunks)
        await engine.resume()
        await late.task
        for number, taker in enumerate(running):
            count = len(taker.token_ids)
            require(taker.token_ids == whole.token_ids[:count])
            rest = await collect(
                engine,
                subject.ask(subject.prompts[0] + taker.token_ids, subject.long_count - count, session=f"s{number}"),
            )
            require(subject.same(rest, after(whole, count)), (rest, whole))


@check()
async def a_preempted_session_ends_alone(subject: Subject) -> None:
    async with opened(subject) as engine:
        whole = await collect(engine, subject.ask(subject.prompts[0], subject.long_count, session="alone"))
        ended = Taker(engine, subject.ask(subject.prompts[0], subject.long_count))
        other = Taker(engine, subject.ask(subject.prompts[0], subject.long_count, session="other"))
        await ended.has_begun.wait()
        await engine.preempt("s")
        await engine.preempt("never seen")
        (error, none) = await asyncio.gather(ended.task, other.task, return_exceptions=True)
        require(isinstance(error, PreemptedError) and none is None, (error, none))
        require(
            subject.same(joined(other.chunks), whole) and ended.token_ids == whole.token_ids[: len(ended.token_ids)]
        )


@check("keeps")
async def a_preempted_session_is_saved_up_to_its_last_token_and_goes_on_elsewhere(subject: Subject) -> None:
    path = subject.folder / "preempted"
    async with opened(subject) as engine:
        whole = await collect(engine, subject.ask(subject.prompts[0], subject.long_count, session="alone"))
        running = Taker(engine, subject.ask(subject.prompts[0], subject.long_count))
        await running.has_begun.wait()
        await engine.preempt("s")
        await asyncio.wait([running.task])
        require(isinstance(running.task.exception(), PreemptedError))
        context = subject.prompts[0] + running.token_ids
        saved = await engine.save("s", path)
        require(saved == len(context) - 1, (saved, len(context)))
    async with opened(subject) as engine:
        require(await engine.restore("s", path) == saved)
        chunks = await chunks_of(engine, subject.ask(context, subject.long_count - len(running.token_ids)))
        require((chunks[0].kv, chunks[0].cached_tokens_count) == ("restored", saved), chunks[0])
        require(joined(chunks).logprobs == whole.logprobs[len(running.token_ids) :])


@check()
async def a_preemption_happens_even_if_nobody_waits_for_it(subject: Subject) -> None:
    async with opened(subject) as engine:
        running = Taker(engine, subject.ask(subject.prompts[0], subject.long_count))
        await running.has_begun.wait()
        asking = asyncio.ensure_future(engine.preempt("s"))
        await asyncio.sleep(0)
        asking.cancel()
        await asyncio.wait([asking, running.task])
        require(isinstance(running.task.exception(), PreemptedError))


@check()
async def a_paused_request_can_be_preempted(subject: Subject) -> None:
    async with opened(subject) as engine:
        running = Taker(engine, subject.ask(subject.prompts[0], subject.long_count))
        await running.has_begun.wait()
        await engine.pause("keep")
        queued = Taker(engine, subject.ask(subject.prompts[1], subject.long_count, session="queued"))
        await settled(engine)
        await engine.preempt("s")
        await engine.preempt("queued")
        ended = await asyncio.gather(running.task, queued.task, return_exceptions=True)
        require(all(isinstance(error, PreemptedError) for error in ended), ended)
        require(not queued.chunks)


@check()
async def an_engine_closes_while_it_is_paused_and_opens_to_run(subject: Subject) -> None:
    async with opened(subject) as engine:
        await engine.pause("keep")
        running = Taker(engine, subject.ask(subject.prompts[0], subject.long_count))
        await settled(engine)
        await engine.close()
        await asyncio.wait([running.task])
        require(running.task.exception() is not None)
        await engine.open()
        require(not engine.is_paused)
        require((await collect(engine, subject.ask(subject.prompts[0], 3))).finish == "length")


CHECKS: tuple[Check, ...] = (
    a_paused_engine_stands_still_between_two_tokens_and_goes_on,
    a_pause_that_waits_lets_running_requests_finish_and_starts_no_other,
    a_pause_that_aborts_hands_over_what_was_drawn_and_then_says_so,
    a_preempted_session_ends_alone,
    a_preempted_session_is_saved_up_to_its_last_token_and_goes_on_elsewhere,
    a_preemption_happens_even_if_nobody_waits_for_it,
    a_paused_request_can_be_preempted,
    an_engine_closes_while_it_is_paused_and_opens_to_run,
)
