"""Sampled tokens to a turn: reasoning, content, calls, and the kind of every token.

The parser feeds a scanner, gathers its events and converts values.  It is a total function: what
a model samples never raises, it is either a turn or a turn with an error that names the broken
rule.  Unknown tools and missing parameters are not errors of the format; the tool layer answers
those.

Invariants:
1. Under `strict`, a turn with an error has no calls.  Under both policies a cut-off call is never among the calls.
2. The spans cover the token ids exactly.

See: docs/formats/toolcall_dsl.md, "Parsing".
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from toolcall_dsl.dialect import V4, Dialect
from toolcall_dsl.scanner import (
    BlockOpened,
    Chunk,
    Event,
    Fault,
    InvokeClosed,
    InvokeOpened,
    Marks,
    ParameterClosed,
    ParameterOpened,
    Place,
    ReasoningClosed,
    Scanner,
)
from toolcall_dsl.strict import StrictScanner
from toolcall_dsl.tokenizer import Tokenizer, UnitMap
from toolcall_dsl.tolerant import TolerantScanner
from toolcall_dsl.types import ParsedTurn, ParseError, ParseStatus, Policy, Span, SpanKind, ToolCall
from toolcall_dsl.values import BadJsonError, json_value, json_value_or_none, properties_of, unwrapped

_EXCERPT_BEFORE, _EXCERPT_AFTER = 30, 50

RULES: Mapping[str, str] = {
    "missing-think-close": "the reply ended inside its reasoning: {think_close} is missing",
    "call-inside-reasoning": "a tool block inside the reasoning does not run: write {think_close} first",
    "control-token-in-text": "a control token stands where only text may stand",
    "missing-eos": "the reply was cut off before its end",
    "malformed-block": "a tool block must hold invokes only, each on lines of its own, and end with </{dsml}{block}>",
    "malformed-invoke": (
        'an invoke must read <{dsml}{invoke} name="NAME">, then each parameter on its line, then </{dsml}{invoke}>'
    ),
    "malformed-parameter": (
        'a parameter must read <{dsml}{parameter} name="NAME" string="true|false">VALUE</{dsml}{parameter}>'
        " and end its line"
    ),
    "unclosed-parameter": "another tag of the block begins inside a value: </{dsml}{parameter}> is missing",
    "duplicate-parameter": "a parameter is given twice in one invoke",
    "bad-json": 'a parameter with string="false" must hold one JSON value',
    "truncated-call": "the reply ended inside a tool call, so the call was not run",
    "text-after-block": "nothing may follow the tool block",
    "text-after-eos": "nothing may follow the end of the reply",
}
"""Every rule that a turn can break, with the sentence that is told to the model."""


@dataclass
class _Gathered:
    """What the events of one turn have said so far."""

    reasoning: list[str] = field(default_factory=list)
    content: list[str] = field(default_factory=list)
    reasoning_end: int | None = None
    reasoning_implied: bool = False
    block_start: int | None = None
    calls: list[ToolCall] = field(default_factory=list)
    fault: Fault | None = None


class _Gatherer:
    """Folds events into `_Gathered`; stops at the first fault."""

    def __init__(self, unit_map: UnitMap, *, strict: bool, tools: Sequence[Mapping[str, object]]) -> None:
        self.gathered = _Gathered()
        self.unit_map = unit_map
        self.strict = strict
        self._properties = dict(map(properties_of, tools))
        self._name = ""
        self._invoke_start = 0
        self._recovered = False
        self._arguments: dict[str, object] = {}
        self._parameter = ParameterOpened("", None, 0)
        self._value: list[str] = []
        self._body: list[str] = []

    def take(self, event: Event) -> bool:
        """Fold one event; False when nothing may follow."""
        gathered = self.gathered
        match event:
            case Chunk(place, units, _):
                {
                    Place.REASONING: gathered.reasoning,
                    Place.CONTENT: gathered.content,
                    Place.VALUE: self._value,
                    Place.BODY: self._body,
                }[place].append(units)
            case ReasoningClosed(end, implied):
                gathered.reasoning_end, gathered.reasoning_implied = end, implied
            case BlockOpened(start):
                gathered.block_start = start
            case InvokeOpened(name, start, recovered):
                self._name, self._invoke_start, self._recovered = self._text([name]), start, recovered
                self._arguments, self._body = {}, []
            case ParameterOpened():
                self._parameter, self._value = event, []
            case ParameterClosed(recovered):
                self._recovered |= recovered
                self._close_parameter()
            case InvokeClosed(recovered):
                self._recovered |= recovered
                self._close_invoke()
            case _:
                gathered.fault = event
        return gathered.fault is None

    def _text(self, units: Sequence[str]) -> str:
        return self.unit_map.text("".join(units))

    def _close_parameter(self) -> None:
        opened, name = self._parameter, self._text([self._parameter.name])
        if name in self._arguments:
            if self.strict:
                self.gathered.fault = Fault("duplicate-parameter", opened.start)
                return
            self._recovered = True
        value: object = self._text(self._value)
        if opened.is_string is not True:
            try:
                value = json_value(str(value))
            except BadJsonError:
                if self.strict:
                    self.gathered.fault = Fault("bad-json", opened.start)
                    return
                self._recovered = True
        self._recovered |= opened.is_string is None
        self._arguments[name] = value

    def _close_invoke(self) -> None:
        arguments = self._arguments
        body = self._text(self._body).strip()
        if body and not arguments:
            value = json_value_or_none(body)
            if not isinstance(value, dict):
                self.gathered.fault = Fault("malformed-invoke", self._invoke_start)
                return
            arguments, self._recovered = value, True
        elif not self.strict:
            arguments = unwrapped(arguments, self._properties.get(self._name))
            self._recovered |= arguments is not self._arguments
        status = ParseStatus.RECOVERED if self._recovered else ParseStatus.OK
        self.gathered.calls.append(ToolCall(self._name, arguments, status))


def parse(
    token_ids: Sequence[int],
    tokenizer: Tokenizer,
    *,
    thinking: bool,
    policy: Policy = "strict",
    tools: Sequence[Mapping[str, object]] | None = None,
    dialect: Dialect = V4,
) -> ParsedTurn:
    """Read what was sampled after the assistant header, EOS included.  Total: it never raises on ids.

    `thinking` says which header it was (`<think>` or `</think>`).  `tools` (OpenAI shape) only
    serve the tolerant policy, to recognise a spurious wrapper parameter.
    """
    units = [tokenizer.units(token_id) for token_id in token_ids]
    scanner = scanner_for(tokenizer.unit_map, thinking=thinking, policy=policy, dialect=dialect)
    gatherer = _Gatherer(tokenizer.unit_map, strict=policy == "strict", tools=tools or ())
    turn, gathered = _parse("".join(units), scanner, gatherer, dialect)
    spans = tuple(_spans(units, thinking=thinking, gathered=gathered))
    return ParsedTurn(turn.reasoning, turn.content, turn.calls, turn.error, spans)


def parse_text(
    text: str,
    *,
    thinking: bool,
    policy: Policy = "strict",
    tools: Sequence[Mapping[str, object]] | None = None,
    dialect: Dialect = V4,
) -> ParsedTurn:
    """Read a turn out of text, believing every control token that is spelled in it; no spans."""
    unit_map = UnitMap(dialect.control_tokens)
    scanner = scanner_for(unit_map, thinking=thinking, policy=policy, dialect=dialect)
    gatherer = _Gatherer(unit_map, strict=policy == "strict", tools=tools or ())
    return _parse(unit_map.units(text), scanner, gatherer, dialect)[0]


def scanner_for(unit_map: UnitMap, *, thinking: bool, policy: Policy, dialect: Dialect = V4) -> Scanner:
    """An incremental scanner of one turn; feed it `Tokenizer.units` of each sampled token."""
    marks = Marks(dialect, unit_map)
    return StrictScanner(marks, thinking=thinking) if policy == "strict" else TolerantScanner(marks, thinking=thinking)


def _parse(units: str, scanner: Scanner, gatherer: _Gatherer, dialect: Dialect) -> tuple[ParsedTurn, _Gathered]:
    scanner.feed(units)
    scanner.finish()
    while (event := scanner.next_event()) is not None and gatherer.take(event):
        pass
    gathered, unit_map = gatherer.gathered, gatherer.unit_map
    error = None if gathered.fault is None else _error(gathered.fault, units, unit_map, dialect)
    reasoning = unit_map.text("".join(gathered.reasoning))
    turn = ParsedTurn(
        reasoning=reasoning.rstrip() if gathered.reasoning_implied else reasoning,
        content=unit_map.text("".join(gathered.content)),
        calls=() if error is not None and gatherer.strict else tuple(gathered.calls),
        error=error,
        spans=(),
    )
    return turn, gathered


def _error(fault: Fault, units: str, unit_map: UnitMap, dialect: Dialect) -> ParseError:
    before = unit_map.text(units[: fault.offset])
    after = unit_map.text(units[fault.offset : fault.offset + 4 * _EXCERPT_AFTER])
    message = RULES[fault.rule].format(
        think_close=dialect.think_close,
        dsml=dialect.dsml,
        block=dialect.block_name,
        invoke=dialect.invoke_name,
        parameter=dialect.parameter_name,
    )
    return ParseError(
        rule=fault.rule,
        offset=len(before),
        excerpt=before[-_EXCERPT_BEFORE:] + after[:_EXCERPT_AFTER],
        message=message,
    )


def _spans(units: Sequence[str], *, thinking: bool, gathered: _Gathered) -> Iterator[Span]:
    """One span a section; a token belongs to the section of its first unit."""
    end = sum(map(len, units))
    text_start = 0 if not thinking else end if gathered.reasoning_end is None else gathered.reasoning_end
    call_start = end if gathered.block_start is None else gathered.block_start
    borders = iter(((text_start, SpanKind.SAMPLED_TEXT), (call_start, SpanKind.SAMPLED_CALL), (end + 1, None)))
    kind: SpanKind | None = SpanKind.SAMPLED_THINK
    border, next_kind = next(borders)
    start, offset = 0, 0
    for index, token in enumerate(units):
        while offset >= border:
            if kind is not None and index > start:
                yield Span(start, index - start, kind)
            start, kind = index, next_kind
            border, next_kind = next(borders)
        offset += len(token)
    if kind is not None and len(units) > start:
        yield Span(start, len(units) - start, kind)
