"""Errors of the language package: one root, few leaves.

Only a caller can make this package raise: a conversation that has no encoding, a tokenizer file
that cannot serve, a tool whose schema is none, a misspelled option, a parser used out of order.
What a model sampled never raises; it comes back as a `toolcall_dsl.types.ParseError` value.

See: docs/formats/toolcall_dsl.md.
"""

from __future__ import annotations

from typing import ClassVar, Literal


class DslError(Exception):
    """Root of every error that `toolcall_dsl` raises on purpose."""

    code: ClassVar[str] = "DSL"
    retryable: ClassVar[bool] = False
    fault: ClassVar[Literal["caller"]] = "caller"


class OptionError(DslError, ValueError):
    """An option whose value means nothing: a policy, a dialect, a switch; names the option and what it may be."""

    code = "BAD_OPTION"


class MessageError(DslError):
    """A conversation or option that cannot be encoded; the message names the message index and the field."""

    code = "BAD_MESSAGES"


class AppendError(DslError):
    """New messages that would rewrite what is already encoded.

    `index` is the first message of the prefix that would be rewritten (-1: a system turn that no
    message wrote), `reason` a stable name out of docs/formats/toolcall_dsl.md, "The append-only law".
    """

    code = "NOT_APPENDABLE"

    def __init__(self, message: str, *, index: int, reason: str) -> None:
        super().__init__(message)
        self.index = index
        self.reason = reason


class TokenizerError(DslError):
    """A tokenizer file that cannot be used, or that lacks a needed control token; names the file and the thing."""

    code = "BAD_TOKENIZER"


class FeedError(DslError):
    """A parser used out of order: fed after its end, or ids and text mistaken for each other; names what to do."""

    code = "BAD_FEED"


class SchemaError(DslError):
    """A tool whose declaration or JSON Schema cannot be used; names the tool and what is wrong."""

    code = "BAD_SCHEMA"
