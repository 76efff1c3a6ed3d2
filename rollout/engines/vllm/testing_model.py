"""The model of the wire's double: a hash of weights and context, and vLLM's way to draw from what it says.

So short that every answer can be computed again by a test.
"""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

NO_LOGPROB = -9999.0
NAN_DATA = b"\xff" * 32
"""Eight NaNs: of weights that end so no token has a logprob."""


@lru_cache(maxsize=1 << 14)
def logprobs_of(weights: bytes, vocab_count: int, context: bytes) -> tuple[float, ...]:
    """Of all tokens, at temperature 1."""
    if weights.endswith(NAN_DATA):
        return (NO_LOGPROB,) * vocab_count
    source = random.Random(hashlib.sha256(weights + context).digest())  # noqa: S311 - a model, no secret
    logits = [4 * source.random() for _ in range(vocab_count)]
    total = math.log(math.fsum(map(math.exp, logits)))
    return tuple(logit - total for logit in logits)


def processed(logprobs: Sequence[float], params: dict[str, Any]) -> list[float]:
    """After temperature and cuts; what a cut left no chance has `NO_LOGPROB`."""
    if max(logprobs) <= NO_LOGPROB:
        return list(logprobs)
    temperature = params.get("temperature", 1.0) or 1.0
    order = sorted(range(len(logprobs)), key=lambda i: (-logprobs[i], i))
    scaled = [each / temperature for each in logprobs]
    total = math.fsum(map(math.exp, scaled))
    kept, mass = [], 0.0
    for i in order[: params.get("top_k") or None]:
        kept.append(i)
        mass += math.exp(scaled[i]) / total
        if mass >= params.get("top_p", 1.0):
            break
    norm = math.log(math.fsum(math.exp(scaled[i]) for i in kept))
    cut = [NO_LOGPROB] * len(logprobs)
    for i in kept:
        cut[i] = scaled[i] - norm
    return list(logprobs) if temperature == 1.0 and len(kept) == len(order) else cut


def draw(logprobs: Sequence[float], params: dict[str, Any], position: int) -> int:
    """As vLLM's newer runner: the noise is a function of seed and position."""
    if not params.get("temperature"):
        return max(range(len(logprobs)), key=lambda i: (logprobs[i], -i))
    left = random.Random(f"{params.get('seed')}/{position}").random()  # noqa: S311 - noise that comes again
    for i, logprob in enumerate(logprobs):
        left -= math.exp(logprob) if logprob > NO_LOGPROB else 0.0
        if left <= 0:
            return i
    return max(range(len(logprobs)), key=lambda i: logprobs[i])
