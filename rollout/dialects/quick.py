"""Quick Instructions over HTTP, `/v1/quick_instructions`: small questions about a rollout, in OpenAI's manner.

See: rollout/quick.py; docs/serving.md, "Quick Instructions".
"""

from __future__ import annotations

import time
from typing import Any

import msgspec
from pydantic import BaseModel, ConfigDict, Field

from rollout.dialects.options import Options, request_name, sampling_of
from rollout.errors import RequestError
from rollout.quick import ANSWER_TOKENS_MAX, ask
from rollout.service import RolloutService


class Instruction(BaseModel):
    """A task, and the address that it is about."""

    model_config = ConfigDict(extra="forbid")

    task: str
    url: str | None = None


class QuickRequest(Options):
    """The body."""

    model: str | None = None
    rollout_id: str
    instructions: list[str | Instruction]
    max_tokens: int | None = Field(default=None, ge=1, le=ANSWER_TOKENS_MAX)
    temperature: float | None = 0.0
    top_p: float | None = 1.0
    top_k: int | None = 0
    seed: int | None = None
    stream: bool | None = False
    request_id: str | None = None


async def answer(body: QuickRequest, service: RolloutService, model: str) -> dict[str, Any]:
    """What is answered, whole.  RequestError names what cannot be done; the others are those of `ask`."""
    body.refuse()
    if body.stream:
        raise RequestError("stream: answers are short and come whole; leave it out")
    asked = [Instruction(task=each) if isinstance(each, str) else each for each in body.instructions]
    name, is_named = request_name(body.request_id, "quick")
    answers = await ask(
        service,
        body.rollout_id,
        [each.task if each.url is None else (each.task, each.url) for each in asked],
        request_id=name if is_named else "",
        answer_tokens_count_max=body.max_tokens or 0,
        sampling=sampling_of(name, body.temperature or 0.0, body.top_p, body.top_k, body.seed),
    )
    prompt = sum(each.prompt_tokens_count for each in answers)
    completion = sum(each.answer_tokens_count for each in answers)
    return {
        "id": answers[0].rollout_id.partition("/")[0],
        "object": "quick_instructions",
        "created": int(time.time()),
        "model": model,
        "rollout_id": body.rollout_id,
        "answers": [msgspec.to_builtins(each) for each in answers],
        "usage": {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "prompt_tokens_details": {"cached_tokens": sum(each.cached_tokens_count for each in answers)},
        },
    }
