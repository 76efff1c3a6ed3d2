"""The append-only law as code: what new messages add to an encoded prefix, or why they would rewrite it.

Both conversations are rendered to pieces, which costs little, and compared; only what is new is
tokenized.  So the answer holds by construction, whatever rule of the format made the two differ,
and the reason given is looked up afterwards.

Invariants:
1. What is returned, behind the prefix's ids, is the ids of the whole.
2. A refusal means that the ids of the whole do not begin with those of the prefix.

See: docs/formats/toolcall_dsl.md, "The append-only law".
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from toolcall_dsl.errors import AppendError
from toolcall_dsl.messages import Turn
from toolcall_dsl.pieces import Piece, Text, grouped, tagged_ids
from toolcall_dsl.render import Conversation, rendered
from toolcall_dsl.tokenizer import Tokenizer
from toolcall_dsl.types import Segment

REASONS: Mapping[str, str] = {
    "turn-joined": "the new messages belong to the same user turn: encode them together",
    "results-sorted": "the results of one turn are sorted by their calls: encode them when all are there",
    "header-written": "what opens the reply to it is written already",
    "reasoning-dropped": "the reasoning that follows it is dropped at the new question",
    "reasoning-restored": "the reasoning that was dropped comes back with tools declared only now",
    "developer-dropped": "a developer message is dropped at the new question",
    "tools-moved": "the tools of the request belong to the first system message, which comes only now",
    "tokens-merged": "its text and the new text are tokenized together",
}
"""Every reason of an AppendError, with the sentence that says so."""


@dataclass(frozen=True)
class _Placed:
    """A piece and whose it is."""

    piece: Piece
    turn: Turn
    is_transition: bool


def appended_segments(prefix: Conversation, whole: Conversation, tokenizer: Tokenizer) -> tuple[Segment, ...]:
    """The segments of `whole` behind those of `prefix`.  AppendError if the prefix would be rewritten."""
    before, after = _placed(prefix), _placed(whole)
    for index, written in enumerate(before):
        wanted = after[index].piece if index < len(after) else None
        if written.piece != wanted:
            raise _refusal(_reason(written, wanted, prefix, whole), written.turn)
    start = len(before)
    while start > 0 and isinstance(before[start - 1].piece, Text):
        start -= 1
    open_run = tagged_ids([placed.piece for placed in before[start:]], tokenizer)
    rest = tagged_ids([placed.piece for placed in after[start:]], tokenizer)
    if rest[: len(open_run)] != open_run:
        raise _refusal("tokens-merged", before[-1].turn)
    return grouped(rest[len(open_run) :])


def _placed(conversation: Conversation) -> list[_Placed]:
    placed = [
        _Placed(piece, each.turn, is_transition)
        for each in rendered(conversation)
        for pieces, is_transition in ((each.body, False), (each.transition, True))
        for piece in pieces
    ]
    return [each for each in placed if each.piece.text]


def _reason(written: _Placed, wanted: Piece | None, prefix: Conversation, whole: Conversation) -> str:
    turn = written.turn
    if turn.index < 0:
        return "tools-moved"
    now = next((other for other in whole.turns if other.index == turn.index), None)
    if now is None:
        return "developer-dropped"
    if now.blocks != turn.blocks:
        return "turn-joined" if now.blocks[: len(turn.blocks)] == turn.blocks else "results-sorted"
    if prefix.is_dropping != whole.is_dropping:
        return "reasoning-restored"
    is_header_kept = wanted is not None and wanted.text == whole.dialect.think_close
    return "header-written" if written.is_transition and not is_header_kept else "reasoning-dropped"


def _refusal(reason: str, turn: Turn) -> AppendError:
    where = f"messages[{turn.index}]" if turn.index >= 0 else "request"
    return AppendError(f"{where}: {REASONS[reason]}", index=turn.index, reason=reason)
