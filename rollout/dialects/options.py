"""What all HTTP dialects share: options that are refused rather than ignored, sampling, ids.

A field that would change what is sampled and that this service cannot honour is an error that names it; a field that
changes nothing is ignored, as the servers that these dialects come from do.
"""

from __future__ import annotations

import hashlib
import re
import secrets
from collections.abc import Iterator
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, FailFast, Strict, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

from rollout.engine import Sampling
from rollout.errors import RequestError
from rollout.events import FinishReason
from rollout.generation import Drawn, prompt_length
from rollout.jobs import check_sampling
from rollout.request import Thinking
from rollout.state import State

REFUSED: dict[str, tuple[object, ...]] = {
    "stop": (None, [], ""),
    "frequency_penalty": (None, 0, 0.0),
    "presence_penalty": (None, 0, 0.0),
    "repetition_penalty": (None, 1, 1.0),
    "logit_bias": (None, {}),
    "min_p": (None, 0, 0.0),
    "min_tokens": (None, 0),
    "ignore_eos": (None, False),
    "best_of": (None, 1),
    "echo": (None, False),
    "suffix": (None, ""),
    "use_beam_search": (None, False),
    "prompt_logprobs": (None,),
    "response_format": (None, {"type": "text"}),
    "structured_outputs": (None,),
    "guided_json": (None,),
    "guided_regex": (None,),
    "guided_choice": (None,),
    "guided_grammar": (None,),
    "bad_words": (None, []),
    "allowed_token_ids": (None,),
    "functions": (None,),
    "function_call": (None, "auto"),
    "features": (None,),
    "kv_transfer_params": (None,),
}
"""Field -> the values that ask for nothing."""
TokenIds = Annotated[list[Annotated[int, Strict()]], FailFast()]
"""Said wrongly a million times, it is complained of once."""
EFFORTS: dict[str, Thinking] = {
    "none": "none",
    "minimal": "high",
    "low": "high",
    "medium": "high",
    "high": "high",
    "xhigh": "max",
    "max": "max",
}
"""OpenAI's `reasoning_effort`, and DeepSeek's `max`."""
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:-]{0,127}")
Tops = tuple[tuple[int, float], ...]
"""Ids and logprobs."""
Finish = Literal["stop", "length", "tool_calls", "abort"]
FINISHES: dict[FinishReason, Finish] = {
    FinishReason.STOP: "stop",
    FinishReason.PARSE_FAILED: "stop",
    FinishReason.TOOL_CALLS: "tool_calls",
    FinishReason.LENGTH_TURN: "length",
    FinishReason.LENGTH_CONTEXT: "length",
}


class Options(BaseModel):
    """A request's body: declared fields are checked, others kept in `model_extra`."""

    model_config = ConfigDict(extra="allow")

    @field_validator("*", mode="before")
    @classmethod
    def _counts_no_booleans(cls, value: object, info: ValidationInfo) -> object:
        """In Python true is 1."""
        kind = cls.model_fields[str(info.field_name)].annotation
        if isinstance(value, bool) and bool not in (kind, *get_args(kind)):
            raise PydanticCustomError("boolean", "true and false mean nothing here")
        return value

    def refuse(self) -> None:
        """RequestError for a field that asks for what is not done here."""
        for name, value in (self.model_extra or {}).items():
            if name in REFUSED and value not in REFUSED[name]:
                raise RequestError(f"{name}: not supported by this service; leave it out")


class StreamOptions(BaseModel):
    """`include_usage` asks for counts in a last chunk."""

    include_usage: bool = False


def sampling_of(
    name: str, temperature: float | None, top_p: float | None, top_k: int | None, seed: int | None
) -> Sampling:
    """Sampling with OpenAI's defaults; without a seed the request's name is one.  RequestError."""
    of_name = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")
    sampling = Sampling(
        temperature=1.0 if temperature is None else temperature,
        top_p=1.0 if top_p is None else top_p,
        top_k=max(0, top_k or 0),  # vLLM says -1 for all
        seed=of_name if seed is None else seed % (1 << 64),
    )
    check_sampling(sampling)
    return sampling


def request_name(asked: str | None, prefix: str) -> tuple[str, bool]:
    """The request id, and whether it is the caller's own.  RequestError."""
    if asked is None:
        return f"{prefix}-{secrets.token_hex(12)}", False
    if not _NAME.fullmatch(asked):
        raise RequestError(f"request_id {asked[:80]!r}: use 1 to 128 letters, digits, '.', '_', ':' and '-'")
    return asked, True


def thinking_of(effort: str | None, template: dict[str, Any] | None) -> Thinking:
    """OpenAI's `reasoning_effort`, or vLLM's `chat_template_kwargs` {thinking, enable_thinking}.  RequestError."""
    wanted = (template or {}).get("thinking", (template or {}).get("enable_thinking"))
    if effort is None:
        return "none" if wanted is False else "high"
    if effort not in EFFORTS:
        raise RequestError(f"reasoning_effort: {effort[:80]!r} is none of {', '.join(EFFORTS)}")
    return EFFORTS[effort]


def finish_of(state: State, *, has_calls: bool = False) -> Finish:
    """Why a generation ended, with vLLM's word for one that somebody gave up; `has_calls`: the dialect has them."""
    if state.finished is None or state.finished.reason is FinishReason.CANCELLED or not state.turns:
        return "abort"
    finish = FINISHES.get(state.turns[0].finish, "abort")
    return "stop" if finish == "tool_calls" and not has_calls else finish


def usage(states: list[State]) -> dict[str, object]:
    """Counts in OpenAI's words; a prompt counts once, and as cached what nobody computed for any of its choices.

    What a process that was killed had found in its cache is not known.
    """
    prompts: dict[str, int] = {}
    cached: dict[str, int] = {}
    for state in states:
        name, length = state.opened.group_id, prompt_length(state)
        found = state.spent[0].cached_tokens_count if state.spent else 0
        prompts[name], cached[name] = length, min(found, cached.get(name, length))
    prompt, completion = sum(prompts.values()), sum(state.sampled_count for state in states)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": sum(cached.values())},
    }


def with_tops(drawn: Drawn) -> Iterator[tuple[int, float, Tops]]:
    """Each token with its logprob and the likeliest ones at its place, if those were asked for."""
    tops = [tuple(zip(each.token_ids, each.logprobs, strict=True)) for each in drawn.top_logprobs]
    return zip(drawn.token_ids, drawn.logprobs, tops or [()] * len(drawn.token_ids), strict=True)
