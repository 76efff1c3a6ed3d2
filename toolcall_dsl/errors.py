"""Errors of the language package: one root, two leaves.

Only a caller can make this package raise: a conversation that has no encoding, or a tokenizer
file that cannot serve.  What a model sampled never raises; it comes back as a
`toolcall_dsl.types.ParseError` value.

See: docs/formats/toolcall_dsl.md.
"""

from __future__ import annotations

from typing import ClassVar, Literal


class DslError(Exception):
    """Root of every error that `toolcall_dsl` raises on purpose."""

    code: ClassVar[str] = "DSL"
    retryable: ClassVar[bool] = False
    fault: ClassVar[Literal["caller"]] = "caller"


class MessageError(DslError):
    """A conversation or option that cannot be encoded; the message names the message index and the field."""

    code = "BAD_MESSAGES"


class TokenizerError(DslError):
    """A tokenizer file that cannot be used, or that lacks a needed control token; names the file and the thing."""

    code = "BAD_TOKENIZER"
