"""Everything that can happen to a job and its rollouts, as frozen values: the log's vocabulary.

State is nothing but the fold of these, so an event carries what cannot be computed again (ids that
were sampled, results, rewards, the task's own files) and nothing that can.  Sampled tokens are
`wal.tokens.TokensAppended`, the log's own token schema; everything else is a struct of this module,
logged as a msgpack map whose `type` names it.  Fields may be added with a default, never renamed.

See: docs/formats/events.md.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Literal

import msgspec

from rollout.bench.tasks import Task
from rollout.engine import EngineInfo, Sampling
from wal.tokens import TokensAppended

AgentKind = Literal["model", "oracle", "nop"]
Thinking = Literal["none", "high", "max"]


class FinishReason(StrEnum):
    """Why a rollout ended (docs/formats/trajectory.md has the table)."""

    STOP = "STOP"
    LENGTH_TURN = "LENGTH_TURN"
    LENGTH_CONTEXT = "LENGTH_CONTEXT"
    TURN_LIMIT = "TURN_LIMIT"
    WALL_CLOCK = "WALL_CLOCK"
    CANCELLED = "CANCELLED"


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """Bounds of one rollout: model turns, tokens a turn, tokens of the whole context, seconds a tool call."""

    turns_count_max: int = 16
    turn_tokens_count_max: int = 512
    context_tokens_count_max: int = 2048
    tool_timeout_s: float = 10.0


class Group(msgspec.Struct, frozen=True, kw_only=True):
    """`size` rollouts of one task; rollout ids are `{group_id}.{index}`."""

    group_id: str
    task: str
    task_digest: str
    size: int


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """What a caller asked for, complete: enough to run it to its end after any crash.

    `edge_url` is the Edge that `dsec run --edge` named, where a resume finds the sandboxes.
    """

    request_id: str
    groups: tuple[Group, ...]
    agent: AgentKind = "model"
    thinking: Thinking = "high"
    sampling: Sampling = Sampling()
    limits: Limits = Limits()
    edge_url: str = ""


class TaskAdmitted(msgspec.Struct, frozen=True, tag="task_admitted"):
    """A task with all its files, once for each digest: a resume needs no task folder."""

    task: Task


class JobSubmitted(msgspec.Struct, frozen=True, tag="job_submitted"):
    """A job was accepted; its tasks were admitted before."""

    job: Job


class JobCancelled(msgspec.Struct, frozen=True, tag="job_cancelled"):
    """The caller no longer wants the job; its unfinished rollouts end as CANCELLED."""

    request_id: str


class JobWorked(msgspec.Struct, frozen=True, tag="job_worked"):
    """A process worked on the job for so long and stopped by itself (a killed one cannot say)."""

    request_id: str
    wall_s: float


class PromptSegment(msgspec.Struct, frozen=True):
    """Adjacent prompt tokens of one span kind."""

    kind: str
    token_ids: tuple[int, ...]


class RolloutOpened(msgspec.Struct, frozen=True, tag="rollout_opened"):
    """A rollout begins: its prompt in tokens, and who is going to continue it."""

    rollout_id: str
    request_id: str
    group_id: str
    group_index: int
    prompt: tuple[PromptSegment, ...]
    tokenizer_digest: str
    engine: EngineInfo


class RolloutResumed(msgspec.Struct, frozen=True, tag="rollout_resumed"):
    """Another process took the rollout over from the log, at this many tokens; `engine` draws from here on."""

    rollout_id: str
    attempt: int
    tokens_count: int
    engine: EngineInfo | None = None


class SandboxPrepared(msgspec.Struct, frozen=True, tag="sandbox_prepared"):
    """The task's environment stands."""

    rollout_id: str
    duration_s: float


class ToolFinished(msgspec.Struct, frozen=True, tag="tool_finished"):
    """A tool call was answered; `observation` is what the model will read, to the letter."""

    rollout_id: str
    call_index: int
    observation: str
    exit_code: int | None
    timed_out: bool
    truncated_bytes: int
    duration_s: float


class SolutionApplied(msgspec.Struct, frozen=True, tag="solution_applied"):
    """The oracle agent ran the task's own solution; `output` is how that ended, for people."""

    rollout_id: str
    exit_code: int
    duration_s: float
    output: str = ""


class AgentStopped(msgspec.Struct, frozen=True, tag="agent_stopped"):
    """The agent was cut off from outside (its wall clock ran out); what it did will be judged."""

    rollout_id: str
    reason: FinishReason


class Judged(msgspec.Struct, frozen=True, tag="judged"):
    """The verifier gave a reward; `output` is how test.sh ended, for people."""

    rollout_id: str
    reward: float
    components: dict[str, float]
    verifier_digest: str
    duration_s: float
    output: str = ""


class RolloutFinished(msgspec.Struct, frozen=True, tag="rollout_finished"):
    """The end.  Seconds are those of the process that wrote this."""

    rollout_id: str
    reason: FinishReason
    sampling_s: float = 0.0
    tools_s: float = 0.0
    log_s: float = 0.0


class InfraFailed(msgspec.Struct, frozen=True, tag="infra_failed"):
    """The service, not the model, failed; the rollout stands still and a later resume takes it up again."""

    rollout_id: str
    code: str
    fault: str
    message: str


RolloutEvent = (
    RolloutOpened
    | RolloutResumed
    | SandboxPrepared
    | TokensAppended
    | ToolFinished
    | SolutionApplied
    | AgentStopped
    | Judged
    | RolloutFinished
    | InfraFailed
)
JobEvent = TaskAdmitted | JobSubmitted | JobCancelled | JobWorked
Event = RolloutEvent | JobEvent


def rollout_of(event: RolloutEvent) -> str:
    """The id of the rollout that an event belongs to."""
    return event.request if isinstance(event, TokensAppended) else event.rollout_id
