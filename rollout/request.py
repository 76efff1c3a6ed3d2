"""What a caller asks for, as frozen values: a job, its groups, bounds, rewards, and rules about the weights.

A Job is logged whole, so it is all that a resume needs.  `rollout/jobs.py` checks what comes from
outside and makes these.  Fields may be added with a default, never renamed.

See: docs/formats/events.md.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from rollout.engine import OnUpdate, Sampling
from toolcall_dsl import Policy as ParsePolicy

AgentKind = Literal["model", "oracle", "nop"]
Thinking = Literal["none", "high", "max"]
Returned = Literal["sampling_mask", "routes", "hidden"]
"""What an engine tells of tokens only if it is asked to."""
HEAVY: frozenset[Returned] = frozenset({"routes", "hidden"})
"""Those that come by reference, in the files of shards."""


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """Bounds of one rollout; 0 is no bound where it is the default.

    Model turns, tokens a turn, tokens of the whole context, tokens sampled over all turns, tokens of one turn's
    thinking (at the bound the service closes it), seconds a tool call, seconds of the agent's work (it
    samples, or its tools run) beside its task's own.
    """

    turns_count_max: int = 16
    turn_tokens_count_max: int = 512
    context_tokens_count_max: int = 2048
    sampled_tokens_count_max: int = 0
    thinking_tokens_count_max: int = 0
    tool_timeout_s: float = 10.0
    wall_clock_s: float = 0.0


class PolicyRule(msgspec.Struct, frozen=True, kw_only=True):
    """Which versions of the weights a rollout may be drawn with.

    A rollout waits, not begun, until the weights are of `min_version` or later.  It ends as STALE once its oldest
    sampled token is more than `max_lag` versions behind (None: never).  `on_update` is what a change of weights does to
    it in mid-flight: `keep` goes on over the KV as it is, `cut` goes on after the KV was computed again, `pin` goes on
    with the old weights to its end; one that was preempted, or whose process died, ends as STALE instead: the engine
    lets old weights go with the last session that holds them.
    """

    min_version: int = 0
    max_lag: int | None = None
    on_update: OnUpdate = "keep"


class EarlyStop(msgspec.Struct, frozen=True, kw_only=True):
    """Once `min_usable` members of a group have a reward, the rest have `grace_s` before they end as STRAGGLER."""

    min_usable: int
    grace_s: float = 0.0


class TestsReward(msgspec.Struct, frozen=True, tag="tests"):
    """The task's own tests, run in its sandbox after the agent."""


class NoReward(msgspec.Struct, frozen=True, tag="none"):
    """Nobody judges: the reward stays unset."""


class CallableReward(msgspec.Struct, frozen=True, tag="callable"):
    """A Python function of the service's own installation, `module:function`, named by the operator's allowlist."""

    target: str


class JudgeReward(msgspec.Struct, frozen=True, kw_only=True, tag="judge"):
    """The model judges by a rubric; each of the `samples_count` verdicts is a rollout of its own."""

    rubric: str
    samples_count: int = 1
    attempts_max: int = 3
    thinking: Thinking = "high"
    sampling: Sampling = Sampling()


Reward = TestsReward | NoReward | CallableReward | JudgeReward


class Conversation(msgspec.Struct, frozen=True, kw_only=True):
    """A prompt without an environment: messages (OpenAI's shape, as JSON), or the prompt's tokens themselves.

    One turn is sampled; its calls are the caller's to run.  `digest` is the sha256 of what it says.
    """

    name: str
    digest: str
    messages_json: str = "[]"
    token_ids: tuple[int, ...] = ()


class Group(msgspec.Struct, frozen=True, kw_only=True):
    """`size` rollouts of one task; rollout ids are `{group_id}.{index}`."""

    group_id: str
    task: str
    task_digest: str
    size: int

    @property
    def members(self) -> tuple[str, ...]:
        """Their ids."""
        return tuple(f"{self.group_id}.{index}" for index in range(self.size))


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """What a caller asked for, complete: enough to run it to its end after any crash.

    `edge_url` is the Edge that `dsec run --edge` named, where a resume finds the sandboxes.  `project` shares the
    service with other projects; a higher `priority` goes first.  After `deadline_s` seconds from its submission (0:
    never) what is left ends as DEADLINE.  With `draws_by_place` the noise depends on the seed and on the rollout's id
    behind `{request_id}/` alone: another request with the same seed draws the same.  `top_logprobs_count` has the
    likeliest tokens at each position logged, too; `returns` says what else.  What `ends_with_caller` nobody asks for
    again: it is cancelled when its caller or the service goes, and acknowledged once it has ended.
    """

    request_id: str
    groups: tuple[Group, ...] = ()
    agent: AgentKind = "model"
    thinking: Thinking = "high"
    sampling: Sampling = Sampling()
    limits: Limits = Limits()
    edge_url: str = ""
    project: str = "default"
    priority: int = 0
    deadline_s: float = 0.0
    early_stop: EarlyStop | None = None
    policy: PolicyRule = PolicyRule()
    reward: Reward = TestsReward()
    parse_policy: ParsePolicy = "strict"
    draws_by_place: bool = False
    top_logprobs_count: int = 0
    returns: tuple[Returned, ...] = ()
    ends_with_caller: bool = False
