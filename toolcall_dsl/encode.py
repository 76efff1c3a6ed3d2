"""Conversations to prompts: the reference text, and token ids with the kind of every token.

Messages become turns (`messages`), turns become pieces (`render`), and only then do pieces become
text or ids (`pieces`); this module is the way in.

Invariants:
1. The pieces, spelled out, are the reference encoder's text byte for byte (exceptions: "Quirks").
2. A control id in a prompt was written by a template.
3. `encode(all)` is `encode(prefix)` plus `encode_appended(prefix, rest)` wherever that does not refuse.

See: docs/formats/toolcall_dsl.md, "Encoding".
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Literal

from toolcall_dsl.append import appended_segments
from toolcall_dsl.dialect import V4, Dialect
from toolcall_dsl.errors import MessageError
from toolcall_dsl.messages import Message
from toolcall_dsl.pieces import Control, Piece, segments_of
from toolcall_dsl.render import Options, conversation_of, rendered, results_turn
from toolcall_dsl.tokenizer import Tokenizer
from toolcall_dsl.types import Segment

Effort = Literal["low", "high", "xhigh", "max"] | int
"""A reasoning effort; which of them a dialect knows is in `Dialect.efforts`."""

Tool = Mapping[str, object]


def encode_text(
    messages: Sequence[Message],
    *,
    thinking: bool,
    reasoning_effort: Effort | None = None,
    drop_thinking: bool = True,
    add_default_bos_token: bool = True,
    context: Sequence[Message] = (),
    tools: Sequence[Tool] | None = None,
    response_format: object = None,
    dialect: Dialect = V4,
) -> str:
    """The prompt as the reference encoder writes it.

    `context` was encoded before and is not repeated.  `tools` (OpenAI shape) and `response_format`
    belong to the first system message; without one, an empty one is put first.
    `reasoning_effort` None is the dialect's default.  MessageError for a conversation that has no
    encoding, OptionError for a dialect or a switch that is none.
    """
    options = Options(dialect, thinking, reasoning_effort, drop_thinking, add_default_bos_token, tools, response_format)
    return "".join(piece.text for piece in _pieces(messages, context, options))


def encode(
    messages: Sequence[Message],
    tokenizer: Tokenizer,
    *,
    thinking: bool,
    reasoning_effort: Effort | None = None,
    drop_thinking: bool = True,
    add_default_bos_token: bool = True,
    context: Sequence[Message] = (),
    tools: Sequence[Tool] | None = None,
    response_format: object = None,
    train_on_assistant: bool = False,
    dialect: Dialect = V4,
) -> tuple[Segment, ...]:
    """The prompt as token ids with kinds; the ids spell the text of `encode_text`.

    Assistant turns are FORCED, for nobody sampled them here.  With `train_on_assistant` they are
    supervised data: SAMPLED_THINK, SAMPLED_TEXT and SAMPLED_CALL with the borders of `parse`, but
    FORCED where a message carries a true `mask`.  MessageError for a conversation that has no
    encoding, TokenizerError for a needed control token that the vocabulary lacks, OptionError for a
    dialect or a switch that is none.
    """
    options = Options(
        dialect,
        thinking,
        reasoning_effort,
        drop_thinking,
        add_default_bos_token,
        tools,
        response_format,
        train_on_assistant,
    )
    return segments_of(_pieces(messages, context, options), tokenizer)


def encode_appended(
    prefix_messages: Sequence[Message],
    new_messages: Sequence[Message],
    tokenizer: Tokenizer,
    *,
    thinking: bool,
    reasoning_effort: Effort | None = None,
    drop_thinking: bool = True,
    add_default_bos_token: bool = True,
    tools: Sequence[Tool] | None = None,
    response_format: object = None,
    train_on_assistant: bool = False,
    dialect: Dialect = V4,
) -> tuple[Segment, ...]:
    """What to append to the encoded prefix: `encode(prefix)` plus this is `encode(prefix + new)`, id for id.

    AppendError exactly where that cannot be, naming the first message that would be rewritten and
    why; else as `encode` with the same options.  Renders both, tokenizes what is new.
    """
    options = Options(
        dialect,
        thinking,
        reasoning_effort,
        drop_thinking,
        add_default_bos_token,
        tools,
        response_format,
        train_on_assistant,
    )
    prefix = conversation_of(prefix_messages, (), options)
    whole = conversation_of([*prefix_messages, *new_messages], (), options)
    return appended_segments(prefix, whole, tokenizer)


def encode_results(
    results: list[str] | tuple[str, ...], tokenizer: Tokenizer, *, thinking: bool, dialect: Dialect = V4
) -> tuple[Segment, ...]:
    """What follows the end of an assistant turn whose calls were answered with `results`, in call order.

    The same tokens that `encode` gives for tool messages behind that turn when tools are declared.
    MessageError for no result at all, and for what is no list of strings.
    """
    is_list = isinstance(results, list | tuple) and all(isinstance(result, str) for result in results)
    if not is_list:
        raise MessageError("results: must be a list of strings, one for each call")
    if not results:
        raise MessageError("results: an answered turn has at least one result")
    return segments_of(results_turn(results, Options(dialect, thinking)), tokenizer)


def _pieces(messages: Sequence[Message], context: Sequence[Message], options: Options) -> Iterator[Piece]:
    conversation = conversation_of(messages, context, options)
    if options.add_bos and not context:
        yield Control(options.dialect.bos)
    for turn in rendered(conversation):
        yield from turn.body
        yield from turn.transition
