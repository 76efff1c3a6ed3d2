"""A model's `config.json` as the numbers of `v4_config`.

The fields are those of transformers' `DeepseekV4Config`, with its defaults and its older spellings.  Each is carried
out, or must have the one value that is, or changes no result; a field that is none of these is refused, because one
that changes results and is ignored makes another model of the checkpoint.  The C side trusts what it is given, so
every bound is checked here, and names file, field, value and bound.

See: checkpoint/README.md, "Configs"; `v4.h`; `../config_fields.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from rollout.engines.config_fields import WITHOUT_EFFECT
from rollout.engines.embedded.fields import Fields
from rollout.engines.embedded.rope import PAIRS_MAX, Rope, read_rope
from rollout.errors import EngineError

LAYERS_MAX = 128
"""As `V4_LAYERS_MAX` of v4.h."""
CONTEXT_TOKENS_MAX = 1 << 20
SLIDING, CSA, HCA = "sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention"
KINDS = (SLIDING, CSA, HCA)
"""In the order of v4.h, as are SCORINGS."""
SCORINGS = ("sqrtsoftplus", "sigmoid")
RATIOS = {0: SLIDING, 4: CSA, 128: HCA}
ROPE_DIM_SHARE = 64 / 512

COUNTS: Mapping[str, tuple[str, int, int, int, int]] = {
    "vocab_size": ("vocab_count", 129280, 8, 1 << 20, 8),
    "hidden_size": ("hidden_dim", 4096, 16, 1 << 14, 16),
    "hc_mult": ("streams_count", 4, 1, 8, 1),
    "num_hidden_layers": ("layers_count", 43, 1, LAYERS_MAX, 1),
    "num_attention_heads": ("heads_count", 64, 1, 256, 1),
    "head_dim": ("head_dim", 512, 8, 1024, 8),
    "q_lora_rank": ("query_rank", 1024, 16, 1 << 14, 16),
    "o_groups": ("output_groups", 8, 1, 16, 1),
    "o_lora_rank": ("output_rank", 1024, 1, 1 << 12, 1),
    "sliding_window": ("window_tokens", 128, 1, CONTEXT_TOKENS_MAX, 1),
    "index_n_heads": ("index_heads", 64, 1, 256, 1),
    "index_head_dim": ("index_dim", 128, 8, 1024, 8),
    "index_topk": ("index_topk", 512, 1, CONTEXT_TOKENS_MAX, 1),
    "n_routed_experts": ("experts_count", 256, 1, 512, 1),
    "num_experts_per_tok": ("experts_active", 6, 1, 64, 1),
    "moe_intermediate_size": ("expert_dim", 2048, 16, 1 << 14, 16),
    "hc_sinkhorn_iters": ("sinkhorn_rounds", 20, 1, 100, 1),
}
"""Field: its name in `Dimensions`, the default, the lowest and the highest value, and what it is a multiple of."""
NUMBERS: Mapping[str, tuple[str, float, float, float]] = {
    "rms_norm_eps": ("norm_eps", 1e-6, 1e-12, 1.0),
    "hc_eps": ("mix_eps", 1e-6, 1e-12, 1.0),
    "swiglu_limit": ("swiglu_limit", 10.0, 1e-3, 1e6),
    "routed_scaling_factor": ("route_scale", 1.5, 1e-3, 1e6),
}
"""Field: its name in `Dimensions`, the default, the lowest and the highest value."""
FIXED: Mapping[str, tuple[Any, ...]] = {
    "model_type": ("deepseek_v4",),
    "num_key_value_heads": (1,),
    "n_shared_experts": (1,),
    "norm_topk_prob": (True,),
    "hidden_act": ("silu", "swish"),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "quantization_config": (None,),
    "expert_dtype": (None,),
    "per_layer_config": (None,),
}
"""Fields of which one meaning is carried out; the first value is that of an absent field (`model_type` must be there).

transformers reads none of `num_key_value_heads`, `n_shared_experts`, `norm_topk_prob` and `attention_bias`: it always
does what is asked for by the value that is accepted.
"""
DERIVED: Mapping[str, str] = {
    "csa_rate": f"compress_rates.{CSA}",
    "hca_rate": f"compress_rates.{HCA}",
    "scoring": "scoring_func",
    "attention_kinds": "layer_types",
    "hash_routed": "mlp_layer_types",
    "context_tokens_max": "max_position_embeddings (or model_max_length)",
    **dict.fromkeys(("rope_dim_main", "rope_scale_main", "frequencies_main"), "rope_parameters.main"),
    **dict.fromkeys(("rope_dim_compress", "rope_scale_compress", "frequencies_compress"), "rope_parameters.compress"),
}
"""Names in `Dimensions` of what is not in the tables above: the fields that it comes from."""
SHAPED = frozenset(
    {
        *("layer_types", "mlp_layer_types", "compress_rates", "compress_ratios", "num_hash_layers"),
        *("compress_rate_csa", "compress_rate_hca", "scoring_func", "tie_word_embeddings", "max_position_embeddings"),
        *("rope_parameters", "rope_scaling", "rope_theta", "compress_rope_theta", "partial_rotary_factor"),
        "qk_rope_head_dim",
    }
)
"""Fields that are carried out by code of their own."""


class Dimensions(msgspec.Struct, frozen=True, kw_only=True):
    """The numbers of `v4_config` that a checkpoint decides; counts unless the name says more."""

    vocab_count: int
    hidden_dim: int
    streams_count: int
    layers_count: int
    heads_count: int
    head_dim: int
    rope_dim_main: int
    rope_dim_compress: int
    query_rank: int
    output_groups: int
    output_rank: int
    window_tokens: int
    index_heads: int
    index_dim: int
    index_topk: int
    csa_rate: int
    hca_rate: int
    experts_count: int
    experts_active: int
    expert_dim: int
    scoring: int
    sinkhorn_rounds: int
    context_tokens_max: int
    norm_eps: float
    mix_eps: float
    swiglu_limit: float
    route_scale: float
    rope_scale_main: float
    rope_scale_compress: float
    frequencies_main: tuple[float, ...]
    frequencies_compress: tuple[float, ...]
    attention_kinds: tuple[int, ...]
    hash_routed: tuple[int, ...]


def read_dimensions(path: Path, config: Mapping[str, Any], length_max: float | None) -> tuple[Dimensions, bool]:
    """The numbers of a config, and whether its head is the embedding; `length_max` is the tokenizer's bound, if any.

    EngineError names the file, the field, its value and the bound.
    """
    fields = Fields(str(path), {name: value for name, value in config.items() if not name.startswith("_")})
    fields.one_of("model_type", FIXED["model_type"])
    fields.know({*COUNTS, *NUMBERS, *FIXED, *SHAPED, *WITHOUT_EFFECT})
    for name, accepted in FIXED.items():
        fields.one_of(name, accepted, default=accepted[0])
    counts = {
        to: fields.count(name, low, high, step, default) for name, (to, default, low, high, step) in COUNTS.items()
    }
    numbers = {to: fields.number(name, low, high, default) for name, (to, default, low, high) in NUMBERS.items()}
    context = fields.count("max_position_embeddings", 2, CONTEXT_TOKENS_MAX, default=CONTEXT_TOKENS_MAX)
    ropes = _ropes(fields, counts["head_dim"], context)
    layers_count = counts["layers_count"]
    csa_rate, hca_rate = _rates(fields)
    dimensions = Dimensions(
        **counts,
        **numbers,  # type: ignore[arg-type]  # the table names fields that are floats
        rope_dim_main=2 * len(ropes["main"].frequencies),
        rope_dim_compress=2 * len(ropes["compress"].frequencies),
        csa_rate=csa_rate,
        hca_rate=hca_rate,
        scoring=SCORINGS.index(fields.one_of("scoring_func", SCORINGS, default=SCORINGS[0])),
        context_tokens_max=context if length_max is None else min(context, int(length_max)),
        rope_scale_main=ropes["main"].scale,
        rope_scale_compress=ropes["compress"].scale,
        frequencies_main=ropes["main"].frequencies,
        frequencies_compress=ropes["compress"].frequencies,
        attention_kinds=tuple(map(KINDS.index, _attention(fields, layers_count))),
        hash_routed=tuple(int(kind == "hash_moe") for kind in _mlp(fields, layers_count)),
    )
    _check_together(fields, dimensions)
    return dimensions, fields.one_of("tie_word_embeddings", (False, True), default=False)


def differences(new: Dimensions, old: Dimensions) -> list[str]:
    """What makes another model of `new`: fields as config.json calls them, with both values where they are plain."""
    called = {entry[0]: name for name, entry in COUNTS.items()} | {entry[0]: name for name, entry in NUMBERS.items()}
    called.update(DERIVED)
    told: dict[str, str] = {}
    for name, was in msgspec.structs.asdict(old).items():
        value = getattr(new, name)
        if value != was:
            is_plain = name == "context_tokens_max" or name not in DERIVED or name.endswith("_rate")
            told.setdefault(called[name], f" {value!r}, not {was!r}" if is_plain else " differs")
    return [name + how for name, how in told.items()]


def _check_together(fields: Fields, d: Dimensions) -> None:
    """What only several fields together can break."""
    width = d.heads_count * d.head_dim
    if width % (16 * d.output_groups):
        bound = f"num_attention_heads * head_dim = {width} must be a multiple of 16 times it"
        raise fields.refused("o_groups", bound)
    if d.output_groups * d.output_rank % 16:
        raise fields.refused("o_lora_rank", f"times o_groups = {d.output_groups} it must be a multiple of 16")
    if d.experts_active > d.experts_count:
        raise fields.refused("num_experts_per_tok", f"must be at most n_routed_experts = {d.experts_count}")
    if CSA in (KINDS[kind] for kind in d.attention_kinds) and d.rope_dim_compress > d.index_dim:
        raise fields.refused("index_head_dim", f"must hold the rotary part, {d.rope_dim_compress}")


def _kinds(fields: Fields, name: str, kinds: object, accepted: tuple[str, ...], layers_count: int) -> list[str]:
    """A kind for every layer; more are of layers that are not there, as MTP's."""
    if not isinstance(kinds, list) or len(kinds) < layers_count:
        raise fields.refused(name, f"must be a list with a kind for each of num_hidden_layers = {layers_count}")
    for kind in kinds[:layers_count]:
        if kind not in accepted:
            raise fields.refused(name, f"holds {kind!r:.80}, and a kind must be one of {', '.join(accepted)}")
    return kinds[:layers_count]


def _attention(fields: Fields, layers_count: int) -> list[str]:
    if fields.has("layer_types"):
        return _kinds(fields, "layer_types", fields.values["layer_types"], KINDS, layers_count)
    if fields.has("compress_ratios"):
        ratios = fields.values["compress_ratios"]
        known = isinstance(ratios, list) and all(type(ratio) is int and ratio in RATIOS for ratio in ratios)
        if not known:
            raise fields.refused("compress_ratios", f"must be a list of {', '.join(map(str, RATIOS))}")
        return _kinds(fields, "compress_ratios", [RATIOS[ratio] for ratio in ratios], KINDS, layers_count)
    return [HCA if index < 2 or index % 2 == 0 else CSA for index in range(layers_count)]


def _mlp(fields: Fields, layers_count: int) -> list[str]:
    if fields.has("mlp_layer_types"):
        kinds = fields.values["mlp_layer_types"]
        return _kinds(fields, "mlp_layer_types", kinds, ("hash_moe", "moe"), layers_count)
    hashed = fields.count("num_hash_layers", 0, LAYERS_MAX, default=3)
    return ["hash_moe" if index < hashed else "moe" for index in range(layers_count)]


def _rates(fields: Fields) -> tuple[int, int]:
    given = fields.values.get("compress_rates")
    if given is not None and not isinstance(given, dict):
        raise fields.refused("compress_rates", "must be an object")
    rates = Fields(fields.source, given or {CSA: 4, HCA: 128}, "compress_rates.")
    rates.know({CSA, HCA})
    old = {CSA: "compress_rate_csa", HCA: "compress_rate_hca"}
    csa, hca = (
        fields.count(old[kind], 1, 4096) if fields.has(old[kind]) else rates.count(kind, 1, 4096) for kind in (CSA, HCA)
    )
    return csa, hca


def _ropes(fields: Fields, head_dim: int, context_tokens_max: int) -> dict[str, Rope]:
    """`rope_parameters` of sliding layers ("main") and of the others ("compress"); flat ones are of the others."""
    name = "rope_scaling" if fields.has("rope_scaling") else "rope_parameters"
    given = fields.values.get(name) or {}
    if not isinstance(given, dict):
        raise fields.refused(name, "must be an object")
    parts: dict[str, Any] = {label: given.get(label) for label in ("main", "compress")}
    if not all(isinstance(part, dict) for part in parts.values()):
        share = ROPE_DIM_SHARE
        if fields.has("qk_rope_head_dim"):
            share = fields.count("qk_rope_head_dim", 2, 2 * PAIRS_MAX) / head_dim
        share = fields.number("partial_rotary_factor", 0.0, 1.0, share)
        main, compress = (
            {"partial_rotary_factor": share, "rope_theta": fields.number(theta, 1.001, 1e12, default)}
            for theta, default in (("rope_theta", 1e4), ("compress_rope_theta", 160000.0))
        )
        scaling = {"attention_factor": 1.0} if "yarn" in (given.get("type"), given.get("rope_type")) else {}
        parts = {"main": main, "compress": scaling | given | compress}
    return {
        label: read_rope(
            Fields(fields.source, {"rope_type": part.get("type", "default")} | part, f"{name}.{label}."),
            head_dim,
            context_tokens_max,
        )
        for label, part in parts.items()
    }


def read_length_max(path: Path, tokenizer: Mapping[str, Any]) -> float | None:
    """`model_max_length` of a `tokenizer_config.json`, which may be as large as its writer likes."""
    value = tokenizer.get("model_max_length")
    if value is not None and (type(value) not in (int, float) or not value >= 2):
        raise EngineError(f"{path}: model_max_length is {value!r:.80}: must be a number, at least 2")
    return None if value is None else min(value, float(CONTEXT_TOKENS_MAX))
