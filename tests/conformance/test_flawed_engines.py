"""A check that cannot fail is none: engines with one flaw each, and the check that must name it."""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from pathlib import Path
from typing import Any

import msgspec
import pytest

from dsec.conformance.check import outcome_of
from rollout.conformance.check import Subject
from rollout.conformance.suite import ENGINE_CHECKS, check_engine, checks_for
from rollout.engine import Announce, EngineInfo, PauseMode, Sampled, SampleRequest, Scored, TopLogprobs
from rollout.errors import EngineError, PreemptedError
from rollout.testing import ENGINE, ScriptedEngine
from tests.conformance.test_engine import TOKENIZER, other_script, scripted, story

TOKEN_S = 0.002
"""As behind a network: nothing comes in the same turn of the loop."""
CHECKS = {check.name: check for check in ENGINE_CHECKS}
CONTEXT_TOKENS_MAX = 1 << 13


class Told(ScriptedEngine):
    """Says what the story says, a few tokens at a time."""

    def __init__(self) -> None:
        super().__init__(TOKENIZER, story, chunk_tokens_count=3)


class Slow(Told):
    async def sample(self, request: SampleRequest) -> AsyncGenerator[Sampled, None]:
        async with aclosing(super().sample(request)) as chunks:
            async for chunk in chunks:
                await asyncio.sleep(TOKEN_S)
                yield chunk


class PausesInNameOnly(Slow):
    says_paused = False

    @property
    def is_paused(self) -> bool:
        return self.says_paused

    async def pause(self, mode: PauseMode) -> None:
        self.says_paused = True

    async def resume(self) -> None:
        self.says_paused = False


class BeginsInAPause(Slow):
    async def sample(self, request: SampleRequest) -> AsyncGenerator[Sampled, None]:
        if self.is_paused:
            await asyncio.sleep(TOKEN_S)
            yield Sampled(token_ids=self._rest(request)[:1], logprobs=(-0.5,))
        async with aclosing(super().sample(request)) as chunks:
            async for chunk in chunks:
                yield chunk


class KeepsItsFirstPause(Slow):
    async def pause(self, mode: PauseMode) -> None:
        if not self.is_paused:
            await super().pause(mode)


class ScoresNothingInAPause(Told):
    async def score(
        self, token_ids: Sequence[int], *, top_logprobs_count: int = 0, returns_hidden: bool = False
    ) -> Scored:
        if self.is_paused:
            raise EngineError("paused")
        return await super().score(token_ids, top_logprobs_count=top_logprobs_count, returns_hidden=returns_hidden)


class PreemptsScoresInAnyPause(ScoresNothingInAPause):
    async def score(self, token_ids: Sequence[int], **asked: Any) -> Scored:
        try:
            return await super().score(token_ids, **asked)
        except EngineError as error:
            raise PreemptedError(str(error)) from error


class NeverFails(Told):
    @property
    def failure(self) -> str:
        return ""


class FailsInAPause(Told):
    @property
    def failure(self) -> str:
        return "paused" if self.is_paused else super().failure


class ForgetsItsFolder(Told):
    async def update(self, checkpoint: Path, policy_version: int, announce: Announce | None = None) -> EngineInfo:
        before = self.checkpoint
        info = await super().update(checkpoint, policy_version, announce)
        self.checkpoint = before
        return info


class PinsForGood(Told):
    def sample(self, request: SampleRequest) -> AsyncGenerator[Sampled, None]:
        known = self._sessions.get(request.session)
        is_pinned = known is not None and known.on_update == "pin"
        return super().sample(msgspec.structs.replace(request, on_update="pin") if is_pinned else request)


class DisordersTies(Told):
    async def sample(self, request: SampleRequest) -> AsyncGenerator[Sampled, None]:
        async for chunk in super().sample(request):
            rows = tuple(TopLogprobs((token + 1, token), (-0.5, -0.5)) for token in chunk.token_ids)
            yield msgspec.structs.replace(chunk, top_logprobs=rows if request.top_logprobs_count else ())


class DisordersTiesOfScores(Told):
    async def score(self, token_ids: Sequence[int], *, top_logprobs_count: int = 0, **asked: Any) -> Scored:
        told = await super().score(token_ids, top_logprobs_count=top_logprobs_count, **asked)
        rows = tuple(TopLogprobs((token + 1, token), (-0.5, -0.5)) for token in token_ids[1:])
        return msgspec.structs.replace(told, top_logprobs=rows if top_logprobs_count else ())


class DrawsForNobody(Slow):
    """What was begun is drawn to its end, whoever left, a token at a time."""

    def __init__(self) -> None:
        super().__init__()
        self._chunk_tokens_count = 1

    async def sample(self, request: SampleRequest) -> AsyncGenerator[Sampled, None]:
        drawn: asyncio.Queue[Sampled | None] = asyncio.Queue()
        source = super().sample(request)

        async def draw() -> None:
            async for chunk in source:
                await asyncio.sleep(4 * TOKEN_S)  # to its end it takes far longer than a stall of the host
                drawn.put_nowait(chunk)
            drawn.put_nowait(None)

        self.drawing = asyncio.create_task(draw())
        while (chunk := await drawn.get()) is not None:
            yield chunk

    async def close(self) -> None:
        self.drawing.cancel()
        await super().close()


class SwallowsACancel(Slow):
    async def sample(self, request: SampleRequest) -> AsyncGenerator[Sampled, None]:
        try:
            async for chunk in super().sample(request):
                yield chunk
        except asyncio.CancelledError:
            return


class FinishesBeforeItCloses(Slow):
    async def close(self) -> None:
        await self._until(lambda: not self._running)
        await super().close()


class TakesAnyToken(Told):
    def sample(self, request: SampleRequest) -> AsyncGenerator[Sampled, None]:
        known = tuple(min(token, ENGINE.vocab_count - 1) for token in request.token_ids)
        return super().sample(msgspec.structs.replace(request, token_ids=known))


class Short(Told):
    """Its context can be filled."""

    def __init__(self) -> None:
        super().__init__()
        self._info = msgspec.structs.replace(ENGINE, context_tokens_max=CONTEXT_TOKENS_MAX)


class StopsWhereItIsFull(Short):
    async def sample(self, request: SampleRequest) -> AsyncGenerator[Sampled, None]:
        async for chunk in super().sample(request):
            is_full = len(request.token_ids) + request.tokens_count_max > CONTEXT_TOKENS_MAX
            yield msgspec.structs.replace(chunk, finish="stop") if is_full and chunk.finish else chunk


FLAWS: tuple[tuple[type[Told], str], ...] = (
    (PausesInNameOnly, "a_paused_engine_stands_still_between_two_tokens_and_goes_on"),
    (PausesInNameOnly, "a_pause_that_waits_lets_running_requests_finish_and_starts_no_other"),
    (PausesInNameOnly, "a_pause_that_aborts_hands_over_what_was_drawn_and_then_says_so"),
    (PausesInNameOnly, "a_paused_request_can_be_preempted"),
    (PausesInNameOnly, "an_engine_closes_while_it_is_paused_and_opens_to_run"),
    (BeginsInAPause, "a_paused_engine_stands_still_between_two_tokens_and_goes_on"),
    (BeginsInAPause, "a_pause_that_waits_lets_running_requests_finish_and_starts_no_other"),
    (BeginsInAPause, "a_pause_that_aborts_hands_over_what_was_drawn_and_then_says_so"),
    (BeginsInAPause, "a_paused_request_can_be_preempted"),
    (BeginsInAPause, "a_later_pause_changes_the_mode_of_an_earlier_one"),
    (BeginsInAPause, "an_engine_closes_while_it_is_paused_and_opens_to_run"),
    (KeepsItsFirstPause, "a_later_pause_changes_the_mode_of_an_earlier_one"),
    (ScoresNothingInAPause, "a_score_outlasts_a_pause_or_is_preempted_by_one_that_aborts"),
    (PreemptsScoresInAnyPause, "a_score_outlasts_a_pause_or_is_preempted_by_one_that_aborts"),
    (NeverFails, "an_engine_says_why_nothing_can_be_drawn_and_nothing_while_it_can"),
    (FailsInAPause, "an_engine_says_why_nothing_can_be_drawn_and_nothing_while_it_can"),
    (ForgetsItsFolder, "the_checkpoint_is_the_folder_of_the_weights_that_draw"),
    (PinsForGood, "a_pin_holds_until_the_next_request_of_its_session"),
    (DisordersTies, "the_likeliest_tokens_come_with_each_token_if_asked_for"),
    (DisordersTiesOfScores, "the_likeliest_tokens_come_with_each_token_if_asked_for"),
    (DrawsForNobody, "a_stream_that_is_closed_early_draws_no_more"),
    (SwallowsACancel, "a_cancelled_consumer_leaves_the_engine_usable"),
    (FinishesBeforeItCloses, "closing_the_engine_ends_what_runs_and_refuses_what_comes"),
    (TakesAnyToken, "a_request_that_can_never_run_is_refused_by_the_name_of_its_field"),
    (StopsWhereItIsFull, "a_context_that_fills_up_ends_with_length"),
    (Told, "weights_of_another_shape_are_refused_and_change_nothing"),
)


def subject_of(engine: type[Told], folder: Path, **more: Any) -> Subject:
    """Of such engines; `more` are fields of Subject."""
    return msgspec.structs.replace(scripted(folder), make=engine, **more)


@pytest.mark.parametrize(("engine", "name"), FLAWS, ids=lambda each: getattr(each, "__name__", each))
async def test_a_flaw_is_named_by_its_check(tmp_path: Path, engine: type[Told], name: str) -> None:
    subject = subject_of(engine, tmp_path, misfit=lambda: other_script(tmp_path, 9))
    hangs = engine is KeepsItsFirstPause
    outcome = await outcome_of(name, CHECKS[name].run(subject), 3.0 if hangs else 120.0)
    assert outcome.problem.partition(":")[0] == ("TimeoutError" if hangs else "NotConformingError")


@pytest.mark.parametrize("name", sorted({name for _, name in FLAWS} - {FLAWS[-1][1]}))
async def test_the_same_check_passes_an_engine_that_is_slow_or_short_and_nothing_else(
    tmp_path: Path, name: str
) -> None:
    engine = Short if name == "a_context_that_fills_up_ends_with_length" else Slow
    assert (await outcome_of(name, CHECKS[name].run(subject_of(engine, tmp_path)), 120.0)).problem == ""


async def test_weights_of_another_shape_must_be_given_or_their_trait_left_out(tmp_path: Path) -> None:
    check = CHECKS["weights_of_another_shape_are_refused_and_change_nothing"]
    outcome = await outcome_of(check.name, check.run(subject_of(Told, tmp_path)), 120.0)
    assert outcome.problem.startswith("NotConformingError: Subject.misfit makes no such weights")


class Broken(Told):
    async def sample(self, request: SampleRequest) -> AsyncGenerator[Sampled, None]:
        raise IndexError("list index out of range")
        yield


class Silent(Told):
    async def sample(self, request: SampleRequest) -> AsyncGenerator[Sampled, None]:
        await asyncio.Event().wait()
        yield


class HoldsOn(Silent):
    """It cannot even be closed."""

    async def close(self) -> None:
        await asyncio.Event().wait()


async def test_an_engine_that_raises_what_it_likes_has_an_outcome_of_every_check(tmp_path: Path) -> None:
    subject = subject_of(Broken, tmp_path)
    outcomes = {outcome.name: outcome.problem for outcome in await check_engine(subject)}
    assert list(outcomes) == [check.name for check in checks_for(subject)]
    assert outcomes["a_preempted_session_ends_alone"] == "IndexError: list index out of range"
    assert outcomes["a_request_gives_the_same_again_whatever_was_kept"] == "IndexError: list index out of range"
    assert outcomes["versions_grow_and_the_last_update_may_be_repeated"] == ""


@pytest.mark.parametrize("engine", [Silent, HoldsOn])
async def test_an_engine_that_hangs_has_an_outcome_of_every_check(tmp_path: Path, engine: type[Told]) -> None:
    subject = subject_of(engine, tmp_path, patience_s=0.05)
    outcomes = {outcome.name: outcome.problem for outcome in await check_engine(subject)}
    assert list(outcomes) == [check.name for check in checks_for(subject)]
    problem = outcomes["a_preempted_session_ends_alone"]
    assert problem.startswith("TimeoutError: it still waits after 0.05 s (pauses.py, line ")
