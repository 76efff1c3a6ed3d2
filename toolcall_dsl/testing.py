"""For tests and scripted engines: what a model would have sampled, and the events of a turn fed in parts.

A completion written as text says nothing about which tokens were sampled; `sampled_ids` takes every
control token that it spells as sampled.  `events_of` joins neighbouring chunks, so that the events
of two splits of one turn can be compared.

See: docs/formats/toolcall_dsl.md, "Parsing".
"""

from __future__ import annotations

from collections.abc import Iterable

from toolcall_dsl.dialect import V4, Dialect
from toolcall_dsl.parser import scanner_for
from toolcall_dsl.scanner import Chunk, Event
from toolcall_dsl.tokenizer import Tokenizer, UnitMap
from toolcall_dsl.types import Policy


def sampled_ids(text: str, tokenizer: Tokenizer, *, dialect: Dialect = V4) -> list[int]:
    """Ids of a completion; control tokens of the dialect that are spelled in it are control tokens."""
    ids: list[int] = []
    for part in tokenizer.unit_map.split(text):
        ids += [tokenizer.control(part)] if part in dialect.control_tokens else tokenizer.encode_plain(part)
    return ids


def events_of(parts: Iterable[str], unit_map: UnitMap, *, thinking: bool, policy: Policy) -> list[Event]:
    """All events of one turn whose units are fed part by part, neighbouring chunks of one place joined."""
    scanner = scanner_for(unit_map, thinking=thinking, policy=policy)
    events: list[Event] = []

    def drain() -> None:
        while (event := scanner.next_event()) is not None:
            last = events[-1] if events else None
            if isinstance(event, Chunk) and isinstance(last, Chunk) and last.place is event.place:
                events[-1] = Chunk(last.place, last.units + event.units, last.start)
            else:
                events.append(event)

    for part in parts:
        scanner.feed(part)
        drain()
    scanner.finish()
    drain()
    return events
