"""Pieces of a prompt, and pieces to tokens: control tokens and texts, each with the kind that its tokens get.

Adjacent texts are joined before they are tokenized, so only a control token ends a run: the ids
equal those of tokenizing the whole text at once, except that data never turns into control tokens.

Invariants:
1. A control id in a prompt was written as a `Control`.
2. A token that spans two texts has the kind of its first byte.

See: docs/formats/toolcall_dsl.md, "Text that cannot become a token" and "Kinds".
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from toolcall_dsl.tokenizer import Tokenizer, plain_units
from toolcall_dsl.types import Segment, SpanKind


@dataclass(frozen=True)
class Control:
    """One control token, by its spelling."""

    text: str
    kind: SpanKind = SpanKind.TEMPLATE


@dataclass(frozen=True)
class Text:
    """Text in which nothing is a control token."""

    text: str
    kind: SpanKind = SpanKind.TEMPLATE


Piece = Control | Text


def tagged_ids(pieces: Iterable[Piece], tokenizer: Tokenizer) -> list[tuple[int, SpanKind]]:
    """Token ids of pieces, each with its kind.  TokenizerError for a control token that the vocabulary lacks."""
    tagged: list[tuple[int, SpanKind]] = []
    run: list[Text] = []
    for piece in pieces:
        if isinstance(piece, Text):
            run.append(piece)
            continue
        tagged += _run_ids(run, tokenizer)
        run = []
        tagged.append((tokenizer.control(piece.text), piece.kind))
    tagged += _run_ids(run, tokenizer)
    return tagged


def grouped(tagged: Iterable[tuple[int, SpanKind]]) -> tuple[Segment, ...]:
    """Tagged ids as segments, neighbours of one kind joined."""
    segments: list[Segment] = []
    ids: list[int] = []
    kind: SpanKind | None = None
    for token_id, token_kind in tagged:
        if token_kind != kind and kind is not None:
            segments.append(Segment(tuple(ids), kind))
            ids = []
        kind = token_kind
        ids.append(token_id)
    if kind is not None:
        segments.append(Segment(tuple(ids), kind))
    return tuple(segments)


def segments_of(pieces: Iterable[Piece], tokenizer: Tokenizer) -> tuple[Segment, ...]:
    """Pieces as segments of token ids.  TokenizerError for a control token that the vocabulary lacks."""
    return grouped(tagged_ids(pieces, tokenizer))


def token_ids_of(segments: Iterable[Segment]) -> list[int]:
    """The token ids of segments in order, in one list: what an engine is given."""
    return [token_id for segment in segments for token_id in segment.token_ids]


def _run_ids(run: Sequence[Text], tokenizer: Tokenizer) -> Iterator[tuple[int, SpanKind]]:
    ends, kinds, end = [], [], 0
    for text in run:
        end += len(plain_units(text.text))
        ends.append(end)
        kinds.append(text.kind)
    place, offset = 0, 0
    for token_id in tokenizer.encode_plain("".join(text.text for text in run)):
        while offset >= ends[place]:
            place += 1
        yield token_id, kinds[place]
        offset += len(tokenizer.units(token_id))
