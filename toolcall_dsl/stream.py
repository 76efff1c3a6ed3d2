"""The incremental parser: sampled tokens (or text) in, events of the turn out.

It joins the pieces: a scanner finds the tags, `ArgumentsReader` makes JSON of the parameters,
`Trail` remembers where things stood, `SpanReader` which tokens were what.  `parse` is this parser
fed once, so there is one reading of the language.  What a model samples never raises; a broken
turn is the event `TurnFailed`.

Invariants:
1. However a turn is split, its events are the same once neighbouring texts of one kind are joined.
2. A call that must not run never appears as `CallFinished`: under `strict` these come after
   `finish`, and only if the whole turn is sound; under both policies a cut-off call has none.
3. Memory: the undecided suffix, a window for errors, the arguments of the calls; not the turn.

See: docs/formats/toolcall_dsl.md, "Streaming".
"""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Iterable, Mapping, Sequence

from toolcall_dsl.arguments import ArgumentsReader
from toolcall_dsl.dialect import V4, Dialect
from toolcall_dsl.errors import FeedError
from toolcall_dsl.options import check_dialect, check_policy, check_switches, check_tools
from toolcall_dsl.rules import Mark, Trail
from toolcall_dsl.scanner import (
    BlockOpened,
    Chunk,
    Event,
    InvokeClosed,
    InvokeOpened,
    Marks,
    ParameterClosed,
    ParameterOpened,
    Place,
    ReasoningClosed,
    Scanner,
)
from toolcall_dsl.spans import SpanReader
from toolcall_dsl.strict import StrictScanner
from toolcall_dsl.tokenizer import Tokenizer, UnitMap
from toolcall_dsl.tolerant import TolerantScanner
from toolcall_dsl.types import (
    ArgumentsText,
    CallFinished,
    CallStarted,
    ContentText,
    Policy,
    ReasoningText,
    Span,
    SpanKind,
    TurnEvent,
    TurnFailed,
)
from toolcall_dsl.units import SpelledUnits, UnitsDecoder
from toolcall_dsl.values import properties_of

SPACE_HELD_MAX = 1024
"""Most white space at the end of reasoning that `tolerant` cuts (and so holds) before a block that ends it."""


@functools.lru_cache(maxsize=16)
def spelled_map(dialect: Dialect) -> UnitMap:
    """The units of text in which the control tokens of a dialect are spelled; made once."""
    return UnitMap(dialect.control_tokens)


@functools.lru_cache(maxsize=64)
def marks_of(dialect: Dialect, unit_map: UnitMap) -> Marks:
    """The literals of a dialect in a vocabulary; made once."""
    return Marks(dialect, unit_map)


def scanner_for(marks: Marks, *, thinking: bool, policy: Policy) -> Scanner:
    """The grammar of a policy."""
    return StrictScanner(marks, thinking=thinking) if policy == "strict" else TolerantScanner(marks, thinking=thinking)


class StreamParser:
    """Reads one assistant turn as it is sampled; a new turn needs a new parser.

    Made with a tokenizer it takes token ids (`feed`); without one it takes text (`feed_text`) and
    believes every control token of the dialect that is spelled there.  After each feed take events
    until `next_event` gives None; after `finish` once more.  `thinking`, `tools` and the rest mean
    what they mean for `toolcall_dsl.parse`.  Not thread-safe.
    """

    def __init__(
        self,
        tokenizer: Tokenizer | None = None,
        *,
        thinking: bool,
        policy: Policy = "strict",
        tools: Sequence[Mapping[str, object]] | None = None,
        dialect: Dialect = V4,
    ) -> None:
        """OptionError for an option that means nothing; nothing is assumed for it."""
        check_policy(policy)
        check_switches(thinking=thinking)
        check_dialect(dialect)
        check_tools(tools)
        self._tokenizer = tokenizer
        self._unit_map = spelled_map(dialect) if tokenizer is None else tokenizer.unit_map
        self._spelled = SpelledUnits(self._unit_map, dialect.control_tokens) if tokenizer is None else None
        self._dialect = dialect
        self._strict = policy == "strict"
        self._properties = dict(map(properties_of, tools or ()))
        marks = marks_of(dialect, self._unit_map)
        self._eos, self._has_eos = marks.eos, False
        self._scanner = scanner_for(marks, thinking=thinking, policy=policy)
        self._trail = Trail(self._unit_map)
        self._spans = SpanReader(thinking=thinking)
        self._decoder = UnitsDecoder(self._unit_map)
        self._space = ""
        self._prose: type[ReasoningText | ContentText] | None = ReasoningText if thinking else ContentText
        self._call = ArgumentsReader("", self._decoder, strict=self._strict, known=None, recovered=False)
        self._call_mark = self._trail.mark(0)
        self._calls_count = 0
        self._failed_rule = ""
        self._failed_mark: Mark | None = None
        self._finished = False
        self._events: deque[TurnEvent] = deque()
        self._finished_calls: list[CallFinished] = []

    def feed(self, token_ids: Iterable[int]) -> None:
        """More sampled ids; one that the vocabulary lacks reads as U+FFFD.

        FeedError for text, after `finish`, or if this parser was made for text.
        """
        if isinstance(token_ids, str | bytes):
            raise FeedError("feed() takes token ids; text is for feed_text() or parse_text()")
        if self._tokenizer is None or self._finished:
            raise FeedError("feed() is for a parser made with a tokenizer, before finish()")
        tokens = list(map(self._tokenizer.units, token_ids))
        self._spans.add(tokens)
        self._feed_units("".join(tokens))

    def feed_text(self, text: str) -> None:
        """More text.  FeedError for what is no text, after `finish`, or if this parser was made for ids."""
        if not isinstance(text, str):
            raise FeedError("feed_text() takes text; token ids are for feed() or parse()")
        if self._spelled is None or self._finished:
            raise FeedError("feed_text() is for a parser made without a tokenizer, before finish()")
        self._feed_units(self._spelled.feed(text))

    def finish(self) -> None:
        """The turn is over: what was held back is decided.  Again it does nothing."""
        if self._finished:
            return
        if self._spelled is not None:
            self._feed_units(self._spelled.finish())
        self._finished = True
        self._scanner.finish()
        self._drain()
        self._tell_failure(at_end=True)
        if not self._failed_rule:
            self._end_prose()
            self._events += self._finished_calls

    def next_event(self) -> TurnEvent | None:
        """The next event; None when more input is needed or, after `finish`, when all is said."""
        return self._events.popleft() if self._events else None

    @property
    def failed(self) -> bool:
        """Whether the turn broke the format; `TurnFailed` comes when its excerpt is complete, or at the end."""
        return bool(self._failed_rule)

    @property
    def is_complete(self) -> bool:
        """Whether the turn so far ended by itself: its end token came, or it stops right behind its tool block."""
        return self._has_eos or self._scanner.ends_with_block

    @property
    def undecided_count(self) -> int:
        """Units that the scanner holds; at most `toolcall_dsl.scanner.UNDECIDED_UNITS_MAX`."""
        return self._scanner.undecided_count

    def spans(self) -> tuple[Span, ...]:
        """What the tokens so far are (the newest may still be undecided before `finish`); empty for text."""
        return self._spans.spans()

    def _feed_units(self, units: str) -> None:
        self._has_eos = self._has_eos or self._eos in units
        if self._failed_rule:
            self._spans.forget_all()
            if self._failed_mark is not None:
                self._failed_mark.extend(units)
                self._tell_failure(at_end=False)
            return
        self._trail.add(units)
        self._scanner.feed(units)
        self._drain()
        self._trail.forget(self._scanner.decided_count)
        self._spans.forget(self._scanner.decided_count)

    def _drain(self) -> None:
        while not self._failed_rule and (event := self._scanner.next_event()) is not None:
            self._take(event)

    def _take(self, event: Event) -> None:
        match event:
            case Chunk():
                self._take_text(event)
            case ParameterOpened(name, is_string, start):
                if self._strict and not is_string:
                    self._call_mark = self._trail.mark(start)
                self._say(self._call.open_parameter(self._name(name), is_string), start)
            case ParameterClosed(recovered):
                self._say(self._call.close_parameter(recovered=recovered))
            case InvokeOpened():
                self._open_call(event)
            case InvokeClosed(recovered):
                self._close_call(recovered=recovered)
            case BlockOpened(start):
                self._end_prose()
                self._prose = None
                self._spans.border(start, SpanKind.SAMPLED_CALL)
            case ReasoningClosed(end, implied):
                self._end_prose(cut_space=implied)
                self._prose = ContentText
                self._spans.border(end, SpanKind.SAMPLED_TEXT)
            case _:
                self._end_prose()
                self._fail(event.rule, self._trail.mark(event.offset))

    def _take_text(self, chunk: Chunk) -> None:
        if self._prose is None:
            take = self._call.value if chunk.place is Place.VALUE else self._call.body
            self._say(take(chunk.units))
            return
        text = self._decoder.decode(chunk.units)
        if not self._strict and self._prose is ReasoningText:
            text = self._space + text
            space = text[len(text.rstrip()) :]
            self._space = space[-SPACE_HELD_MAX:]
            text = text[: len(text) - len(self._space)]
        if text:
            self._events.append(self._prose(text))

    def _end_prose(self, *, cut_space: bool = False) -> None:
        """Reasoning or content ends here; nothing inside a block."""
        if self._prose is None:
            return
        text = self._space + self._decoder.finish()
        self._space = ""
        if cut_space:
            text = text.rstrip()
        if text:
            self._events.append(self._prose(text))

    def _open_call(self, opened: InvokeOpened) -> None:
        name = self._name(opened.name)
        if not self._strict:
            self._call_mark = self._trail.mark(opened.start)
        known = self._properties.get(name)
        self._call = ArgumentsReader(name, self._decoder, strict=self._strict, known=known, recovered=opened.recovered)
        self._events.append(CallStarted(self._calls_count, name))

    def _name(self, units: str) -> str:
        return units if units.isascii() else self._unit_map.text(units)

    def _close_call(self, *, recovered: bool) -> None:
        self._say(self._call.close(recovered=recovered))
        if self._call.broken is None:
            held = self._finished_calls if self._strict else self._events
            held.append(CallFinished(self._calls_count, self._call.call()))
            self._calls_count += 1

    def _say(self, json_text: str, start: int | None = None) -> None:
        """Hand out what a call said; what broke it stands at `start` or where the call's mark is."""
        if json_text:
            self._events.append(ArgumentsText(self._calls_count, json_text))
        if self._call.broken is not None:
            self._fail(self._call.broken, self._call_mark if start is None else self._trail.mark(start))

    def _fail(self, rule: str, mark: Mark) -> None:
        self._failed_rule, self._failed_mark = rule, mark
        self._scanner.stop()
        self._tell_failure(at_end=False)

    def _tell_failure(self, *, at_end: bool) -> None:
        """Say what failed once the excerpt is complete; at the end of the turn it is."""
        if self._failed_mark is not None and (at_end or self._failed_mark.is_complete):
            self._events.append(TurnFailed(self._trail.error(self._failed_rule, self._failed_mark, self._dialect)))
            self._failed_mark = None
