"""What a rollout wants done next, as frozen values: the machine decides, the Runner performs.

At most one effect is wanted at a time; performing it yields the events that answer it.
"""

from __future__ import annotations

from dataclasses import dataclass

from rollout.engine import SampleRequest
from rollout.events import FinishReason
from toolcall_dsl import ToolCall


@dataclass(frozen=True, slots=True)
class Prepare:
    """Bring up the sandbox and the task's environment -> SandboxPrepared."""


@dataclass(frozen=True, slots=True)
class Sample:
    """Draw tokens until the turn ends -> TokensAppended, one or more."""

    request: SampleRequest


@dataclass(frozen=True, slots=True)
class Force:
    """Put tokens into the open turn that the model did not draw -> TokensForced."""

    start: int
    token_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class RunTool:
    """Answer one tool call -> ToolFinished."""

    call_index: int
    call: ToolCall


@dataclass(frozen=True, slots=True)
class ApplySolution:
    """Run the task's reference solution -> SolutionApplied."""


@dataclass(frozen=True, slots=True)
class Judge:
    """Have the reward given, as the job asks: by tests on what the agent left, or by a judge -> Judged.

    `answer` is the agent's last message; None leaves what an oracle may have written itself.
    """

    answer: str | None


@dataclass(frozen=True, slots=True)
class Finish:
    """Close the rollout -> RolloutFinished."""

    reason: FinishReason


Effect = Prepare | Sample | Force | RunTool | ApplySolution | Judge | Finish
