"""Everything that can happen to a job and its rollouts, as frozen values: the log's vocabulary.

State is nothing but the fold of these, so an event carries what cannot be computed again (ids that
were sampled, results, rewards, the task's own files) and nothing that can.  Sampled tokens are
`wal.tokens.TokensAppended`, the log's own token schema; everything else is a struct of this module,
logged as a msgpack map whose `type` names it.  Fields may be added with a default, never renamed.

See: docs/formats/events.md.
"""

from __future__ import annotations

from enum import StrEnum

import msgspec

from dsec.types import NetworkPolicy
from rollout.bench.tasks import Task
from rollout.engine import EngineInfo, Routes, TopLogprobs
from rollout.environment.network import TaskPhase
from rollout.request import Conversation, Job
from wal.tokens import Cause, TokensAppended


class FinishReason(StrEnum):
    """Why a rollout ended (docs/formats/trajectory.md has the table)."""

    STOP = "STOP"
    TOOL_CALLS = "TOOL_CALLS"
    PARSE_FAILED = "PARSE_FAILED"
    LENGTH_TURN = "LENGTH_TURN"
    LENGTH_CONTEXT = "LENGTH_CONTEXT"
    TURN_LIMIT = "TURN_LIMIT"
    WALL_CLOCK = "WALL_CLOCK"
    CANCELLED = "CANCELLED"
    DEADLINE = "DEADLINE"
    STRAGGLER = "STRAGGLER"
    STALE = "STALE"
    JUDGE_UNAVAILABLE = "JUDGE_UNAVAILABLE"


class ConversationAdmitted(msgspec.Struct, frozen=True, tag="conversation_admitted"):
    """A prompt without an environment, once for each digest."""

    conversation: Conversation


class TaskAdmitted(msgspec.Struct, frozen=True, tag="task_admitted"):
    """A task with all its files, once for each digest: a resume needs no task folder."""

    task: Task


class JobSubmitted(msgspec.Struct, frozen=True, tag="job_submitted"):
    """A job was accepted; its tasks were admitted before.  From `at_s` of the wall clock its deadline counts."""

    job: Job
    at_s: float = 0.0


class JobCancelled(msgspec.Struct, frozen=True, tag="job_cancelled"):
    """Nobody wants the job any longer; its unfinished rollouts end as CANCELLED, or as DEADLINE."""

    request_id: str
    reason: FinishReason = FinishReason.CANCELLED


class JobWorked(msgspec.Struct, frozen=True, tag="job_worked"):
    """A process worked on the job for so long and stopped by itself (a killed one cannot say)."""

    request_id: str
    wall_s: float


class RolloutsAcknowledged(msgspec.Struct, frozen=True, tag="rollouts_acknowledged"):
    """The caller holds these rollouts' records: the log need not keep them any longer."""

    rollout_ids: tuple[str, ...]


class PolicyUpdated(msgspec.Struct, frozen=True, tag="policy_updated"):
    """The engine draws with other weights from here on; a later process loads the same `checkpoint`."""

    engine: EngineInfo
    checkpoint: str


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
    has_environment: bool = True
    judged_rollout_id: str = ""


class Spent(msgspec.Struct, frozen=True, kw_only=True):
    """Seconds of one process on one rollout, by what it waited for.

    Its turn, a slot or a sandbox; the first token of a turn; the turn's other tokens; tools and tests in the sandbox;
    a judge; the log.  `cached_tokens_count`: tokens of its turns' prompts that the engine had kept and did not compute.
    """

    queue_s: float = 0.0
    prefill_s: float = 0.0
    decode_s: float = 0.0
    environment_s: float = 0.0
    judge_s: float = 0.0
    log_s: float = 0.0
    cached_tokens_count: int = 0

    @property
    def agent_s(self) -> float:
        """In which the agent worked: the model drew, or its tools ran."""
        return self.prefill_s + self.decode_s + self.environment_s


class Preempted(msgspec.Struct, frozen=True, tag="preempted"):
    """The rollout was stopped at a token boundary and holds nothing; it goes on from here later, maybe elsewhere."""

    rollout_id: str
    cause: str
    at_s: float
    spent: Spent


class RolloutResumed(msgspec.Struct, frozen=True, tag="rollout_resumed"):
    """The rollout goes on at this many tokens, after a preemption or in another process; `engine` draws from here on.

    `kv` says what its KV cache is made of; `preempted_s` how long it stood after a preemption.
    """

    rollout_id: str
    attempt: int
    tokens_count: int
    engine: EngineInfo | None = None
    kv: Cause = "rebuilt"
    preempted_s: float = 0.0


class KvBroke(msgspec.Struct, frozen=True, tag="kv_broke"):
    """From `position` on the KV cache is not the one that the tokens before were sampled with."""

    rollout_id: str
    position: int
    cause: Cause


class TopLogprobsFound(msgspec.Struct, frozen=True, tag="top_logprobs_found"):
    """The likeliest tokens at `start` and behind it: of a chunk that comes next, or (after a crash) comes again."""

    rollout_id: str
    start: int
    top_logprobs: tuple[TopLogprobs, ...]


class SideChannelsFound(msgspec.Struct, frozen=True, tag="side_channels_found"):
    """What else the engine told of a chunk that begins at `start`, and that comes next, or (after a crash) comes again.

    Masks and hidden states as `Sampled` has them; routes only of tokens whose routes are not in the log yet, by the
    router of `policy_version`.  Of rows that are told twice the later ones hold.
    """

    rollout_id: str
    start: int
    policy_version: int
    masks: tuple[tuple[int, ...], ...] = ()
    routes: Routes | None = None
    hidden: bytes = b""


class TokensForced(msgspec.Struct, frozen=True, tag="tokens_forced"):
    """Tokens that the service, not the model, put into the open turn at position `start`."""

    rollout_id: str
    start: int
    token_ids: tuple[int, ...]


class SandboxPrepared(msgspec.Struct, frozen=True, tag="sandbox_prepared"):
    """The task's environment stands."""

    rollout_id: str
    duration_s: float


class NetworkSwitched(msgspec.Struct, frozen=True, tag="network_switched"):
    """The rollout's sandbox is about to get the network of a phase: durable before it has."""

    rollout_id: str
    phase: TaskPhase
    policy: NetworkPolicy


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
    verifier_id: str = "tests"
    judge_rollout_ids: tuple[str, ...] = ()


class RolloutFinished(msgspec.Struct, frozen=True, tag="rollout_finished"):
    """The end.  Seconds are those of the process that wrote this."""

    rollout_id: str
    reason: FinishReason
    spent: Spent = Spent()


class InfraFailed(msgspec.Struct, frozen=True, tag="infra_failed"):
    """The service, not the model, failed; the rollout stands still and a later resume takes it up again."""

    rollout_id: str
    code: str
    fault: str
    message: str
    spent: Spent = Spent()


RolloutEvent = (
    RolloutOpened
    | RolloutResumed
    | Preempted
    | KvBroke
    | SandboxPrepared
    | NetworkSwitched
    | TokensAppended
    | TopLogprobsFound
    | SideChannelsFound
    | TokensForced
    | ToolFinished
    | SolutionApplied
    | AgentStopped
    | Judged
    | RolloutFinished
    | InfraFailed
)
JobEvent = (
    TaskAdmitted | ConversationAdmitted | JobSubmitted | JobCancelled | JobWorked | RolloutsAcknowledged | PolicyUpdated
)
Event = RolloutEvent | JobEvent


def rollout_of(event: RolloutEvent) -> str:
    """The id of the rollout that an event belongs to."""
    return event.request if isinstance(event, TokensAppended) else event.rollout_id
