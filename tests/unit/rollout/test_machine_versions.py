"""The machine over preemptions, changes of weights, budgets of thinking, and prompts without an environment."""

import pytest

from rollout import context
from rollout.effects import Finish, Force, Sample
from rollout.engine import Routes, Sampled, TopLogprobs
from rollout.errors import MachineError
from rollout.events import (
    FinishReason,
    InfraFailed,
    KvBroke,
    Preempted,
    RolloutEvent,
    RolloutFinished,
    RolloutOpened,
    RolloutResumed,
    SandboxPrepared,
    SideChannelsFound,
    Spent,
    TokensForced,
    TopLogprobsFound,
)
from rollout.machine import TRANSITIONS, effect, side_channels, step
from rollout.record import version_runs
from rollout.request import Conversation, Limits
from rollout.state import KvBreak, Phase, State, start
from rollout.testing import ENGINE, Reply, job_of_one, opened, reply_ids, routes_row
from toolcall_dsl import V4, Tokenizer
from wal.tokens import TokensAppended

ID = "t.0"
LS = Reply(reasoning="Look around first.", calls=[("bash", {"command": "ls"})])


def prepared(tokenizer: Tokenizer, limits: Limits | None = None) -> State:
    job = job_of_one(limits=limits)
    return step(start(job, opened(tokenizer, job)), SandboxPrepared(ID, 0.1), tokenizer)


def draw(state: State, ids: tuple[int, ...], tokenizer: Tokenizer, version: int = 0) -> State:
    return step(state, TokensAppended(ID, state.tokens_count, ids, (-1.0,) * len(ids), version), tokenizer)


def conversation(tokenizer: Tokenizer, prompt: Conversation) -> State:
    job = job_of_one()
    segments = context.conversation_prompt(prompt, tokenizer, job.thinking)
    digest = tokenizer.digest
    return start(job, RolloutOpened(ID, "run", "t", 0, segments, digest, ENGINE, has_environment=False))


def test_each_version_of_the_weights_has_its_run_of_the_tokens_that_it_drew(tokenizer: Tokenizer) -> None:
    state, ids = prepared(tokenizer), reply_ids(LS, tokenizer)
    begin = state.tokens_count
    for version, part in ((3, ids[:4]), (3, ids[4:6]), (5, ids[6:])):
        state = draw(state, part, tokenizer, version)
    runs = version_runs(state, state.spans, {3: "three", 5: "five"})
    assert [(run.start - begin, run.length, run.version, run.weights_digest) for run in runs] == [
        (0, 6, 3, "three"),
        (6, len(ids) - 6, 5, "five"),
    ]


def test_a_preempted_rollout_wants_the_same_as_before_and_keeps_what_its_processes_spent(tokenizer: Tokenizer) -> None:
    state = draw(prepared(tokenizer), reply_ids(LS, tokenizer)[:4], tokenizer)
    stopped = step(state, Preempted(ID, "asked", 1.0, Spent(queue_s=2.0)), tokenizer)
    assert effect(stopped, tokenizer) == effect(state, tokenizer)
    assert (stopped.preempt_count, stopped.preempted is not None) == (1, True)
    resumed = step(stopped, RolloutResumed(ID, 2, state.tokens_count, None, "restored", 3.5), tokenizer)
    assert effect(resumed, tokenizer) == effect(state, tokenizer)
    assert (resumed.preempted, resumed.preempt_count, resumed.preempted_s) == (None, 1, 3.5)
    broken = step(resumed, KvBroke(ID, state.tokens_count, "kept"), tokenizer)
    assert broken.kv_breaks == (KvBreak(state.tokens_count, "restored"), KvBreak(state.tokens_count, "kept"))
    ended = step(broken, RolloutFinished(ID, FinishReason.CANCELLED, Spent(queue_s=1.0)), tokenizer)
    assert sum(spent.queue_s for spent in ended.spent) == 3.0


def test_a_failed_rollout_keeps_what_its_process_spent(tokenizer: Tokenizer) -> None:
    failed = step(prepared(tokenizer), InfraFailed(ID, "BAD_TASK", "caller", "no", Spent(decode_s=2.0)), tokenizer)
    resumed = step(failed, RolloutResumed(ID, 2, failed.tokens_count, None, "rebuilt"), tokenizer)
    ended = step(resumed, RolloutFinished(ID, FinishReason.CANCELLED, Spent(decode_s=1.0)), tokenizer)
    assert sum(spent.decode_s for spent in ended.spent) == 3.0


def test_thinking_at_its_budget_is_closed_by_a_token_that_nobody_trains_on(tokenizer: Tokenizer) -> None:
    state = prepared(tokenizer, Limits(thinking_tokens_count_max=4))
    wanted, close = effect(state, tokenizer), tokenizer.control(V4.think_close)
    assert isinstance(wanted, Sample)
    assert wanted.request.tokens_count_max == 4
    thought = reply_ids(LS, tokenizer)
    assert close not in thought[:4]
    state = draw(state, thought[:4], tokenizer)
    assert effect(state, tokenizer) == Force(state.tokens_count, (close,))
    begin = state.tokens_count
    state = step(state, TokensForced(ID, begin, (close,)), tokenizer)
    assert isinstance(effect(state, tokenizer), Sample)
    rest = thought[thought.index(close) + 1 :]
    state = draw(state, rest, tokenizer)
    assert state.phase is Phase.TOOLS
    forced = [span for span in state.spans if span.kind == "FORCED"]
    assert [(span.start, span.length, span.trainable) for span in forced] == [(begin, 1, False)]
    trainable = sum(span.length for span in state.spans if span.trainable)
    assert trainable == len(state.logprobs) == state.sampled_count == 4 + len(rest)
    assert sum(span.length for span in state.spans) == len(state.token_ids)


def test_the_likeliest_tokens_of_a_chunk_that_a_crash_kept_from_the_log_come_again(tokenizer: Tokenizer) -> None:
    state, ids = prepared(tokenizer), reply_ids(LS, tokenizer)
    tops = tuple(TopLogprobs((token,), (-1.0,)) for token in ids)
    for begin, end in ((0, 4), (4, 6)):
        state = step(state, TopLogprobsFound(ID, state.tokens_count, tops[begin:end]), tokenizer)
        state = draw(state, ids[begin:end], tokenizer)
    lost = step(state, TopLogprobsFound(ID, state.tokens_count, tops[6:9]), tokenizer)
    assert effect(lost, tokenizer) == effect(state, tokenizer)
    again = step(lost, TopLogprobsFound(ID, state.tokens_count, tops[6:7]), tokenizer)
    assert draw(again, ids[6:7], tokenizer).top_logprobs == tops[:7]
    with pytest.raises(MachineError, match="the context ends at"):
        step(state, TopLogprobsFound(ID, 0, tops[:1]), tokenizer)


def test_side_channels_are_logged_once_and_again_only_where_a_crash_fell_before_their_tokens(
    tokenizer: Tokenizer,
) -> None:
    state, ids = prepared(tokenizer), reply_ids(LS, tokenizer)
    count = state.tokens_count

    def told(state: State, at: int, end: int, since: int) -> SideChannelsFound:
        """Of drawn tokens `at` to `end`, by an engine that read everything from position `since` on."""
        routes = Routes(since, b"".join(routes_row(i) for i in range(since, count + end - 1)))
        masks = tuple((token,) for token in ids[at:end])
        return side_channels(state, Sampled(token_ids=ids[at:end], logprobs=(), masks=masks, routes=routes))

    first = told(state, 0, 4, 0)
    assert first.routes == Routes(0, b"".join(map(routes_row, range(count + 3))))
    state = draw(step(state, first, tokenizer), ids[:4], tokenizer)
    assert (state.routes_end, state.masks) == (count + 3, first.masks)
    lost = step(state, told(state, 4, 7, count + 3), tokenizer)
    assert lost.routes_end == count + 6
    again = told(lost, 4, 6, 0)  # the engine read everything anew; of that the log has all but this
    assert again.routes == Routes(count + 3, b"".join(map(routes_row, range(count + 3, count + 5))))
    state = draw(step(lost, again, tokenizer), ids[4:6], tokenizer)
    assert (state.routes_end, len(state.masks)) == (count + 5, 6)
    twice = SideChannelsFound(ID, state.tokens_count, 0, routes=Routes(0, routes_row(0)))
    with pytest.raises(MachineError, match="routes logged again from position 0"):
        step(state, twice, tokenizer)


def test_a_budget_over_all_turns_ends_the_agent(tokenizer: Tokenizer) -> None:
    state = prepared(tokenizer, Limits(sampled_tokens_count_max=3))
    wanted = effect(state, tokenizer)
    assert isinstance(wanted, Sample)
    assert wanted.request.tokens_count_max == 3
    state = draw(state, reply_ids(LS, tokenizer)[:3], tokenizer)
    assert (state.phase, state.reason) == (Phase.JUDGE, FinishReason.LENGTH_CONTEXT)


@pytest.mark.parametrize(
    ("reply", "reason"),
    [(LS, FinishReason.TOOL_CALLS), (Reply(reasoning="x", content="Hello."), FinishReason.STOP)],
)
def test_a_conversation_is_one_turn_whose_calls_are_the_callers(
    tokenizer: Tokenizer, reply: Reply, reason: FinishReason
) -> None:
    prompt = Conversation(name="c", digest="d", messages_json='[{"role":"user","content":"Hi"}]')
    state = conversation(tokenizer, prompt)
    assert isinstance(effect(state, tokenizer), Sample)
    state = draw(state, reply_ids(reply, tokenizer), tokenizer)
    assert effect(state, tokenizer) == Finish(reason)


def test_a_malformed_turn_of_a_conversation_ends_it_as_parse_failed(tokenizer: Tokenizer) -> None:
    state = conversation(tokenizer, Conversation(name="c", digest="d", token_ids=(0, 5, 7)))
    assert state.token_ids == (0, 5, 7)
    broken = (*reply_ids(LS, tokenizer)[:-8], tokenizer.control(V4.eos))
    assert effect(draw(state, broken, tokenizer), tokenizer) == Finish(FinishReason.PARSE_FAILED)


def test_every_event_of_a_rollout_has_its_row_and_comes_in_no_other_phase(tokenizer: Tokenizer) -> None:
    assert {RolloutOpened, *TRANSITIONS} == set(RolloutEvent.__args__)
    state = prepared(tokenizer)
    ended = step(state, RolloutFinished(ID, FinishReason.CANCELLED), tokenizer)
    for event in (SandboxPrepared(ID, 0.1), TokensForced(ID, 0, (1,)), Preempted(ID, "", 0.0, Spent())):
        with pytest.raises(MachineError, match="does not fit phase done"):
            step(ended, event, tokenizer)
