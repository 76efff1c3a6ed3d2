"""Checks of what is drawn: the same always, whoever else asks and whatever was kept."""

# ruff: noqa: D103  (a check is described by its name)

from __future__ import annotations

import asyncio
from contextlib import aclosing
from typing import Any

from dsec.conformance.check import require
from rollout.conformance.check import (
    WARM,
    Check,
    Subject,
    Taker,
    after,
    check,
    chunks_of,
    collect,
    opened,
    refusal_of,
    settled,
)
from rollout.engine import EngineInfo, Sampled, Sampling, TopLogprobs
from rollout.errors import EngineError, RequestError

PLAIN = Sampling(temperature=1.0, seed=9)


@check()
async def info_names_the_weights_and_the_build(subject: Subject) -> None:
    async with opened(subject) as engine:
        info = engine.info
        require(info.name and info.build and len(info.weights_digest) == 64, info)
        require(info.vocab_count > max(map(max, subject.prompts)) and info.context_tokens_max >= 512, info)
        require(info.policy_version == 0 and not engine.is_paused, info)


@check()
async def an_engine_says_why_nothing_can_be_drawn_and_nothing_while_it_can(subject: Subject) -> None:
    async with opened(subject) as engine:
        require(engine.failure == "", engine.failure)
        await engine.pause("keep")
        require(engine.failure == "", engine.failure)
        await engine.close()
        require(engine.failure != "", "no words of a closed engine")
        await engine.open()
        require(engine.failure == "", engine.failure)


@check()
async def an_output_ends_with_a_stop_id_or_at_its_length(subject: Subject) -> None:
    async with opened(subject) as engine:
        short = await collect(engine, subject.ask(subject.prompts[0], 5))
        require((len(short.token_ids), short.finish) == (5, "length"), short)
        stop = short.token_ids[2]
        stopped = await collect(engine, subject.ask(subject.prompts[0], 5, frozenset({stop})))
        count = short.token_ids.index(stop) + 1
        expected = Sampled(token_ids=short.token_ids[:count], logprobs=short.logprobs[:count], finish="stop")
        require(subject.same(stopped, expected), (stopped, expected))


@check()
async def a_request_gives_the_same_again_whatever_was_kept(subject: Subject) -> None:
    async with opened(subject) as engine:
        first = await collect(engine, subject.ask(subject.prompts[0], 20))
        other = await collect(engine, subject.ask(subject.prompts[0], 20, session="other"))
        await engine.release("s")
        await engine.release("never seen")
        again = await collect(engine, subject.ask(subject.prompts[0], 20))
        require(subject.same(first, other, again), (first, other, again))


@check()
async def requests_do_not_notice_each_other(subject: Subject) -> None:
    async with opened(subject) as engine:
        requests = [
            subject.ask(
                prompt,
                6 + 3 * i,
                session=f"s{i}",
                stream_key=i,
                sampling=subject.repeatable(Sampling(temperature=i / 4)),
            )
            for i, prompt in enumerate(subject.prompts)
        ]
        alone = [await collect(engine, request) for request in requests]
        for request in requests:
            await engine.release(request.session)
        together = await asyncio.gather(*(collect(engine, request) for request in requests))
        require(all(map(subject.same, together, alone)), (together, alone))


@check()
async def continuing_after_any_prefix_of_the_output_yields_the_rest(subject: Subject) -> None:
    prompt = subject.vague or subject.prompts[0]
    async with opened(subject) as engine:
        whole = await collect(engine, subject.ask(prompt, 16))
        for cut in range(1, 16):
            rest = await collect(engine, subject.ask(prompt + whole.token_ids[:cut], 16 - cut))
            require(subject.same(rest, after(whole, cut)), (cut, rest))


@check("draws")
async def samples_of_one_prompt_differ_by_their_stream_and_from_the_greedy_one(subject: Subject) -> None:
    async with opened(subject) as engine:
        greedy = subject.ask(subject.vague, 12, sampling=Sampling())
        requests = [
            greedy,
            *(subject.ask(subject.vague, 12, session=f"s{i}", stream_key=i, sampling=WARM) for i in range(4)),
        ]
        outputs = await asyncio.gather(*(collect(engine, request) for request in requests))
        require(len({output.token_ids for output in outputs}) == 5, outputs)


@check()
async def closing_the_iterator_early_disturbs_no_other_request(subject: Subject) -> None:
    async with opened(subject) as engine:
        expected = await collect(engine, subject.ask(subject.prompts[0], 20, session="a"))
        other = asyncio.create_task(collect(engine, subject.ask(subject.prompts[0], 20, session="a")))
        async with aclosing(engine.sample(subject.ask(subject.prompts[1], 1000, session="b"))) as chunks:
            async for _ in chunks:
                break
        require(subject.same(await other, expected))


@check("keeps")
async def a_stream_that_is_closed_early_draws_no_more(subject: Subject) -> None:
    path, asked = subject.folder / "state", subject.ask(subject.prompts[1], 1000, session="closed")
    async with opened(subject) as engine:
        other = Taker(engine, subject.ask(subject.prompts[1], 20, session="other"))
        await other.task
        async with aclosing(engine.sample(asked)) as chunks:
            await anext(chunks)
        await settled(other)
        covered = await engine.save("closed", path)
        await settled(other)
        again = await engine.save("closed", path)
        require(covered == again, f"its state grew from {covered} to {again} tokens")


@check()
async def a_cancelled_consumer_leaves_the_engine_usable(subject: Subject) -> None:
    async with opened(subject) as engine:
        for has_begun in (False, True):
            taker = Taker(engine, subject.ask(subject.prompts[1], 1000))
            await (taker.begun() if has_begun else asyncio.sleep(0))
            taker.task.cancel()
            await asyncio.wait([taker.task])
            require(taker.task.cancelled(), "a cancelled consumer is told something else")
            require((await collect(engine, subject.ask(subject.prompts[0], 3))).finish == "length")


@check("draws", "fills")
async def a_context_that_fills_up_ends_with_length(subject: Subject) -> None:
    async with opened(subject) as engine:
        room = engine.info.context_tokens_max - 4
        prompt = (subject.prompts[0] * (1 + room // len(subject.prompts[0])))[-room:]
        output = await collect(engine, subject.ask(prompt, 50))
        require((len(output.token_ids), output.finish) == (4, "length"), output)


@check()
async def a_request_that_can_never_run_is_refused_by_the_name_of_its_field(subject: Subject) -> None:
    async with opened(subject) as engine:
        for change, named in _never(engine.info):
            arguments: dict[str, Any] = {"token_ids": subject.prompts[0], "count": 3} | change
            error = await refusal_of(collect(engine, subject.ask(**arguments)))
            require(isinstance(error, RequestError) and named in str(error), (str(change)[:200], error))


def _never(info: EngineInfo) -> tuple[tuple[dict[str, Any], str], ...]:
    """What makes a request one that such an engine can never carry out, and the field that it must name."""
    return (
        ({"token_ids": ()}, "token_ids"),
        ({"token_ids": (0, -1)}, "token_ids"),
        ({"token_ids": (0, info.vocab_count)}, "token_ids"),
        ({"token_ids": (5,) * info.context_tokens_max}, "token_ids"),
        ({"token_ids": (5,) * (info.context_tokens_max + 1)}, "token_ids"),
        ({"count": 0}, "tokens_count_max"),
        ({"sampling": Sampling(temperature=-0.1)}, "temperature"),
        ({"sampling": Sampling(temperature=float("nan"))}, "temperature"),
        ({"sampling": Sampling(temperature=1e-9)}, "temperature"),
        ({"sampling": Sampling(temperature=1.0, top_p=0.0)}, "top_p"),
        ({"sampling": Sampling(temperature=1.0, top_p=1.1)}, "top_p"),
        ({"sampling": Sampling(temperature=1.0, top_k=-1)}, "top_k"),
        ({"sampling": Sampling(temperature=1.0, top_k=(1 << 32) + 1)}, "top_k"),
        ({"stop_ids": frozenset({info.vocab_count})}, "stop_ids"),
        ({"stop_ids": frozenset(range(17))}, "stop_ids"),
        ({"top_logprobs_count": -1}, "top_logprobs_count"),
        ({"top_logprobs_count": 33}, "top_logprobs_count"),
    )


@check()
async def closing_the_engine_ends_what_runs_and_refuses_what_comes(subject: Subject) -> None:
    async with opened(subject) as engine:
        running = [Taker(engine, subject.ask(prompt, 1500, session=str(i))) for i, prompt in enumerate(subject.prompts)]
        await running[0].begun()
        late = Taker(engine, subject.ask(subject.prompts[0], 1500, session="late"))
        await asyncio.sleep(0)
        await engine.close()
        for taker in (*running, late):
            require(isinstance(await refusal_of(taker.task), EngineError))
        require(isinstance(await refusal_of(collect(engine, subject.ask(subject.prompts[0], 1))), EngineError))
        await engine.close()


@check()
async def an_engine_opens_again_after_it_was_closed(subject: Subject) -> None:
    async with opened(subject) as engine:
        before = await collect(engine, subject.ask(subject.prompts[0], 4))
        await engine.close()
        await engine.open()
        require(subject.same(await collect(engine, subject.ask(subject.prompts[0], 4)), before))


@check()
async def a_score_is_what_sampling_reports(subject: Subject) -> None:
    prompt = subject.vague or subject.prompts[0]
    async with opened(subject) as engine:
        drawn = await collect(engine, subject.ask(prompt, 16, sampling=PLAIN))
        scored = await engine.score(prompt + drawn.token_ids)
        require(subject.close(scored.logprobs[len(prompt) - 1 :], drawn.logprobs), (scored, drawn))
        require(len(scored.logprobs) == len(prompt) + 15 and scored.top_logprobs == (), scored)
        require((await engine.score(prompt[:1])).logprobs == ())


@check()
async def the_hidden_states_of_a_score_are_those_of_sampling_or_refused(subject: Subject) -> None:
    prompt = subject.vague or subject.prompts[0]
    async with opened(subject) as engine:
        if not engine.info.hidden_dim:
            error = await refusal_of(engine.score(prompt, returns_hidden=True))
            require(isinstance(error, RequestError) and "returns_hidden" in str(error), error)
            return
        chunks = await chunks_of(engine, subject.ask(prompt, 16, returns_hidden=True))
        output = tuple(i for chunk in chunks for i in chunk.token_ids)
        scored = await engine.score(prompt + output, returns_hidden=True)
        require(len(scored.hidden) == len(scored.logprobs), scored)
        told = b"".join(scored.hidden[len(prompt) - 1 :])
        require("exact" not in subject.traits or told == b"".join(chunk.hidden for chunk in chunks), scored)
        require((await engine.score(prompt + output)).hidden == ())


@check()
async def scores_and_samples_do_not_notice_each_other(subject: Subject) -> None:
    async with opened(subject) as engine:
        alone = (await collect(engine, subject.ask(subject.prompts[0], 12)), await engine.score(subject.prompts[1]))
        await engine.release("s")
        other = asyncio.create_task(engine.score(subject.prompts[2]))
        together = await asyncio.gather(
            collect(engine, subject.ask(subject.prompts[0], 12)), engine.score(subject.prompts[1])
        )
        require(subject.same(together[0], alone[0]) and subject.close(together[1].logprobs, alone[1].logprobs))
        require(len((await other).logprobs) == len(subject.prompts[2]) - 1)


@check()
async def a_score_that_can_never_be_is_refused_by_the_name_of_its_field(subject: Subject) -> None:
    async with opened(subject) as engine:
        too_long = (5,) * (engine.info.context_tokens_max + 1)
        for token_ids, count in (((), 0), ((0, engine.info.vocab_count), 0), (too_long, 0), ((0, 5), 33)):
            error = await refusal_of(engine.score(token_ids, top_logprobs_count=count))
            named = "top_logprobs_count" if count else "token_ids"
            require(isinstance(error, RequestError) and named in str(error), error)


@check()
async def the_likeliest_tokens_come_with_each_token_if_asked_for(subject: Subject) -> None:
    prompt = subject.vague or subject.prompts[0]
    async with opened(subject) as engine:
        chunks = await chunks_of(engine, subject.ask(prompt, 12, sampling=PLAIN, top_logprobs_count=3))
        rows = [row for chunk in chunks for row in chunk.top_logprobs]
        output = Sampled(
            token_ids=tuple(i for chunk in chunks for i in chunk.token_ids),
            logprobs=tuple(p for chunk in chunks for p in chunk.logprobs),
        )
        require(len(rows) == 12)
        for token_id, logprob, row in zip(output.token_ids, output.logprobs, rows, strict=True):
            require(1 <= len(row.token_ids) == len(row.logprobs) <= 3, row)
            require(_is_in_order(row), row)
            require(dict(zip(row.token_ids, row.logprobs, strict=True)).get(token_id, logprob) == logprob, row)
            require(logprob <= row.logprobs[0], row)
        scored = await engine.score(prompt + output.token_ids, top_logprobs_count=3)
        require(all(map(_is_in_order, scored.top_logprobs)), scored)
        told = [top.logprobs for top in scored.top_logprobs[len(prompt) - 1 :]]
        require(all(map(subject.close, told, (row.logprobs for row in rows))) and len(told) == 12, scored)


def _is_in_order(row: TopLogprobs) -> bool:
    """The likeliest first, equal ones by id."""
    ranks = [(-logprob, token_id) for token_id, logprob in zip(row.token_ids, row.logprobs, strict=True)]
    return ranks == sorted(ranks)


@check("draws", "masks")
async def a_mask_holds_what_a_cut_kept_and_the_token_that_was_drawn(subject: Subject) -> None:
    async with opened(subject) as engine:
        for sampling in (Sampling(temperature=1.5, top_k=5, seed=1), Sampling(temperature=1.5, top_p=0.3, seed=1)):
            asked = subject.ask(subject.vague, 8, sampling=sampling, returns_mask=True, top_logprobs_count=32)
            chunks = await chunks_of(engine, asked)
            ids, masks = [i for c in chunks for i in c.token_ids], [m for c in chunks for m in c.masks]
            rows: list[TopLogprobs] = [row for chunk in chunks for row in chunk.top_logprobs]
            require(len(masks) == len(ids) == 8)
            for token_id, mask, row in zip(ids, masks, rows, strict=True):
                require(token_id in mask and list(mask) == sorted(set(mask)), mask)
                require(len(mask) == 5 or not sampling.top_k, mask)
                require(set(row.token_ids) <= set(mask) and len(row.token_ids) == min(32, len(mask)), (row, mask))
        plain = await chunks_of(engine, subject.ask(subject.vague, 4, sampling=PLAIN, returns_mask=True))
        require(all(chunk.masks == () for chunk in plain), plain)


@check()
async def side_channels_are_of_each_token_once_however_the_output_is_cut(subject: Subject) -> None:
    prompt = subject.prompts[0]
    async with opened(subject) as engine:
        routing, dim = engine.info.routing, engine.info.hidden_dim
        asked: dict[str, Any] = {"returns_routes": routing is not None, "returns_hidden": dim > 0}
        await collect(engine, subject.ask(prompt, 3, session="before"))  # of whose state nobody would tell the routes
        whole = await chunks_of(engine, subject.ask(prompt, 12, session="whole", **asked))
        drawn = tuple(token_id for chunk in whole for token_id in chunk.token_ids)
        parts = await chunks_of(engine, subject.ask(prompt, 5, **asked))
        parts += await chunks_of(engine, subject.ask(prompt + drawn[:5], 7, **asked))
        await engine.release("s")
        again = await chunks_of(engine, subject.ask(prompt + drawn[:5], 7, **asked))
        if routing is not None:
            rows = _routes_of(whole, routing.row_bytes)
            require(sorted(rows) == list(range(len(prompt) + len(drawn) - 1)), sorted(rows))
            require(_routes_of(parts, routing.row_bytes) == _routes_of(again, routing.row_bytes) == rows)
        hidden = b"".join(chunk.hidden for chunk in whole)
        require(len(hidden) == 2 * dim * len(drawn) and hidden == b"".join(chunk.hidden for chunk in parts))
        require(hidden[2 * dim * 5 :] == b"".join(chunk.hidden for chunk in again))
        plain = await chunks_of(engine, subject.ask(prompt, 4))
        require(all(chunk.routes is None and not chunk.hidden for chunk in plain), plain)


def _routes_of(chunks: list[Sampled], row_bytes: int) -> dict[int, bytes]:
    """By position of the token; what was computed again must be the same."""
    rows: dict[int, bytes] = {}
    for routes in (chunk.routes for chunk in chunks if chunk.routes is not None):
        for at in range(0, len(routes.expert_ids), row_bytes):
            position, row = routes.start + at // row_bytes, routes.expert_ids[at : at + row_bytes]
            require(len(row) == row_bytes and rows.setdefault(position, row) == row, position)
    return rows


CHECKS: tuple[Check, ...] = (
    info_names_the_weights_and_the_build,
    an_engine_says_why_nothing_can_be_drawn_and_nothing_while_it_can,
    an_output_ends_with_a_stop_id_or_at_its_length,
    a_request_gives_the_same_again_whatever_was_kept,
    requests_do_not_notice_each_other,
    continuing_after_any_prefix_of_the_output_yields_the_rest,
    samples_of_one_prompt_differ_by_their_stream_and_from_the_greedy_one,
    closing_the_iterator_early_disturbs_no_other_request,
    a_stream_that_is_closed_early_draws_no_more,
    a_cancelled_consumer_leaves_the_engine_usable,
    a_context_that_fills_up_ends_with_length,
    a_request_that_can_never_run_is_refused_by_the_name_of_its_field,
    closing_the_engine_ends_what_runs_and_refuses_what_comes,
    an_engine_opens_again_after_it_was_closed,
    a_score_is_what_sampling_reports,
    the_hidden_states_of_a_score_are_those_of_sampling_or_refused,
    scores_and_samples_do_not_notice_each_other,
    a_score_that_can_never_be_is_refused_by_the_name_of_its_field,
    the_likeliest_tokens_come_with_each_token_if_asked_for,
    a_mask_holds_what_a_cut_kept_and_the_token_that_was_drawn,
    side_channels_are_of_each_token_once_however_the_output_is_cut,
)
