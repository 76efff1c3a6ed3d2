"""Checks of a change of weights: who goes on with which, over which KV cache, and what is said of it."""

# ruff: noqa: D103  (a check is described by its name)

from __future__ import annotations

import asyncio
import shutil
from contextlib import aclosing

from dsec.conformance.check import NotConformingError, require
from rollout.conformance.check import (
    Check,
    Subject,
    after,
    check,
    chunks_of,
    collect,
    joined,
    opened,
    refusal_of,
)
from rollout.engine import Engine, EngineInfo, OnUpdate, Sampled
from rollout.errors import EngineError, RequestError


async def across(engine: Engine, subject: Subject, on_update: OnUpdate, session: str = "s") -> list[Sampled]:
    """The chunks of a request that gets other weights in mid-flight."""
    request = subject.ask(subject.prompts[0], subject.long_count, session=session, on_update=on_update)
    async with aclosing(engine.sample(request)) as stream:
        chunks = [await anext(stream)]
        await engine.pause("keep")
        await engine.update(subject.checkpoint(1), 1)
        await engine.resume()
        return [*chunks, *[chunk async for chunk in stream]]


def drawn_by(chunks: list[Sampled], version: int) -> tuple[int, ...]:
    """The tokens that this version drew."""
    return tuple(i for chunk in chunks if chunk.policy_version == version for i in chunk.token_ids)


@check()
async def new_weights_have_their_version_and_their_digest(subject: Subject) -> None:
    async with opened(subject) as engine:
        before = engine.info
        after = await engine.update(subject.checkpoint(1), 3)
        require(after == engine.info and after.policy_version == 3, after)
        require(after.weights_digest != before.weights_digest and after.build == before.build, after)
        chunks = await chunks_of(engine, subject.ask(subject.prompts[0], 8))
        require({chunk.policy_version for chunk in chunks} == {3}, chunks)
        require((await engine.score(subject.prompts[0])).policy_version == 3)


@check()
async def the_checkpoint_is_the_folder_of_the_weights_that_draw(subject: Subject) -> None:
    async with opened(subject) as engine:
        require(engine.checkpoint is None or engine.checkpoint.is_dir(), engine.checkpoint)
        for number in (1, 2):
            await engine.update(subject.checkpoint(number), number)
            require(engine.checkpoint == subject.checkpoint(number), engine.checkpoint)
        await refusal_of(engine.update(subject.folder / "nowhere", 3))
        require(engine.checkpoint == subject.checkpoint(2), engine.checkpoint)


@check()
async def a_request_goes_on_over_its_kv_or_over_a_new_one_and_says_which(subject: Subject) -> None:
    kept = "kept" if "versions" in subject.traits else "rebuilt"
    said: tuple[tuple[OnUpdate, str], ...] = (("keep", kept), ("cut", "rebuilt"))
    for on_update, kv in said:
        async with opened(subject) as engine:
            chunks = await across(engine, subject, on_update)
            versions = [chunk.policy_version for chunk in chunks]
            require(sorted(versions) == versions and set(versions) == {0, 1}, versions)
            first = versions.index(1)
            expected = ["" if index != first else kv for index in range(len(chunks))]
            require([chunk.kv for chunk in chunks] == expected, chunks)
            require(len(joined(chunks).token_ids) == subject.long_count, chunks)


@check("draws")
async def what_is_cut_goes_on_as_if_the_new_weights_had_read_everything(subject: Subject) -> None:
    async with opened(subject) as engine:
        chunks = await across(engine, subject, "cut")
    old, new = drawn_by(chunks, 0), drawn_by(chunks, 1)
    async with opened(subject) as engine:
        await engine.update(subject.checkpoint(1), 1)
        rest = await collect(engine, subject.ask(subject.prompts[0] + old, subject.long_count - len(old)))
    require(rest.token_ids == new and subject.same(rest, after(joined(chunks), len(old))), (rest, new))


@check("versions")
async def what_is_pinned_goes_on_with_the_old_weights_until_it_is_released(subject: Subject) -> None:
    async with opened(subject) as engine:
        whole = await collect(engine, subject.ask(subject.prompts[0], subject.long_count + 5))
        await engine.release("s")
        chunks = await across(engine, subject, "pin")
        require({chunk.policy_version for chunk in chunks} == {0} and not any(c.kv for c in chunks), chunks)
        require(joined(chunks).token_ids == whole.token_ids[: subject.long_count])
        more = subject.ask(subject.prompts[0] + whole.token_ids[: subject.long_count], 5, on_update="pin")
        later = await chunks_of(engine, more)
        require({chunk.policy_version for chunk in later} == {0}, later)
        require(joined(later).logprobs == whole.logprobs[subject.long_count :], later)
        fresh = await chunks_of(engine, subject.ask(subject.prompts[0], 5, session="fresh", on_update="pin"))
        require({chunk.policy_version for chunk in fresh} == {1}, fresh)
        await engine.release("s")
        again = await chunks_of(engine, more)
        require({chunk.policy_version for chunk in again} == {1}, again)


@check()
async def a_pin_holds_until_the_next_request_of_its_session(subject: Subject) -> None:
    async with opened(subject) as engine:
        context = subject.prompts[0]

        async def draw(on_update: OnUpdate, expected: int) -> None:
            nonlocal context
            chunks = await chunks_of(engine, subject.ask(context, 4, on_update=on_update))
            require({chunk.policy_version for chunk in chunks} == {expected}, (on_update, expected, chunks))
            context += joined(chunks).token_ids

        await draw("pin", 0)
        if "versions" in subject.traits:
            await engine.update(subject.checkpoint(1), 1)
            await draw("pin", 0)
        await draw("keep", engine.info.policy_version)
        await engine.update(subject.checkpoint(2), 2)
        await draw("cut", 2)


@check("keeps", "versions")
async def between_two_requests_of_a_session_weights_change_in_the_same_ways(subject: Subject) -> None:
    said: tuple[tuple[OnUpdate, int, str], ...] = (("keep", 1, "kept"), ("cut", 1, "rebuilt"), ("pin", 0, ""))
    async with opened(subject) as engine:
        first = {}
        for on_update, _, _ in said:
            asked = subject.ask(subject.prompts[0], 8, session=on_update, on_update=on_update)
            first[on_update] = await collect(engine, asked)
        await engine.update(subject.checkpoint(1), 1)
        for on_update, version, kv in said:
            context = subject.prompts[0] + first[on_update].token_ids
            chunks = await chunks_of(engine, subject.ask(context, 8, session=on_update, on_update=on_update))
            require({chunk.policy_version for chunk in chunks} == {version}, chunks)
            require([chunk.kv for chunk in chunks] == [kv] + [""] * (len(chunks) - 1), (on_update, chunks))
            require((chunks[0].cached_tokens_count > 0) == (on_update != "cut"), chunks[0])


@check("draws", "keeps")
async def a_state_of_other_weights_serves_its_own_session_and_no_other(subject: Subject) -> None:
    async with opened(subject) as engine:
        first = await collect(engine, subject.ask(subject.prompts[0], 8, session="kept"))
        await engine.update(subject.checkpoint(1), 1)
        context = subject.prompts[0] + first.token_ids
        kept = await collect(engine, subject.ask(context, 8, session="kept"))
        other = await chunks_of(engine, subject.ask(context + kept.token_ids, 8, session="other"))
        require((other[0].cached_tokens_count, other[0].kv) == (0, ""), other[0])
    async with opened(subject) as engine:
        await engine.update(subject.checkpoint(1), 1)
        require(await collect(engine, subject.ask(context + kept.token_ids, 8)) == joined(other))


@check()
async def a_checkpoint_that_cannot_be_used_changes_nothing(subject: Subject) -> None:
    async with opened(subject) as engine:
        before, info = await collect(engine, subject.ask(subject.prompts[0], 8)), engine.info
        broken = subject.folder / "broken"
        shutil.rmtree(broken, ignore_errors=True)
        broken.mkdir()
        for checkpoint in (subject.folder / "nowhere", broken):
            error = await refusal_of(engine.update(checkpoint, 1))
            require(isinstance(error, EngineError) and str(checkpoint) in str(error), error)
        require(engine.info == info and subject.same(await collect(engine, subject.ask(subject.prompts[0], 8)), before))


@check("shapes")
async def weights_of_another_shape_are_refused_and_change_nothing(subject: Subject) -> None:
    if subject.misfit is None:
        raise NotConformingError('Subject.misfit makes no such weights: give it, or leave the trait "shapes" out')
    async with opened(subject) as engine:
        before, info = await collect(engine, subject.ask(subject.prompts[0], 8)), engine.info
        checkpoint = subject.misfit()
        error = await refusal_of(engine.update(checkpoint, 1))
        require(isinstance(error, EngineError) and str(checkpoint) in str(error), error)
        require(engine.info == info and subject.same(await collect(engine, subject.ask(subject.prompts[0], 8)), before))
        require((await engine.update(subject.checkpoint(1), 1)).policy_version == 1)


@check()
async def new_weights_are_announced_before_they_draw_and_what_that_raises_stops_them(subject: Subject) -> None:
    async with opened(subject) as engine:
        before, said = engine.info, []
        running = asyncio.ensure_future(chunks_of(engine, subject.ask(subject.prompts[0], subject.long_count)))

        async def announce(info: EngineInfo) -> None:
            said.append((info, engine.info))
            if "versions" in subject.traits:
                await chunks_of(engine, subject.ask(subject.prompts[1], 2, session="meanwhile"))
            if len(said) == 1:
                raise EngineError("the log is full")

        error = await refusal_of(engine.update(subject.checkpoint(1), 1, announce))
        require(str(error) == "the log is full" and engine.info == before, error)
        require({chunk.policy_version for chunk in await running} == {0})
        after = await engine.update(subject.checkpoint(1), 1, announce)
        require(said == [(after, before), (after, before)] and engine.info == after, said)
        require(await engine.update(subject.checkpoint(1), 1, announce) == after and len(said) == 2)


@check()
async def versions_grow_and_the_last_update_may_be_repeated(subject: Subject) -> None:
    async with opened(subject) as engine:
        info = await engine.update(subject.checkpoint(1), 2)
        require(await engine.update(subject.checkpoint(1), 2) == info)
        for version in (1, 2):
            error = await refusal_of(engine.update(subject.checkpoint(2), version))
            require(isinstance(error, RequestError) and "policy_version" in str(error), error)
        require(engine.info == info)


@check()
async def the_same_weights_under_another_number_break_nothing(subject: Subject) -> None:
    async with opened(subject) as engine:
        await engine.update(subject.checkpoint(1), 1)
        whole = await collect(engine, subject.ask(subject.prompts[0], 16))
        await engine.update(subject.checkpoint(1), 2)
        rest = await chunks_of(engine, subject.ask(subject.prompts[0] + whole.token_ids[:8], 8))
        require({(chunk.policy_version, chunk.kv) for chunk in rest} == {(2, "")}, rest)
        require(subject.same(joined(rest), after(whole, 8)))


@check()
async def sessions_pin_only_as_many_versions_as_there_is_room_for(subject: Subject) -> None:
    async with opened(subject) as engine:
        error, version = None, 0
        while error is None and version < 9:
            await collect(engine, subject.ask(subject.prompts[0], 2, session=f"s{version}", on_update="pin"))
            version += 1
            try:
                await engine.update(subject.checkpoint(1 + version % 2), version)
            except EngineError as refused:
                error = refused
        require(error is not None and "pin" in str(error) and "release" in str(error), error)
        require(engine.info.policy_version == version - 1)
        for number in range(version):
            await engine.release(f"s{number}")
        require((await engine.update(subject.checkpoint(1 + version % 2), version)).policy_version == version)


CHECKS: tuple[Check, ...] = (
    new_weights_have_their_version_and_their_digest,
    the_checkpoint_is_the_folder_of_the_weights_that_draw,
    a_request_goes_on_over_its_kv_or_over_a_new_one_and_says_which,
    what_is_cut_goes_on_as_if_the_new_weights_had_read_everything,
    what_is_pinned_goes_on_with_the_old_weights_until_it_is_released,
    a_pin_holds_until_the_next_request_of_its_session,
    between_two_requests_of_a_session_weights_change_in_the_same_ways,
    a_state_of_other_weights_serves_its_own_session_and_no_other,
    a_checkpoint_that_cannot_be_used_changes_nothing,
    weights_of_another_shape_are_refused_and_change_nothing,
    new_weights_are_announced_before_they_draw_and_what_that_raises_stops_them,
    versions_grow_and_the_last_update_may_be_repeated,
    the_same_weights_under_another_number_break_nothing,
    sessions_pin_only_as_many_versions_as_there_is_room_for,
)
