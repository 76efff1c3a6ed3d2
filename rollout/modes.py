"""The modes of DeepSeek-V4, Non-think, High and Max, as prompt contracts with their budgets.

What a mode says to the model is the encoder's: Non-think closes the thinking in the header of each reply, High and Max
open it, and Max puts its effort text before everything else.  What it may spend is a bound of the service: a turn
thinks for no more than its share of the context, is closed there by a token of the service's own if it has not ended
its thinking itself, and has the same room left to call or to answer in every mode.

See: docs/formats/toolcall_dsl.md, "Encoding"; docs/training.md, "Modes".
"""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction
from types import MappingProxyType

from rollout.errors import RequestError
from rollout.request import Limits, Thinking

THINKING: Mapping[Thinking, Fraction] = MappingProxyType(
    {"none": Fraction(0), "high": Fraction(1, 8), "max": Fraction(1, 2)}
)
"""Of the context, what one turn may think."""
REST = Fraction(1, 8)
"""Of the context, what a turn may say behind it."""
CONTEXT_TOKENS_MIN = 64


def limits_of(mode: Thinking, context_tokens_count_max: int = 2048, *, turns_count_max: int = 16) -> Limits:
    """The budgets of a mode in a context of so many tokens (64 or more).  RequestError."""
    if mode not in THINKING:
        raise RequestError(f"mode {mode!r} is none of {', '.join(THINKING)}")
    if context_tokens_count_max < CONTEXT_TOKENS_MIN:
        raise RequestError(
            f"context_tokens_count_max is {context_tokens_count_max}, must be {CONTEXT_TOKENS_MIN} or more"
        )
    thinking = int(THINKING[mode] * context_tokens_count_max)
    return Limits(
        turns_count_max=turns_count_max,
        thinking_tokens_count_max=thinking,
        turn_tokens_count_max=thinking + int(REST * context_tokens_count_max),
        context_tokens_count_max=context_tokens_count_max,
    )
