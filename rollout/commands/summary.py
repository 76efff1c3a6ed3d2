"""The figures of a run, counted from its ledger: what `summary.json` holds and `dsec run` prints.

Nothing here is kept while running and nothing is assumed: `tokens_regenerated` and
`commands_run_twice` are counted from the log's own positions and keys, and must come out as 0.
"""

from __future__ import annotations

import msgspec

from rollout.ledger import Ledger
from rollout.state import State

SOLVED_REWARD = 1.0


class TaskRow(msgspec.Struct, kw_only=True):
    """One task's rollouts together."""

    task: str
    rollouts: int = 0
    finished: int = 0
    solved: int = 0
    reward_mean: float | None = None
    tokens: int = 0
    turns: int = 0
    infra_failures: int = 0
    finish_reasons: dict[str, int] = {}


class Summary(msgspec.Struct, kw_only=True):
    """One run.  Counts are over all rollouts of all jobs of the log.

    `wall_s` adds up the processes that worked on it and stopped by themselves; a killed one could not say.
    """

    tasks: int
    rollouts: int
    finished: int
    solved: int
    tokens: int
    prompt_tokens: int
    turns: int
    tool_calls: int
    tokens_regenerated: int
    tokens_replayed: int
    commands_replayed: int
    commands_run_twice: int
    resumes: int
    infra_failures: int
    infra_failure_messages: dict[str, str]
    wall_s: float
    sampling_s: float
    tools_s: float
    log_s: float
    per_task: list[TaskRow]


def summarise(ledger: Ledger) -> Summary:
    """Count a ledger.  A rollout counts as solved with a reward of 1 or more."""
    rows: dict[str, TaskRow] = {}
    rewards: dict[str, list[float]] = {}
    for job in ledger.jobs:
        for rollout_id, group, _ in ledger.members(job):
            row = rows.setdefault(group.task, TaskRow(task=group.task))
            row.rollouts += 1
            if (state := ledger.rollouts.get(rollout_id)) is not None:
                _count(row, state, rewards.setdefault(group.task, []))
    for task, values in rewards.items():
        rows[task].reward_mean = sum(values) / len(values) if values else None
    states = list(ledger.rollouts.values())
    spent = [spent for state in states for spent in state.spent]
    per_task = sorted(rows.values(), key=lambda row: row.task)
    return Summary(
        tasks=len(rows),
        rollouts=sum(row.rollouts for row in per_task),
        finished=sum(row.finished for row in per_task),
        solved=sum(row.solved for row in per_task),
        tokens=sum(row.tokens for row in per_task),
        prompt_tokens=sum(state.tokens_count - state.sampled_count for state in states),
        turns=sum(row.turns for row in per_task),
        tool_calls=sum(len(state.calls) for state in states),
        tokens_regenerated=ledger.tokens_regenerated.total(),
        tokens_replayed=sum(sum(state.resumed_at) for state in states),
        commands_replayed=sum(t.replayed_count for t in ledger.trajectories.values()),
        commands_run_twice=sum(t.run_twice_count for t in ledger.trajectories.values()),
        resumes=sum(len(state.resumed_at) for state in states),
        infra_failures=sum(row.infra_failures for row in per_task),
        infra_failure_messages={
            state.opened.rollout_id: f"{state.failure.code}: {state.failure.message}"
            for state in states
            if state.failure
        },
        wall_s=ledger.worked_s,
        sampling_s=sum(one.prefill_s + one.decode_s for one in spent),
        tools_s=sum(one.environment_s + one.judge_s for one in spent),
        log_s=sum(one.log_s for one in spent),
        per_task=per_task,
    )


def _count(row: TaskRow, state: State, rewards: list[float]) -> None:
    row.tokens += state.sampled_count
    row.turns += len(state.turns)
    row.infra_failures += state.failure is not None
    if state.finished is not None:
        row.finished += 1
        row.finish_reasons[state.finished.reason.value] = row.finish_reasons.get(state.finished.reason.value, 0) + 1
    if state.judged is not None:
        rewards.append(state.judged.reward)
        row.solved += state.judged.reward >= SOLVED_REWARD
