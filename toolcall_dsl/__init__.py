"""DeepSeek-V4's chat encoding and tool-call language (DSML), on token ids.

`encode` turns messages into prompt tokens that know what they are; `parse` turns sampled tokens
into reasoning, text and calls.  Pure: no I/O but reading a tokenizer file, nothing of the rest of
this project, `tokenizers` and `jsonschema-rs` behind one module each.

See: docs/formats/toolcall_dsl.md.
"""

from toolcall_dsl.dialect import DIALECTS, V4, V4_0731, V4_1, Dialect
from toolcall_dsl.encode import encode, encode_appended, encode_results, encode_text
from toolcall_dsl.errors import AppendError, DslError, FeedError, MessageError, OptionError, SchemaError, TokenizerError
from toolcall_dsl.messages import Message
from toolcall_dsl.parser import parse, parse_text, turn_of
from toolcall_dsl.pieces import token_ids_of
from toolcall_dsl.rules import RULES
from toolcall_dsl.schema import CheckedCall, SchemaProblem, ToolChecker, check_call
from toolcall_dsl.stream import StreamParser
from toolcall_dsl.tokenizer import Tokenizer
from toolcall_dsl.types import (
    ArgumentsText,
    CallFinished,
    CallStarted,
    ContentText,
    ParsedTurn,
    ParseError,
    ParseStatus,
    Policy,
    ReasoningText,
    Segment,
    Span,
    SpanKind,
    ToolCall,
    TurnEvent,
    TurnFailed,
)

__all__ = [
    "DIALECTS",
    "RULES",
    "V4",
    "V4_0731",
    "V4_1",
    "AppendError",
    "ArgumentsText",
    "CallFinished",
    "CallStarted",
    "CheckedCall",
    "ContentText",
    "Dialect",
    "DslError",
    "FeedError",
    "Message",
    "MessageError",
    "OptionError",
    "ParseError",
    "ParseStatus",
    "ParsedTurn",
    "Policy",
    "ReasoningText",
    "SchemaError",
    "SchemaProblem",
    "Segment",
    "Span",
    "SpanKind",
    "StreamParser",
    "Tokenizer",
    "TokenizerError",
    "ToolCall",
    "ToolChecker",
    "TurnEvent",
    "TurnFailed",
    "check_call",
    "encode",
    "encode_appended",
    "encode_results",
    "encode_text",
    "parse",
    "parse_text",
    "token_ids_of",
    "turn_of",
]
