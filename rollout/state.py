"""A rollout's state: what the fold of its events holds, as frozen values without behaviour.

See: rollout/machine.py, which folds and decides; docs/architecture.md, "Machine".
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

import msgspec

from rollout.column import Column
from rollout.context import Span, spans_of
from rollout.engine import EngineInfo, TopLogprobs
from rollout.events import (
    FinishReason,
    InfraFailed,
    Judged,
    Preempted,
    RolloutFinished,
    RolloutOpened,
    SolutionApplied,
    Spent,
    ToolFinished,
)
from rollout.request import Job
from toolcall_dsl import ParsedTurn, ToolCall
from wal.tokens import Cause


class Phase(StrEnum):
    """What the rollout is waiting for."""

    PREPARE = "prepare"
    SAMPLE = "sample"
    TOOLS = "tools"
    SOLVE = "solve"
    JUDGE = "judge"
    FINISH = "finish"
    DONE = "done"


@dataclass(frozen=True, slots=True)
class Turn:
    """A closed model turn: `length` sampled tokens from `start`, what they said, and why it ended.

    A turn that was cut off from outside ended for the reason of that.
    """

    start: int
    length: int
    finish: FinishReason
    parsed: ParsedTurn


@dataclass(frozen=True, slots=True)
class AnsweredCall:
    """A tool call of turn number `turn` with its answer."""

    turn: int
    call: ToolCall
    answer: ToolFinished


@dataclass(frozen=True, slots=True)
class KvBreak:
    """The KV cache of the tokens before `position` is not the one that they were sampled with."""

    position: int
    cause: Cause


class State(msgspec.Struct, frozen=True):
    """A rollout so far.  `token_ids`, `spans` and `logprobs` hold what is closed, `current*` the open turn.

    `logprobs` has one entry for each sampled token, in order; `forced` are the positions of the open turn whose
    tokens were not sampled.  `calls` are all answered calls; `pending` the open block's calls, of which `answered`
    are answered.  `setup_try` and `judge_try` count failed attempts, whose commands a later attempt does not build
    on.  `engines` says from which position of the context on which engine drew, `versions` which version of the
    weights.  `top_logprobs` and `masks`, if the job asks for them, have one entry for each sampled token (no masks
    where nothing is cut), `routes_end` is behind the last token whose routes are in the log; all may be ahead of the
    tokens.  `spent` are the times that processes told, each when it let go of the rollout.
    """

    job: Job
    opened: RolloutOpened
    phase: Phase
    token_ids: tuple[int, ...]
    spans: tuple[Span, ...]
    logprobs: tuple[float, ...] = ()
    current: Column[int] = Column()
    current_logprobs: Column[float] = Column()
    top_logprobs: Column[TopLogprobs] = Column()
    masks: Column[tuple[int, ...]] = Column()
    routes_end: int = 0
    forced: frozenset[int] = frozenset()
    turns: tuple[Turn, ...] = ()
    calls: tuple[AnsweredCall, ...] = ()
    pending: tuple[ToolCall, ...] = ()
    answered: int = 0
    reason: FinishReason | None = None
    answer: str = ""
    solution: SolutionApplied | None = None
    judged: Judged | None = None
    finished: RolloutFinished | None = None
    failure: InfraFailed | None = None
    attempt: int = 1
    resumed_at: tuple[int, ...] = ()
    kv_breaks: tuple[KvBreak, ...] = ()
    preempted: Preempted | None = None
    preempt_count: int = 0
    preempted_s: float = 0.0
    spent: tuple[Spent, ...] = ()
    sandbox_start_s: float = 0.0
    setup_try: int = 0
    judge_try: int = 0
    engines: tuple[tuple[int, EngineInfo], ...] = ()
    versions: tuple[tuple[int, int], ...] = ()

    @property
    def tokens_count(self) -> int:
        """Length of the whole context, the open turn included."""
        return len(self.token_ids) + len(self.current)

    @property
    def sampled_count(self) -> int:
        """How many tokens the model drew."""
        return len(self.logprobs) + len(self.current_logprobs)


def start(job: Job, opened: RolloutOpened) -> State:
    """The state after RolloutOpened."""
    segments = opened.prompt
    return State(
        job=job,
        opened=opened,
        phase=Phase.PREPARE if opened.has_environment else Phase.SAMPLE,
        token_ids=tuple(token for segment in segments for token in segment.token_ids),
        spans=spans_of(segments, 0, 0),
        engines=((0, opened.engine),),
    )


def weights_at(state: State, position: int, known: Mapping[int, str]) -> tuple[int, str]:
    """Version and digest of the weights that drew the sampled token at `position`.

    The engine that the rollout was given says it for the version that it had then: a log may see other weights under
    the same number.  What came later stands in `known`, by version.
    """
    version = next(version for at, version in reversed(state.versions) if at <= position)
    for at, info in reversed(state.engines):
        if at <= position and info.policy_version == version:
            return version, info.weights_digest
    return version, known[version]
