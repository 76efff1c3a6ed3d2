"""A checkpoint folder that cannot be run is refused with the file and the rule."""

import json
import platform
import shutil
import struct
from pathlib import Path

import msgspec
import pytest

from rollout.engines.embedded.checkpoint import DEFAULT_CHECKPOINT, load_checkpoint
from rollout.engines.embedded.config import Dimensions, differences
from rollout.engines.embedded.engine import EmbeddedEngine
from rollout.engines.embedded.library import LIBRARY, load_library
from rollout.errors import EngineError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(shutil.copytree(DEFAULT_CHECKPOINT, tmp_path / "checkpoint"))


def change_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_the_shipped_checkpoint_loads_with_its_facts() -> None:
    checkpoint = load_checkpoint()
    assert checkpoint.dimensions.context_tokens_max == 2048
    assert len(checkpoint.weights_digest) == 64
    assert (checkpoint.fork_token_id, checkpoint.header_token_id) == (4034, 4035)


@pytest.mark.parametrize(
    "changes",
    [
        {"swiglu_limit": 1.0},
        {"routed_scaling_factor": 2.5},
        {"rms_norm_eps": 1e-5},
        {"hc_sinkhorn_iters": 5},
        {"index_topk": 256},
        {"sliding_window": 256},
        {"scoring_func": "sigmoid"},
        {"rope_parameters": {"rope_type": "default"}, "rope_theta": 20000.0},
    ],
    ids=str,
)
def test_the_same_tensors_under_another_config_are_other_weights(folder: Path, changes: dict) -> None:
    change_config(folder, **changes)
    assert load_checkpoint(folder).weights_digest != load_checkpoint().weights_digest


@pytest.mark.parametrize(
    "changes",
    [
        {"max_position_embeddings": 1024},
        {"transformers_version": "6", "use_cache": False},
        {"rope_parameters": None, "hidden_act": "swish"},
        {"compress_rates": None, "compress_rate_csa": 4, "compress_rate_hca": 128},
    ],
    ids=str,
)
def test_a_config_that_draws_the_same_is_no_other_weights(folder: Path, changes: dict) -> None:
    change_config(folder, **changes)
    assert load_checkpoint(folder).weights_digest == load_checkpoint().weights_digest


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"])
def test_a_missing_file_is_named(folder: Path, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises(EngineError, match=f"{name}: no such file"):
        load_checkpoint(folder)


@pytest.mark.parametrize("kept_bytes", [0, 4, 1000, 20_000_000])
def test_weights_that_were_cut_short_are_refused(folder: Path, kept_bytes: int) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:kept_bytes])
    with pytest.raises(EngineError, match=r"model.safetensors: (damaged|cannot be read)"):
        load_checkpoint(folder)


def test_a_route_to_an_expert_that_does_not_exist_is_refused(folder: Path) -> None:
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    size = struct.unpack_from("<Q", data)[0]
    begin = json.loads(data[8 : 8 + size])["model.layers.0.mlp.gate.tid2eid"]["data_offsets"][0]
    data[8 + size + begin] = 8
    path.write_bytes(data)
    with pytest.raises(EngineError, match=r"layers.0.mlp.gate.tid2eid routes a token to an expert that does not exist"):
        load_checkpoint(folder)


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        ({"model_type": "llama"}, "model_type is 'llama': must be 'deepseek_v4'"),
        ({"hc_mult": 9}, "hc_mult is 9: must be an integer from 1 to 8"),
        ({"hc_mult": True}, "hc_mult is True"),
        ({"hidden_size": 250}, "hidden_size is 250: must be a multiple of 16 from 16 to 16384"),
        ({"vocab_size": "4096"}, "vocab_size is '4096'"),
        ({"num_hidden_layers": 7}, "layer_types is .*: must be a list with a kind for each of num_hidden_layers = 7"),
        ({"num_hidden_layers": 5}, "27 tensors are none of this model's: model.layers.5.attn_hc.base"),
        ({"n_routed_experts": 513}, "n_routed_experts is 513"),
        ({"n_routed_experts": 6}, r"model.layers.0.mlp.gate.weight is BF16 \[8, 256\], not BF16 \[6, 256\]"),
        ({"num_experts_per_tok": 9}, "num_experts_per_tok is 9: must be at most n_routed_experts = 8"),
        ({"o_groups": 3}, "o_groups is 3: num_attention_heads [*] head_dim = 512 must be a multiple of 16 times it"),
        ({"o_lora_rank": 4}, "o_lora_rank is 4: times o_groups = 2 it must be a multiple of 16"),
        ({"layer_types": ["full_attention"] * 6}, "layer_types is .* holds 'full_attention'"),
        ({"mlp_layer_types": 3}, "mlp_layer_types is 3"),
        ({"hidden_size": 512}, "tensor model.embed_tokens.weight is BF16"),
        ({"index_head_dim": 16}, "index_head_dim is 16: must hold the rotary part, 32"),
        ({"rms_norm_eps": 0.0}, "rms_norm_eps is 0.0: must be a number from 1e-12 to 1"),
        ({"swiglu_limit": float("nan")}, "swiglu_limit is nan"),
        ({"routed_scaling_factor": float("inf")}, "routed_scaling_factor is inf"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu': must be 'silu' or 'swish'"),
        ({"scoring_func": "softmax"}, "scoring_func is 'softmax': must be 'sqrtsoftplus' or 'sigmoid'"),
        ({"norm_topk_prob": False}, "norm_topk_prob is False: must be True"),
        ({"n_shared_experts": 2}, "n_shared_experts is 2: must be 1"),
        ({"attention_bias": True}, "attention_bias is True: must be False"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config is .*: must be None"),
        ({"tie_word_embeddings": True}, r"lm_head.weight \(tie_word_embeddings is true\)"),
        (
            {"compress_rates": {"heavily_compressed_attention": 8}},
            "compress_rates.compressed_sparse_attention is missing",
        ),
        ({"max_position_embeddings": 1}, "max_position_embeddings is 1: must be an integer from 2 to 1048576"),
        ({"softcap": 30.0}, "softcap is 30.0: this engine does not know the field"),
    ],
    ids=str,
)
def test_a_config_beyond_the_bounds_is_refused_with_file_field_value_and_bound(
    folder: Path, changes: dict, rule: str
) -> None:
    change_config(folder, **changes)
    with pytest.raises(EngineError, match=rf"^{folder}/(config.json|model.safetensors): .*{rule}"):
        load_checkpoint(folder)


@pytest.mark.parametrize(
    ("rope", "rule"),
    [
        ({"rope_type": "dynamic", "factor": 2.0}, "compress.rope_type is 'dynamic': must be 'default' or 'linear'"),
        ({"rope_type": "longrope"}, "compress.rope_type is 'longrope'"),
        ({"rope_type": "linear"}, "compress.factor is missing: must be a number from 1 to 1e"),
        ({"rope_type": "yarn", "factor": 0.5}, "compress.factor is 0.5"),
        ({"rope_type": "yarn", "factor": 4, "truncate": False}, "compress.truncate is False: must be True"),
        ({"rope_type": "default", "factor": 4.0}, "compress.factor is 4.0: this engine does not know the field"),
        (
            {"rope_type": "default", "partial_rotary_factor": 0.3},
            "compress.partial_rotary_factor is 0.3: head_dim",
        ),
        ({"rope_type": "default", "rope_theta": 0}, "compress.rope_theta is 0"),
    ],
    ids=str,
)
def test_rotary_parameters_that_cannot_be_carried_out_are_refused_by_name(folder: Path, rope: dict, rule: str) -> None:
    part = {"rope_theta": 1e4, "partial_rotary_factor": 0.5}
    change_config(folder, rope_parameters={"main": {"rope_type": "default", **part}, "compress": part | rope})
    with pytest.raises(EngineError, match=rf"^{folder}/config.json: rope_parameters.{rule}"):
        load_checkpoint(folder)


def test_a_config_that_is_no_json_is_refused(folder: Path) -> None:
    (folder / "config.json").write_text("{")
    with pytest.raises(EngineError, match="cannot be read as JSON"):
        load_checkpoint(folder)


async def test_an_engine_with_a_broken_checkpoint_fails_to_open_and_stays_closed(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    engine = EmbeddedEngine(folder)
    with pytest.raises(EngineError, match="no such file"):
        await engine.open()
    await engine.close()


CPUINFO = "processor\t: 0\nvendor_id\t: Any\nvmx flags\t: avx2 fma\nflags\t\t: {}\n\n"
X86_64_V3 = "fpu sse2 avx avx2 fma bmi1 bmi2 f16c movbe abm"


def test_a_processor_that_lacks_the_instructions_of_the_build_is_told_before_any_of_them_runs(tmp_path: Path) -> None:
    """The library says what it needs: nothing on machines where it was built without."""
    old, new, other = (tmp_path / name for name in ("old", "new", "other"))
    old.write_text(CPUINFO.format("fpu sse2 avx bmi1 bmi2 f16c movbe abm avx2_not fma4"))
    new.write_text(CPUINFO.format(X86_64_V3))
    other.write_text("processor\t: 0\nFeatures\t: fp asimd\n")
    assert load_library(LIBRARY, new)
    assert load_library(LIBRARY, other)
    assert load_library(LIBRARY, tmp_path / "nowhere")
    if platform.machine() == "x86_64":
        with pytest.raises(EngineError, match="this processor lacks avx2, fma: run on one of 2015 or later"):
            load_library(LIBRARY, old)
    else:
        assert load_library(LIBRARY, old)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"routed_scaling_factor": 3.0}, ["routed_scaling_factor 3.0, not 1.5"]),
        ({"sliding_window": 128}, ["sliding_window 128, not 512"]),
        ({"scoring_func": "sigmoid"}, ["scoring_func differs"]),
        ({"max_position_embeddings": 1024}, ["max_position_embeddings (or model_max_length) 1024, not 2048"]),
        (
            {"rope_parameters": {"rope_type": "default"}, "rope_theta": 20000.0},
            ["rope_parameters.main differs"],
        ),
    ],
    ids=str,
)
def test_models_differ_in_fields_as_the_config_calls_them(folder: Path, changes: dict, said: list[str]) -> None:
    change_config(folder, **changes)
    assert differences(load_checkpoint(folder).dimensions, load_checkpoint().dimensions) == said


def test_whatever_two_models_differ_in_has_a_name(folder: Path) -> None:
    shipped = load_checkpoint().dimensions
    for name in Dimensions.__struct_fields__:
        (said,) = differences(msgspec.structs.replace(shipped, **{name: None}), shipped)
        assert said
