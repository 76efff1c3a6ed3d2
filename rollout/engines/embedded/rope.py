"""Rotary frequencies of a config, as transformers computes them, with the same bits on every machine.

transformers works in float32, so each step here is rounded to it; powers and logarithms come from `decimal`, because
libm's last bit differs between machines.  Types whose frequencies depend on the length of the context ("dynamic",
"longrope") cannot be: what was computed for an early token would change with a late one.

See: checkpoint/README.md, "Configs"; transformers, modeling_rope_utils.py.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Mapping
from decimal import Context, Decimal, localcontext

import msgspec

from rollout.engines.embedded.fields import Fields

PAIRS_MAX = 256
"""As `V4_PAIRS_MAX` of v4.h."""
DIGITS = 28
TYPES: Mapping[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "proportional": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": (
        *("factor", "original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow"),
        *("mscale", "mscale_all_dim", "truncate"),
    ),
}


class Rope(msgspec.Struct, frozen=True):
    """Radians a position for each pair of the last `2 * len(frequencies)` dimensions; `scale` of sine and cosine."""

    frequencies: tuple[float, ...]
    scale: float = 1.0


def read_rope(part: Fields, head_dim: int, context_tokens_max: int) -> Rope:
    """One of `rope_parameters`, checked; `context_tokens_max` is what was trained where the part does not say it."""
    kind = part.one_of("rope_type", tuple(TYPES))
    part.know({"rope_type", "type", "rope_theta", "partial_rotary_factor", *TYPES[kind]})
    theta = _f32(part.number("rope_theta", 1.001, 1e12))
    dim = int(head_dim * part.number("partial_rotary_factor", 0.0, 1.0))
    turning = dim if kind != "proportional" else head_dim
    if dim % 2 or not 2 <= turning <= 2 * PAIRS_MAX:
        raise part.refused("partial_rotary_factor", f"head_dim times it must be even, 2 to {2 * PAIRS_MAX}")
    periods = tuple(_power(theta, _f32(i / turning)) for i in range(0, dim, 2))
    plain = tuple(_f32(1.0 / period) for period in periods)
    scale, scaled = 1.0, plain
    if kind in ("linear", "proportional"):
        factor = part.number("factor", 1.0, 1e6, 1.0 if kind == "proportional" else None)
        scaled = tuple(_f32(frequency / factor) for frequency in plain)
        scaled += (0.0,) * (turning // 2 - len(plain))
    elif kind == "llama3":
        scaled = _llama3(part, plain, context_tokens_max)
    elif kind == "yarn":
        scaled, scale = _yarn(part, theta, periods, context_tokens_max)
    return Rope(scaled, scale)


def _llama3(part: Fields, plain: tuple[float, ...], context_tokens_max: int) -> tuple[float, ...]:
    factor, trained = part.number("factor", 1.0, 1e6), _trained(part, context_tokens_max)
    low = part.number("low_freq_factor", 1e-3, 1e6)
    high = part.number("high_freq_factor", 1e-3, 1e6)
    if high <= low:
        raise part.refused("high_freq_factor", "must be above low_freq_factor")

    def scaled(frequency: float) -> float:
        length = _f32(_f32(2 * math.pi) / frequency)
        if length > trained / low:
            return _f32(frequency / factor)
        if length < trained / high:
            return frequency
        smooth = _f32(_f32(_f32(trained / length) - low) / (high - low))
        return _f32(_f32(_f32(_f32(1 - smooth) * frequency) / factor) + _f32(smooth * frequency))

    return tuple(map(scaled, plain))


def _yarn(
    part: Fields, theta: float, periods: tuple[float, ...], context_tokens_max: int
) -> tuple[tuple[float, ...], float]:
    factor, trained = part.number("factor", 1.0, 1e6), _trained(part, context_tokens_max)
    fast, slow = part.number("beta_fast", 1e-3, 1e6, 32.0), part.number("beta_slow", 1e-3, 1e6, 1.0)
    part.one_of("truncate", (True,), default=True)
    last = 2 * len(periods) - 1
    low = float(max(math.floor(_dimension(fast, last + 1, theta, trained)), 0))
    high = float(min(math.ceil(_dimension(slow, last + 1, theta, trained)), last))
    width = high - low if high != low else 0.001

    def blended(index: int, period: float) -> float:
        ramp = min(max(_f32(_f32(index - low) / width), 0.0), 1.0)
        kept = _f32(1.0 - ramp)
        stretched = _f32(1.0 / _f32(factor * period))
        return _f32(_f32(stretched * _f32(1.0 - kept)) + _f32(_f32(1.0 / period) * kept))

    return tuple(blended(index, period) for index, period in enumerate(periods)), _yarn_scale(part, factor)


def _yarn_scale(part: Fields, factor: float) -> float:
    if part.has("attention_factor"):
        return part.number("attention_factor", 1e-3, 1e3)

    def scale(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * _log(factor) + 1.0

    numerator, denominator = part.number("mscale", 0.0, 1e3, 0.0), part.number("mscale_all_dim", 0.0, 1e3, 0.0)
    return scale(numerator) / scale(denominator) if numerator and denominator else scale(1.0)


def _trained(part: Fields, context_tokens_max: int) -> int:
    return part.count("original_max_position_embeddings", 1, 1 << 30, default=context_tokens_max)


def _dimension(turns: float, dim: int, theta: float, trained: int) -> float:
    """The dimension whose pair turns so often in a context of the trained length."""
    return dim * _log(trained / (turns * 2 * math.pi)) / (2 * _log(theta))


def _f32(value: float) -> float:
    return ctypes.c_float(value).value


def _log(value: float) -> float:
    return _exact(lambda: Decimal(value).ln())


def _power(base: float, exponent: float) -> float:
    return _f32(_exact(lambda: Decimal(base) ** Decimal(exponent)))


def _exact(compute: Callable[[], Decimal]) -> float:
    with localcontext(Context(prec=DIGITS)):
        return float(compute())
