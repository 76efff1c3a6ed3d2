"""What `DeepseekV4Config` can say: every field of it is known to the engine, and read as transformers reads it."""

import copy
import dataclasses
import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DeepseekV4Config
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4RotaryEmbedding

from rollout.engines.config_fields import WITHOUT_EFFECT
from rollout.engines.embedded.config import (
    COUNTS,
    FIXED,
    KINDS,
    NUMBERS,
    SHAPED,
    Dimensions,
    read_dimensions,
)
from tests.conformance.v4_models import CSA, HCA, SLIDING, make_model, random_config

pytestmark = pytest.mark.filterwarnings("default")  # the oracle's own deprecations are not ours

PATH = Path("config.json")
LAYERS = {"num_hidden_layers": 4}
SMALL = {"head_dim": 32, "partial_rotary_factor": 0.5}
RAW: dict[str, dict[str, Any]] = {
    "nothing said": {},
    "fewer layers": LAYERS,
    "flat yarn, as DeepSeek writes it": {
        **LAYERS,
        "rope_scaling": {
            "type": "yarn",
            "factor": 16,
            "original_max_position_embeddings": 65536,
            "beta_fast": 32,
            "beta_slow": 1,
        },
        "qk_rope_head_dim": 64,
        "compress_ratios": [0, 0, 4, 128, 4],
        "num_hash_layers": 2,
    },
    "sizes like V4-Pro's": {
        "hidden_size": 7168,
        "num_hidden_layers": 61,
        "num_attention_heads": 128,
        "o_groups": 16,
        "n_routed_experts": 384,
        "index_topk": 1024,
    },
    "old names of rates": {**LAYERS, "compress_rate_csa": 8, "compress_rate_hca": 64},
    "more kinds than layers": {**LAYERS, "layer_types": [SLIDING, CSA, HCA, CSA, HCA], "mlp_layer_types": ["moe"] * 5},
    "yarn that derives its scale": {
        **LAYERS,
        **SMALL,
        "rope_parameters": {
            "main": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.25},
            "compress": {
                "rope_type": "yarn",
                "factor": 8.0,
                "rope_theta": 1.6e5,
                "partial_rotary_factor": 0.5,
                "original_max_position_embeddings": 4096,
                "mscale": 0.7,
                "mscale_all_dim": 0.3,
            },
        },
    },
    "flat linear": {**LAYERS, **SMALL, "rope_parameters": {"rope_type": "linear", "factor": 3.0}},
}


def default(name: str) -> object:
    (field,) = (field for field in dataclasses.fields(DeepseekV4Config) if field.name == name)
    return field.default


def test_every_field_is_carried_out_or_fixed_or_without_effect() -> None:
    """Fails when a later transformers has another: find out what it does to the logits, and say so."""
    fields = {field.name for field in dataclasses.fields(DeepseekV4Config)}
    assert fields - {*COUNTS, *NUMBERS, *FIXED, *SHAPED, *WITHOUT_EFFECT} == set()
    tables: list[set[str]] = [set(COUNTS), set(NUMBERS), set(FIXED), set(SHAPED), set(WITHOUT_EFFECT)]
    assert sum(map(len, tables)) == len(set.union(*tables)), "and only one of them"


def test_an_absent_field_has_the_default_of_transformers() -> None:
    for name, (_, ours, *_) in {**COUNTS, **NUMBERS}.items():
        assert default(name) == ours, name
    for name, (ours, *_) in FIXED.items():
        if name in {field.name for field in dataclasses.fields(DeepseekV4Config)}:
            assert default(name) == ours, name


@pytest.mark.parametrize("name", RAW)
def test_old_and_new_spellings_are_read_as_transformers_reads_them(name: str) -> None:
    ours, is_tied = read_dimensions(PATH, {"model_type": "deepseek_v4", **copy.deepcopy(RAW[name])}, None)
    theirs = DeepseekV4Config(**copy.deepcopy(RAW[name]))
    assert_same(ours, theirs)
    assert is_tied == theirs.tie_word_embeddings
    written = json.loads(theirs.to_json_string())
    assert read_dimensions(PATH, written, None)[0] == ours, "and what it writes is read as the same"


def assert_same(ours: Dimensions, theirs: DeepseekV4Config) -> None:
    for field, (name, *_) in {**COUNTS, **NUMBERS}.items():
        assert getattr(ours, name) == getattr(theirs, field), field
    assert [KINDS[kind] for kind in ours.attention_kinds] == theirs.layer_types
    assert ["hash_moe" if hashed else "moe" for hashed in ours.hash_routed] == theirs.mlp_layer_types
    assert {CSA: ours.csa_rate, HCA: ours.hca_rate} == theirs.compress_rates
    assert ours.context_tokens_max == theirs.max_position_embeddings
    rotary = DeepseekV4RotaryEmbedding(theirs)
    for label, told, scale in (
        ("main", ours.frequencies_main, ours.rope_scale_main),
        ("compress", ours.frequencies_compress, ours.rope_scale_compress),
    ):
        assert torch.allclose(torch.tensor(told), getattr(rotary, f"{label}_inv_freq"), rtol=3e-7, atol=0)
        assert scale == pytest.approx(getattr(rotary, f"{label}_attention_scaling"), rel=1e-12)


@pytest.mark.parametrize(
    "changes",
    [
        *(
            {"attention_dropout": 0.5},
            {"router_jitter_noise": 0.5},
            {"router_aux_loss_coef": 0.5},
            {"use_cache": False},
        ),
        *({"initializer_range": 0.5}, {"num_nextn_predict_layers": 3}, {"chunk_size_feed_forward": 2}),
        *({"bos_token_id": 5}, {"eos_token_id": [5, 6]}, {"pad_token_id": 5}, {"output_router_logits": True}),
    ],
    ids=str,
)
def test_a_field_without_effect_changes_no_logit_of_transformers(changes: dict[str, object]) -> None:
    config, token_ids = random_config(random.Random(3)), torch.arange(40)[None] % 64
    with torch.no_grad():
        one, other = (make_model({**config, **more}, 3)(token_ids).logits for more in ({}, changes))
    assert torch.equal(one, other)
