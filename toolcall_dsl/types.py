"""The values that cross the border of this package: spans, segments, calls, parsed turns.

All are frozen and free of behaviour, so that a rollout's state can hold them and a log can
write them.  A parse error is a value with facts, not an exception: it is an observation that
the model gets to see.

See: docs/formats/toolcall_dsl.md, "Parsing".
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Literal, NamedTuple

Policy = Literal["strict", "tolerant"]


class SpanKind(StrEnum):
    """What a run of tokens is; the loss mask and the turn borders are read from it."""

    SYSTEM = "SYSTEM"
    USER = "USER"
    TOOL_RESULT = "TOOL_RESULT"
    TEMPLATE = "TEMPLATE"
    SAMPLED_THINK = "SAMPLED_THINK"
    SAMPLED_CALL = "SAMPLED_CALL"
    SAMPLED_TEXT = "SAMPLED_TEXT"
    FORCED = "FORCED"


TRAINABLE = frozenset({SpanKind.SAMPLED_THINK, SpanKind.SAMPLED_CALL, SpanKind.SAMPLED_TEXT})
"""The kinds of tokens that a model sampled, or that stand for what it should have sampled."""


class Span(NamedTuple):
    """A run of tokens of one kind: `start` and `length` are token indices into one id sequence."""

    start: int
    length: int
    kind: SpanKind


@dataclass(frozen=True)
class Segment:
    """Adjacent tokens of one kind; the segments of a prompt, joined in order, are its token ids."""

    token_ids: tuple[int, ...]
    kind: SpanKind

    @property
    def trainable(self) -> bool:
        """Whether a loss may count these tokens: a model's own, and nothing else."""
        return self.kind in TRAINABLE


class ParseStatus(StrEnum):
    """How a call was read.

    `ok` as the format says; `recovered` by one of the tolerant repairs; `converted` when, however
    it was read, `toolcall_dsl.schema` then converted a value to what the tool's schema wants.
    """

    OK = "ok"
    RECOVERED = "recovered"
    CONVERTED = "converted"


@dataclass(frozen=True)
class ToolCall:
    """One complete call that may run; `arguments` holds JSON values in wire order."""

    name: str
    arguments: dict[str, object]
    status: ParseStatus = ParseStatus.OK


@dataclass(frozen=True)
class ParseError:
    """Where and why a turn broke the format.

    `rule` is a stable name out of docs/formats/toolcall_dsl.md; `offset` counts characters of
    the decoded turn from 0, `line` and `column` count lines and characters in a line from 1;
    `excerpt` is at most 80 characters around it; `message` is one sentence that a model can act on.
    """

    rule: str
    offset: int
    line: int
    column: int
    excerpt: str
    message: str


@dataclass(frozen=True)
class ReasoningText:
    """Some more reasoning."""

    text: str


@dataclass(frozen=True)
class ContentText:
    """Some more content."""

    text: str


@dataclass(frozen=True)
class CallStarted:
    """Call `index` (from 0, in wire order) names its tool.  Nothing to run yet."""

    index: int
    name: str


@dataclass(frozen=True)
class ArgumentsText:
    """Some more of the JSON text of a call's arguments; joined, the texts of a finished call are one JSON object."""

    index: int
    json_text: str


@dataclass(frozen=True)
class CallFinished:
    """Call `index` is complete and may run.  Comes for such calls only, in order of `index`."""

    index: int
    call: ToolCall


@dataclass(frozen=True)
class TurnFailed:
    """The turn broke the format; the last event.  A call that started and did not finish never will."""

    error: ParseError


TurnEvent = ReasoningText | ContentText | CallStarted | ArgumentsText | CallFinished | TurnFailed


@dataclass(frozen=True)
class ParsedTurn:
    """One assistant turn, read.

    `calls` holds only calls that may run.  Under `strict` an `error` empties it; under `tolerant`
    an `error` (a call cut off) leaves the calls before it.  `spans` cover all token ids of the
    turn in order, without gap or overlap (empty for a turn parsed from text).  `is_complete` says
    that the turn ended by itself: its end token came, or it stops right behind its tool block;
    False means that it was cut off (or, of a turn made of events alone, that nobody said).
    """

    reasoning: str
    content: str
    calls: tuple[ToolCall, ...]
    error: ParseError | None
    spans: tuple[Span, ...]
    is_complete: bool = False
