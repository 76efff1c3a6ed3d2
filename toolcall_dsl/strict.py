"""The strict grammar: exactly what the format says, and a named rule for everything else.

It is the reference parser's grammar with three tightenings: a tag of the block inside a value is
an unclosed parameter and not text, a name stays on its line and within a bound, and a control
token of the chat template in prose is an error whichever it is.  The states follow a turn from
left to right; each knows the few literals that may come next.

See: docs/formats/toolcall_dsl.md, "Strict policy".
"""

from __future__ import annotations

import re

from toolcall_dsl.scanner import (
    HEADER_UNITS_MAX,
    BlockOpened,
    InvokeClosed,
    InvokeOpened,
    Marks,
    ParameterClosed,
    ParameterOpened,
    Place,
    ReasoningClosed,
    Scanner,
)

_INVOKE_HEADER = re.compile('([^\n\ue000-\uf8ff]+)">\n')
_PARAMETER_HEADER = re.compile('([^\n\ue000-\uf8ff]*?)" string="(true|false)">')


class StrictScanner(Scanner):
    """Accepts well-formed turns only; the first departure is a `Fault` and the end."""

    def __init__(self, marks: Marks, *, thinking: bool) -> None:
        super().__init__(marks, thinking=thinking)
        invoke, parameter = marks.opener(marks.invoke, ' name="'), marks.opener(marks.parameter, ' name="')
        invoke_end, block_end = marks.closer(marks.invoke, ">\n"), marks.closer(marks.block)
        self._tool_block = marks.opener(marks.block)
        self._after_block_tag = (f">\n{invoke}", f">\n{block_end}")
        self._after_name = (parameter, invoke_end, f"\n{parameter}", f"\n{invoke_end}")
        self._after_value = (f">\n{parameter}", f">\n{invoke_end}")
        self._after_invoke = (invoke, block_end)

    def _reasoning(self) -> bool:
        at = self._next_control(self._at)
        if at is None:
            self._emit_decided(Place.REASONING)
            return self._finished and self._fault("missing-think-close", len(self._units))
        unit = self._units[at]
        if unit == self._marks.think_close:
            self._emit(Place.REASONING, at)
            self._at = at + 1
            self._events.append(ReasoningClosed(self._offset(self._at)))
            self._state = self._content
            return True
        if unit == self._marks.eos:
            self._emit(Place.REASONING, at)
            return self._fault("missing-think-close", at)
        opens = self._block_opens(at)
        start = at if opens is False else at - 3
        self._emit(Place.REASONING, start)
        if opens is None:
            return False
        return self._fault("call-inside-reasoning" if opens else self._stray(at), start)

    def _content(self) -> bool:
        at = self._next_control(self._at)
        if at is None:
            self._emit_decided(Place.CONTENT)
            return self._finished and self._fault("missing-eos", len(self._units))
        if self._units[at] == self._marks.eos:
            self._emit(Place.CONTENT, at)
            self._at = at + 1
            self._state = self._after_eos
            return True
        opens = self._block_opens(at)
        self._emit(Place.CONTENT, at if opens is False else at - 3)
        if opens is None:
            return False
        if not opens:
            return self._fault(self._stray(at), at)
        self._events.append(BlockOpened(self._offset(self._at)))
        self._at += 2 + len(self._tool_block)
        self._state = self._block
        return True

    def _block_opens(self, at: int) -> bool | None:
        """Whether the control token at `at` belongs to a blank line and a block tag; None if undecided."""
        if self._units[at] != self._marks.dsml or self._units[max(self._at, at - 3) : at] != "\n\n<":
            return False
        found = self._spelled_next(at - 1, (self._tool_block,))
        return None if found is None else bool(found)

    def _stray(self, at: int) -> str:
        """The rule that the control token at `at` breaks in prose: a tag's token was meant to begin calls."""
        return "block-not-opened" if self._units[at] == self._marks.dsml else "control-token-in-text"

    def _block(self) -> bool:
        return self._expect(self._after_block_tag, "malformed-block")

    def _invoke_name(self) -> bool:
        end = self._header_end()
        if end is None:
            return False
        header = _INVOKE_HEADER.fullmatch(self._units, self._at, end + 1)
        if header is None:
            return self._bad_header("malformed-invoke", end)
        self._events.append(InvokeOpened(header[1], self._offset(self._at)))
        self._at = end + 1
        self._state = self._parameters
        return True

    def _parameters(self) -> bool:
        return self._expect(self._after_name, "malformed-invoke")

    def _parameter_name(self) -> bool:
        header = _PARAMETER_HEADER.match(self._units, self._at, self._at + HEADER_UNITS_MAX)
        if header is None:
            end = self._header_end()
            return end is not None and self._bad_header("malformed-parameter", end)
        self._at = header.end()
        self._events.append(ParameterOpened(header[1], header[2] == "true", self._offset(self._at)))
        self._state = self._value
        return True

    def _value(self) -> bool:
        search_from = self._at
        while (at := self._next_control(search_from)) is not None:
            search_from = at + 1
            if self._units[at] == self._marks.eos:
                self._emit(Place.VALUE, at)
                return self._fault("truncated-call", at)
            lead = 2 if self._units[max(self._at, at - 2) : at] == "</" else 1
            if self._units[at] != self._marks.dsml or self._units[max(self._at, at - lead) : at] not in {"<", "</"}:
                continue
            name = self._spelled_next(at + 1, self._marks.names)
            if name is None:
                self._emit(Place.VALUE, at - lead)
                return False
            if not name:
                continue
            self._emit(Place.VALUE, at - lead)
            if lead == 1 or name != self._marks.parameter:
                return self._fault("unclosed-parameter", at - lead)
            self._at = at + 1 + len(name)
            self._events.append(ParameterClosed())
            self._state = self._value_closed
            return True
        self._emit_decided(Place.VALUE)
        return self._finished and self._fault("truncated-call", len(self._units))

    def _value_closed(self) -> bool:
        return self._expect(self._after_value, "malformed-parameter")

    def _invoke_closed(self) -> bool:
        return self._expect(self._after_invoke, "malformed-block")

    def _expect(self, literals: tuple[str, ...], rule: str) -> bool:
        """One of the literals must come; it says which state is next."""
        found = self._spelled_next(self._at, literals)
        if found is None:
            return False
        if not found:
            rest = self._units[self._at : self._at + max(map(len, literals))]
            before_end, eos, _ = rest.partition(self._marks.eos)
            cut = bool(eos or self._finished) and any(literal.startswith(before_end) for literal in literals)
            return self._fault("truncated-call" if cut else rule, self._at)
        self._at += len(found)
        if found.endswith(self._marks.opener(self._marks.invoke, ' name="')):
            self._state = self._invoke_name
        elif found.endswith(self._marks.opener(self._marks.parameter, ' name="')):
            self._state = self._parameter_name
        elif found.endswith(self._marks.closer(self._marks.invoke, ">\n")):
            self._events.append(InvokeClosed())
            self._state = self._invoke_closed
        else:
            self._block_end = self._offset(self._at)
            self._state = self._after_block
        return True

    def _bad_header(self, rule: str, end: int) -> bool:
        """A tag header that is wrong, or just cut off by the end of the turn."""
        cut = self._units[end : end + 1] in {"", self._marks.eos} and end < self._at + HEADER_UNITS_MAX
        return self._fault("truncated-call" if cut else rule, self._at)

    def _after_block(self) -> bool:
        if self._at == len(self._units):
            return False
        if self._units[self._at] != self._marks.eos:
            return self._fault("text-after-block", self._at)
        self._at += 1
        self._state = self._after_eos
        return True

    def _after_eos(self) -> bool:
        return self._at < len(self._units) and self._fault("text-after-eos", self._at)
