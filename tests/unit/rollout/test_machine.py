"""The machine: what each event makes of a rollout, and what is wanted then."""

import msgspec
import pytest

from rollout import context
from rollout.effects import ApplySolution, Finish, Judge, Prepare, RunTool, Sample
from rollout.errors import MachineError
from rollout.events import (
    AgentStopped,
    FinishReason,
    InfraFailed,
    Judged,
    RolloutFinished,
    RolloutResumed,
    SandboxPrepared,
    SolutionApplied,
    ToolFinished,
)
from rollout.machine import effect, is_current, step, stream_key
from rollout.record import version_runs
from rollout.request import Job, Limits
from rollout.state import Phase, State, start
from rollout.testing import ENGINE, Reply, job_of_one, opened, reply_ids
from toolcall_dsl import V4, Tokenizer, encode
from wal.tokens import TokensAppended

ID = "t.0"
LS = Reply(reasoning="Look.", calls=[("bash", {"command": "ls"})])
TWO = Reply(reasoning="Both.", calls=[("bash", {"command": "cat a"}), ("bash", {"command": "cat b"})])
DONE = Reply(reasoning="Good.", content="Removed a.txt.")


def begin(tokenizer: Tokenizer, job: Job) -> State:
    return start(job, opened(tokenizer, job))


def say(state: State, reply: Reply, tokenizer: Tokenizer, chunk: int = 1) -> State:
    ids = reply_ids(reply, tokenizer)
    for i in range(0, len(ids), chunk):
        part = ids[i : i + chunk]
        event = TokensAppended(ID, state.tokens_count, part, tuple(-0.25 for _ in part), 0)
        state = step(state, event, tokenizer)
    return state


def answer(state: State, index: int, text: str, tokenizer: Tokenizer) -> State:
    return step(state, ToolFinished(ID, index, text, 0, False, 0, 0.1), tokenizer)


def prepared(tokenizer: Tokenizer, **job: object) -> State:
    return step(begin(tokenizer, job_of_one(**job)), SandboxPrepared(ID, 0.1), tokenizer)


def test_a_rollout_first_wants_its_environment_then_tokens(tokenizer: Tokenizer) -> None:
    state = begin(tokenizer, job_of_one())
    assert effect(state, tokenizer) == Prepare()
    wanted = effect(step(state, SandboxPrepared(ID, 0.1), tokenizer), tokenizer)
    assert isinstance(wanted, Sample)
    assert wanted.request.token_ids == state.token_ids
    assert wanted.request.stream_key == stream_key(ID)
    assert wanted.request.stop_ids == {tokenizer.control(V4.eos)}


def test_the_whole_conversation_equals_the_official_encoding_of_its_messages(tokenizer: Tokenizer) -> None:
    state = say(prepared(tokenizer), TWO, tokenizer)
    state = answer(answer(state, 0, "1", tokenizer), 1, "(no output)", tokenizer)
    state = say(state, DONE, tokenizer)
    calls = [
        {"id": str(i), "type": "function", "function": {"name": "bash", "arguments": dict(arguments)}}
        for i, (_, arguments) in enumerate(TWO.calls)
    ]
    messages = [
        *context.messages("Remove the file a.txt."),
        {"role": "assistant", "content": "", "reasoning_content": "Both.", "tool_calls": calls},
        {"role": "tool", "tool_call_id": "0", "content": "1"},
        {"role": "tool", "tool_call_id": "1", "content": "(no output)"},
        {"role": "assistant", "content": "Removed a.txt.", "reasoning_content": "Good."},
    ]
    official = [t for segment in encode(messages, tokenizer, thinking=True) for t in segment.token_ids]
    assert list(state.token_ids) == official


def test_spans_cover_every_token_and_only_sampled_ones_are_trainable(tokenizer: Tokenizer) -> None:
    state = say(prepared(tokenizer), LS, tokenizer)
    state = say(answer(state, 0, "a.txt", tokenizer), DONE, tokenizer)
    position = 0
    for span in state.spans:
        assert span.start == position
        position += span.length
        assert span.trainable == span.kind.startswith("SAMPLED")
    assert position == len(state.token_ids)
    assert sum(span.length for span in state.spans if span.trainable) == len(state.logprobs) == state.sampled_count


@pytest.mark.parametrize("chunk", [1, 2, 7, 1000])
def test_how_tokens_were_chunked_leaves_no_trace(tokenizer: Tokenizer, chunk: int) -> None:
    assert say(prepared(tokenizer), LS, tokenizer, chunk) == say(prepared(tokenizer), LS, tokenizer, 3)


def test_calls_of_one_block_run_in_order_and_their_results_come_back_together(tokenizer: Tokenizer) -> None:
    state = say(prepared(tokenizer), TWO, tokenizer)
    first = effect(state, tokenizer)
    assert isinstance(first, RunTool)
    assert (first.call_index, first.call.arguments) == (0, {"command": "cat a"})
    before = state.token_ids
    state = answer(state, 0, "one", tokenizer)
    assert state.token_ids == before
    second = effect(state, tokenizer)
    assert isinstance(second, RunTool)
    assert (second.call_index, second.call.arguments) == (1, {"command": "cat b"})
    state = answer(state, 1, "two", tokenizer)
    added = tokenizer.decode(state.token_ids[len(before) :])
    assert added == ("<｜User｜><tool_result>one</tool_result>\n\n<tool_result>two</tool_result><｜Assistant｜><think>")


def test_a_final_answer_is_judged_and_then_the_rollout_finishes(tokenizer: Tokenizer) -> None:
    state = say(prepared(tokenizer), DONE, tokenizer)
    assert effect(state, tokenizer) == Judge("Removed a.txt.")
    state = step(state, Judged(ID, 1.0, {"reward": 1.0}, "v", 0.2), tokenizer)
    assert effect(state, tokenizer) == Finish(FinishReason.STOP)
    state = step(state, RolloutFinished(ID, FinishReason.STOP), tokenizer)
    assert effect(state, tokenizer) is None


def test_a_malformed_call_runs_nothing_and_the_model_is_told(tokenizer: Tokenizer) -> None:
    broken = [*reply_ids(LS, tokenizer)[:-8], tokenizer.control(V4.eos)]
    state = prepared(tokenizer)
    state = step(state, TokensAppended(ID, state.tokens_count, tuple(broken), (-1.0,) * len(broken), 0), tokenizer)
    assert state.turns[0].finish is FinishReason.PARSE_FAILED
    assert isinstance(effect(state, tokenizer), Sample)
    assert "<tool_result>error: " in tokenizer.decode(state.token_ids)
    assert state.calls == ()


def test_a_turn_at_its_token_bound_is_cut_and_its_call_never_runs(tokenizer: Tokenizer) -> None:
    state = prepared(tokenizer, limits=Limits(turn_tokens_count_max=5))
    wanted = effect(state, tokenizer)
    assert isinstance(wanted, Sample)
    assert wanted.request.tokens_count_max == 5
    ids = reply_ids(LS, tokenizer)[:5]
    state = step(state, TokensAppended(ID, state.tokens_count, ids, (-1.0,) * 5, 0), tokenizer)
    assert (state.phase, state.reason) == (Phase.JUDGE, FinishReason.LENGTH_TURN)
    assert state.calls == ()


def test_the_turn_limit_ends_the_agent_after_its_last_call_ran(tokenizer: Tokenizer) -> None:
    state = say(prepared(tokenizer, limits=Limits(turns_count_max=1)), LS, tokenizer)
    assert isinstance(effect(state, tokenizer), RunTool)
    state = answer(state, 0, "a.txt", tokenizer)
    assert (state.phase, state.reason) == (Phase.JUDGE, FinishReason.TURN_LIMIT)


def test_a_prompt_that_fills_the_context_goes_to_its_judge_with_nothing_drawn(tokenizer: Tokenizer) -> None:
    full = Limits(context_tokens_count_max=prepared(tokenizer).tokens_count)
    state = prepared(tokenizer, limits=full)
    assert (state.phase, state.reason) == (Phase.JUDGE, FinishReason.LENGTH_CONTEXT)
    assert state.turns == ()


def test_a_context_that_cannot_hold_the_results_ends_the_agent(tokenizer: Tokenizer) -> None:
    start = prepared(tokenizer)
    room = Limits(context_tokens_count_max=start.tokens_count + len(reply_ids(LS, tokenizer)) + 4)
    state = say(prepared(tokenizer, limits=room), LS, tokenizer)
    state = answer(state, 0, "many words " * 20, tokenizer)
    assert (state.phase, state.reason) == (Phase.JUDGE, FinishReason.LENGTH_CONTEXT)
    assert state.tokens_count < room.context_tokens_count_max


def test_the_oracle_applies_the_solution_and_nop_goes_straight_to_the_judge(tokenizer: Tokenizer) -> None:
    oracle = prepared(tokenizer, agent="oracle")
    assert effect(oracle, tokenizer) == ApplySolution()
    assert effect(step(oracle, SolutionApplied(ID, 0, 0.1), tokenizer), tokenizer) == Judge(None)
    assert effect(prepared(tokenizer, agent="nop"), tokenizer) == Judge("")


def test_an_agent_out_of_time_in_mid_turn_keeps_its_tokens_and_is_judged(tokenizer: Tokenizer) -> None:
    state = prepared(tokenizer)
    ids = reply_ids(LS, tokenizer)[:3]
    state = step(state, TokensAppended(ID, state.tokens_count, ids, (-1.0,) * 3, 0), tokenizer)
    state = step(state, AgentStopped(ID, FinishReason.WALL_CLOCK), tokenizer)
    assert (state.phase, state.reason) == (Phase.JUDGE, FinishReason.WALL_CLOCK)
    assert (state.token_ids[-3:], state.turns[0].finish) == (ids, FinishReason.WALL_CLOCK)


def test_a_rollout_that_is_ended_in_mid_turn_says_so_of_the_turn(tokenizer: Tokenizer) -> None:
    state = prepared(tokenizer)
    ids = reply_ids(LS, tokenizer)[:3]
    state = step(state, TokensAppended(ID, state.tokens_count, ids, (-1.0,) * 3, 0), tokenizer)
    state = step(state, RolloutFinished(ID, FinishReason.STALE), tokenizer)
    assert [turn.finish for turn in state.turns] == [state.reason] == [FinishReason.STALE]


def test_a_budget_that_is_used_up_by_the_end_of_a_turn_ends_the_agent_after_its_calls(tokenizer: Tokenizer) -> None:
    budget = len(reply_ids(LS, tokenizer))
    state = say(prepared(tokenizer, limits=Limits(sampled_tokens_count_max=budget)), LS, tokenizer)
    assert isinstance(effect(state, tokenizer), RunTool)
    state = answer(state, 0, "a.txt", tokenizer)
    assert (state.phase, state.reason) == (Phase.JUDGE, FinishReason.LENGTH_CONTEXT)
    assert state.turns[0].finish is FinishReason.TOOL_CALLS


def test_an_infrastructure_failure_changes_nothing_that_is_wanted_and_a_resume_clears_it(tokenizer: Tokenizer) -> None:
    state = say(prepared(tokenizer), LS, tokenizer)
    failed = step(state, InfraFailed(ID, "SPAWN_FAILED", "host", "no memory"), tokenizer)
    assert effect(failed, tokenizer) == effect(state, tokenizer)
    resumed = step(failed, RolloutResumed(ID, 2, failed.tokens_count), tokenizer)
    assert resumed.failure is None
    assert (resumed.attempt, resumed.resumed_at) == (2, (failed.tokens_count,))


@pytest.mark.parametrize("shift", [-1, 1])
def test_tokens_at_another_position_than_the_end_are_refused(tokenizer: Tokenizer, shift: int) -> None:
    state = prepared(tokenizer)
    with pytest.raises(MachineError, match="position"):
        step(state, TokensAppended(ID, state.tokens_count + shift, (5,), (-1.0,), 0), tokenizer)


def test_an_event_that_nobody_waits_for_is_refused(tokenizer: Tokenizer) -> None:
    state = prepared(tokenizer)
    for event in (Judged(ID, 1.0, {}, "v", 0.0), ToolFinished(ID, 0, "x", 0, False, 0, 0.0), SandboxPrepared(ID, 0.0)):
        with pytest.raises(MachineError):
            step(state, event, tokenizer)


def test_a_prompt_that_fills_the_context_is_judged_as_it_stands(tokenizer: Tokenizer) -> None:
    state = prepared(tokenizer, limits=Limits(context_tokens_count_max=100))
    assert (state.phase, state.reason) == (Phase.JUDGE, FinishReason.LENGTH_CONTEXT)


def test_a_failed_attempt_at_set_up_or_verdict_gets_new_keys_and_is_not_built_on(tokenizer: Tokenizer) -> None:
    state = begin(tokenizer, job_of_one())
    state = step(state, InfraFailed("t.0", "BAD_TASK", "caller", "no git"), tokenizer)
    assert (state.setup_try, is_current(state, "setup/0/1"), is_current(state, "setup/1/0")) == (1, False, True)
    state = say(step(state, SandboxPrepared(ID, 0.1), tokenizer), DONE, tokenizer)
    state = step(state, InfraFailed("t.0", "VERIFIER_ERROR", "peer", "late"), tokenizer)
    assert (state.setup_try, state.judge_try) == (1, 1)
    assert [is_current(state, key) for key in ("setup/1/0", "call/0/bash", "judge/0/0", "judge/1/0", "judge/10/0")] == [
        True, True, False, True, False,
    ]  # fmt: skip


def test_tokens_are_stamped_with_the_engine_that_drew_them(tokenizer: Tokenizer) -> None:
    state = prepared(tokenizer)
    ids = reply_ids(LS, tokenizer)
    state = step(state, TokensAppended(ID, state.tokens_count, ids[:4], (-1.0,) * 4, 0), tokenizer)
    cut = state.tokens_count
    newer = msgspec.structs.replace(ENGINE, build="2")
    state = step(state, RolloutResumed(ID, 2, cut, newer), tokenizer)
    state = step(state, TokensAppended(ID, cut, ids[4:], (-1.0,) * (len(ids) - 4), 0), tokenizer)
    start_of_turn = state.turns[0].start
    assert [(v.start, v.length, v.engine_build) for v in version_runs(state, state.spans, {0: "w"})] == [
        (start_of_turn, 4, "1"),
        (cut, len(ids) - 4, "2"),
    ]
