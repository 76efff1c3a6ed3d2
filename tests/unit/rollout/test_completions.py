"""The text of `/v1/completions`: told in any pieces, it is the text that is told at once."""

from __future__ import annotations

from typing import Any

import pytest

from rollout.dialects.completions import CompletionRequest, Writer, ask_of
from rollout.generation import Drawn
from toolcall_dsl import Tokenizer

TEXT = "日本語のテキスト🙂はい、これは長い文章です🙂 and plain words é"


def told(tokenizer: Tokenizer, size: int) -> tuple[list[str], list[dict[str, Any]]]:
    """Texts and logprobs of a stream whose pieces have so many tokens."""
    body = CompletionRequest(prompt="x", logprobs=0)
    writer = Writer(body, ask_of(body, tokenizer, 64), "m", tokenizer)
    ids = tokenizer.encode_plain(TEXT)
    pieces = [
        Drawn(0, tuple(ids[at : at + size]), (-0.5,) * len(ids[at : at + size])) for at in range(0, len(ids), size)
    ]
    choices = [writer.piece(piece)["choices"][0] for piece in pieces]
    return [choice["text"] for choice in choices], [choice["logprobs"] for choice in choices]


@pytest.mark.parametrize("size", range(1, 20))
def test_a_character_that_is_cut_between_pieces_is_told_whole(tokenizer: Tokenizer, size: int) -> None:
    texts, _ = told(tokenizer, size)
    assert "".join(texts) == TEXT


@pytest.mark.parametrize("size", [1, 3, 100])
def test_offsets_go_on_from_piece_to_piece(tokenizer: Tokenizer, size: int) -> None:
    _, logprobs = told(tokenizer, size)
    tokens = [token for each in logprobs for token in each["tokens"]]
    offsets = [offset for each in logprobs for offset in each["text_offset"]]
    assert offsets == [len("".join(tokens[:at])) for at in range(len(tokens))]
