"""Checks of pauses and preemptions: they fall between two tokens, and nothing that was drawn is lost."""

# ruff: noqa: D103  (a check is described by its name)

from __future__ import annotations

import asyncio

from dsec.conformance.check import require
from rollout.conformance.check import (
    Check,
    Subject,
    Taker,
    after,
    check,
    chunks_of,
    collect,
    joined,
    opened,
    settled,
)
from rollout.engine import PauseMode
from rollout.errors import PreemptedError


@check()
async def a_paused_engine_stands_still_between_two_tokens_and_goes_on(subject: Subject) -> None:
    async with opened(subject) as engine:
        alone = Taker(engine, subject.ask(subject.prompts[0], subject.long_count, session="alone"))
        await alone.task
        running = Taker(engine, subject.ask(subject.prompts[0], subject.long_count))
        await running.begun()
        await engine.pause("keep")
        await engine.pause("keep")
        require(engine.is_paused)
        await settled(alone)  # what was drawn before is handed over
        seen = running.token_ids
        late = Taker(engine, subject.ask(subject.prompts[1], 4, session="late"))
        await settled(alone)
        require(running.token_ids == seen and not running.task.done() and not late.chunks, (seen, running.chunks))
        await engine.resume()
        await engine.resume()
        require(not engine.is_paused)
        await asyncio.gather(running.task, late.task)
        require(subject.same(joined(running.chunks), joined(alone.chunks)) and len(late.token_ids) == 4)


@check()
async def a_pause_that_waits_lets_running_requests_finish_and_starts_no_other(subject: Subject) -> None:
    async with opened(subject) as engine:
        running = Taker(engine, subject.ask(subject.prompts[0], subject.long_count))
        await running.begun()
        await engine.pause("wait")
        late = Taker(engine, subject.ask(subject.prompts[1], 4, session="late"))
        await settled(running)
        require(running.task.done() and len(joined(running.chunks).token_ids) == subject.long_count, running.chunks)
        require(not late.chunks and not late.task.done(), late.chunks)
        await engine.resume()
        await late.task
        require(len(late.token_ids) == 4)


@check()
async def a_pause_that_aborts_hands_over_what_was_drawn_and_then_says_so(subject: Subject) -> None:
    async with opened(subject) as engine:
        alone = Taker(engine, subject.ask(subject.prompts[0], subject.long_count, session="alone"))
        await alone.task
        whole = joined(alone.chunks)
        running = [
            Taker(engine, subject.ask(subject.prompts[0], subject.long_count, session=f"s{i}")) for i in range(3)
        ]
        await running[0].begun()
        await engine.pause("abort")
        ended = await asyncio.gather(*(taker.task for taker in running), return_exceptions=True)
        require(all(isinstance(error, PreemptedError) and error.retryable for error in ended), ended)
        late = Taker(engine, subject.ask(subject.prompts[1], 4, session="late"))
        await settled(alone)
        require(not late.chunks and not late.task.done(), late.chunks)
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
async def a_later_pause_changes_the_mode_of_an_earlier_one(subject: Subject) -> None:
    """A pause that waits for too long can be made one that aborts; one that keeps can be made one that waits."""
    changes: tuple[tuple[PauseMode, PauseMode], ...] = (("keep", "wait"), ("keep", "abort"), ("wait", "abort"))
    for before, after_it in changes:
        async with opened(subject) as engine:
            running = Taker(engine, subject.ask(subject.prompts[0], subject.long_count))
            await running.begun()
            first = asyncio.create_task(engine.pause(before))
            await (first if before == "keep" else asyncio.sleep(0))
            late = Taker(engine, subject.ask(subject.prompts[1], 4, session="late"))
            await engine.pause(after_it)
            await first
            (ended,) = await asyncio.gather(running.task, return_exceptions=True)
            require(isinstance(ended, PreemptedError) == (after_it == "abort"), (before, after_it, ended))
            require(after_it == "abort" or len(joined(running.chunks).token_ids) == subject.long_count, running.chunks)
            (queued,) = await asyncio.gather(late.task, return_exceptions=True) if late.task.done() else (None,)
            require(queued is None or isinstance(queued, PreemptedError), (before, after_it, queued))
            await settled(running)
            require(engine.is_paused and not late.chunks, (before, after_it, late.chunks))
            await engine.resume()
            require((await collect(engine, subject.ask(subject.prompts[1], 4))).finish == "length")


@check()
async def a_score_outlasts_a_pause_or_is_preempted_by_one_that_aborts(subject: Subject) -> None:
    modes: tuple[PauseMode, ...] = ("keep", "wait", "abort")
    async with opened(subject) as engine:
        alone = await engine.score(subject.prompts[0])
        for mode in modes:
            before = asyncio.create_task(engine.score(subject.prompts[0]))
            await asyncio.sleep(0)
            await engine.pause(mode)
            meanwhile = asyncio.create_task(engine.score(subject.prompts[0]))
            await settled()
            await engine.resume()
            for told in await asyncio.gather(before, meanwhile, return_exceptions=True):
                if isinstance(told, BaseException):
                    require(mode == "abort" and isinstance(told, PreemptedError), (mode, told))
                else:
                    require(subject.close(told.logprobs, alone.logprobs), (mode, told))


@check()
async def a_preempted_session_ends_alone(subject: Subject) -> None:
    async with opened(subject) as engine:
        whole = await collect(engine, subject.ask(subject.prompts[0], subject.long_count, session="alone"))
        ended = Taker(engine, subject.ask(subject.prompts[0], subject.long_count))
        other = Taker(engine, subject.ask(subject.prompts[0], subject.long_count, session="other"))
        await ended.begun()
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
        await running.begun()
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
        await running.begun()
        asking = asyncio.ensure_future(engine.preempt("s"))
        await asyncio.sleep(0)
        asking.cancel()
        await asyncio.wait([asking, running.task])
        require(isinstance(running.task.exception(), PreemptedError))


@check()
async def a_paused_request_can_be_preempted(subject: Subject) -> None:
    async with opened(subject) as engine:
        running = Taker(engine, subject.ask(subject.prompts[0], subject.long_count))
        await running.begun()
        await engine.pause("keep")
        queued = Taker(engine, subject.ask(subject.prompts[1], subject.long_count, session="queued"))
        await settled(running)
        await engine.preempt("s")
        await engine.preempt("queued")
        ended = await asyncio.gather(running.task, queued.task, return_exceptions=True)
        require(all(isinstance(error, PreemptedError) for error in ended), ended)
        require(not queued.chunks, queued.chunks)


@check()
async def an_engine_closes_while_it_is_paused_and_opens_to_run(subject: Subject) -> None:
    async with opened(subject) as engine:
        await engine.pause("keep")
        running = Taker(engine, subject.ask(subject.prompts[0], subject.long_count))
        await settled()
        require(not running.chunks and not running.task.done(), running.chunks)
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
    a_later_pause_changes_the_mode_of_an_earlier_one,
    a_score_outlasts_a_pause_or_is_preempted_by_one_that_aborts,
    a_preempted_session_ends_alone,
    a_preempted_session_is_saved_up_to_its_last_token_and_goes_on_elsewhere,
    a_preemption_happens_even_if_nobody_waits_for_it,
    a_paused_request_can_be_preempted,
    an_engine_closes_while_it_is_paused_and_opens_to_run,
)
