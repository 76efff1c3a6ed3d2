"""Checks of what is kept of a session: reported, saved, restored, and never believed when it is damaged."""

# ruff: noqa: D103  (a check is described by its name)

from __future__ import annotations

from contextlib import aclosing

from dsec.conformance.check import require
from rollout.conformance.check import (
    Check,
    Subject,
    check,
    chunks_of,
    collect,
    joined,
    opened,
    refusal_of,
)
from rollout.errors import EngineError

FLIPS = 64


@check("keeps")
async def the_first_chunk_says_how_much_of_the_prompt_was_not_computed(subject: Subject) -> None:
    async with opened(subject) as engine:
        first = await chunks_of(engine, subject.ask(subject.prompts[0], 10))
        require(first[0].cached_tokens_count == 0, first[0])
        context = subject.prompts[0] + joined(first).token_ids
        second = await chunks_of(engine, subject.ask(context, 10))
        require(second[0].cached_tokens_count == len(context) - 1, second[0])
        require(not any(chunk.cached_tokens_count for chunk in second[1:]), second)
        await engine.release("s")


@check("keeps")
async def a_restored_session_goes_on_as_if_it_had_never_left(subject: Subject) -> None:
    path = subject.folder / "state"
    async with opened(subject) as engine:
        whole = await collect(engine, subject.ask(subject.prompts[0], 20))
        await engine.release("s")
        context = subject.prompts[0] + (await collect(engine, subject.ask(subject.prompts[0], 10))).token_ids
        saved = await engine.save("s", path)
        require(saved == len(context) - 1, saved)
    async with opened(subject) as engine:
        require(await engine.restore("s", path) == saved)
        rest = await chunks_of(engine, subject.ask(context, 10))
        require((rest[0].cached_tokens_count, rest[0].kv) == (saved, "restored"), rest[0])
        require(not any(chunk.kv for chunk in rest[1:]), rest)
        require((joined(rest).token_ids, joined(rest).logprobs) == (whole.token_ids[10:], whole.logprobs[10:]))
        again = await chunks_of(engine, subject.ask(context, 10))
        require(not any(chunk.kv for chunk in again), again)


@check("keeps")
async def a_restored_state_of_other_tokens_is_not_used(subject: Subject) -> None:
    path = subject.folder / "state"
    async with opened(subject) as engine:
        await collect(engine, subject.ask(subject.prompts[0], 10))
        require(await engine.save("s", path) > 0)
        expected = await collect(engine, subject.ask(subject.prompts[1], 10, session="other"))
    async with opened(subject) as engine:
        require(await engine.restore("s", path) > 0)
        chunks = await chunks_of(engine, subject.ask(subject.prompts[1], 10))
        require((chunks[0].cached_tokens_count, chunks[0].kv) == (0, "") and joined(chunks) == expected, chunks[0])


@check("keeps")
async def a_damaged_file_is_no_state_and_the_tokens_are_the_same(subject: Subject) -> None:
    path, damaged = subject.folder / "state", subject.folder / "damaged"
    async with opened(subject) as engine:
        context = subject.prompts[0] + (await collect(engine, subject.ask(subject.prompts[0], 4))).token_ids
        await engine.save("s", path)
        expected = await collect(engine, subject.ask(context, 8))
    data = path.read_bytes()
    places = [*range(50), *range(50, len(data), max(1, len(data) // FLIPS))]
    flipped = [data[:at] + bytes([data[at] ^ 0x10]) + data[at + 1 :] for at in places]
    cut = [data[:at] for at in (0, 1, 7, 8, 39, 40, 41, len(data) // 2, len(data) - 1)]
    async with opened(subject) as engine:
        require(await engine.restore("s", subject.folder / "nowhere") == 0)
        require(await engine.restore("s", subject.folder) == 0)
        for broken in [*flipped, *cut, data + b"\0", bytes(len(data))]:
            damaged.write_bytes(broken)
            require(await engine.restore("s", damaged) == 0, len(broken))
        chunks = await chunks_of(engine, subject.ask(context, 8))
        require((chunks[0].kv, chunks[0].cached_tokens_count) == ("", 0) and joined(chunks) == expected, chunks[0])
        require(await engine.restore("t", path) > 0, "the file itself was whole")


@check("keeps")
async def a_state_of_other_weights_is_not_restored(subject: Subject) -> None:
    path = subject.folder / "state"
    async with opened(subject) as engine:
        await collect(engine, subject.ask(subject.prompts[0], 4))
        require(await engine.save("s", path) > 0)
        await engine.update(subject.checkpoint(1), 1)
        require(await engine.restore("new", path) == 0)
    async with opened(subject) as engine:
        require(await engine.restore("new", path) > 0)


@check("keeps")
async def a_state_kept_over_an_update_is_restored_for_its_newest_weights(subject: Subject) -> None:
    path = subject.folder / "state"
    async with opened(subject) as engine:
        first = await collect(engine, subject.ask(subject.prompts[0], 6))
        await engine.update(subject.checkpoint(1), 1)
        context = subject.prompts[0] + first.token_ids
        second = await collect(engine, subject.ask(context, 6))
        saved = await engine.save("s", path)
        expected = await collect(engine, subject.ask(context + second.token_ids, 6))
        require(saved == len(context) + 5, saved)
    async with opened(subject) as engine:
        await engine.update(subject.checkpoint(1), 1)
        require(await engine.restore("s", path) == saved)
        chunks = await chunks_of(engine, subject.ask(context + second.token_ids, 6))
        require(chunks[0].kv == "restored" and joined(chunks) == expected, chunks)


@check("keeps")
async def a_running_session_can_be_saved_and_stays_as_it_is(subject: Subject) -> None:
    path = subject.folder / "state"
    async with opened(subject) as engine:
        whole = await collect(engine, subject.ask(subject.prompts[0], 40, session="alone"))
        async with aclosing(engine.sample(subject.ask(subject.prompts[0], 40))) as stream:
            chunks = [await anext(stream)]
            require(await engine.save("s", path) >= len(subject.prompts[0]))
            chunks += [chunk async for chunk in stream]
        require(joined(chunks) == whole)


@check()
async def what_nobody_kept_cannot_be_saved(subject: Subject) -> None:
    async with opened(subject) as engine:
        require(await engine.save("never seen", subject.folder / "nothing") == 0)
        require(not (subject.folder / "nothing").exists())


@check("keeps")
async def a_state_that_cannot_be_written_is_an_error_and_leaves_nothing(subject: Subject) -> None:
    async with opened(subject) as engine:
        await collect(engine, subject.ask(subject.prompts[0], 4))
        error = await refusal_of(engine.save("s", subject.folder / "no such folder" / "state"))
        require(isinstance(error, EngineError) and "no such folder" in str(error), error)
        (subject.folder / "taken").mkdir(exist_ok=True)
        before = sorted(subject.folder.iterdir())
        await refusal_of(engine.save("s", subject.folder / "taken"))
        require(sorted(subject.folder.iterdir()) == before)


CHECKS: tuple[Check, ...] = (
    the_first_chunk_says_how_much_of_the_prompt_was_not_computed,
    a_restored_session_goes_on_as_if_it_had_never_left,
    a_restored_state_of_other_tokens_is_not_used,
    a_damaged_file_is_no_state_and_the_tokens_are_the_same,
    a_state_of_other_weights_is_not_restored,
    a_state_kept_over_an_update_is_restored_for_its_newest_weights,
    a_running_session_can_be_saved_and_stays_as_it_is,
    what_nobody_kept_cannot_be_saved,
    a_state_that_cannot_be_written_is_an_error_and_leaves_nothing,
)
