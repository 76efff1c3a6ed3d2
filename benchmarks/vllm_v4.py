"""A checkpoint of DeepSeek-V4 in small, random weights in the layout and the number formats of the published ones.

Attention and width are V4-Flash's own, since the kernels are made for those sizes; layers, experts and vocabulary are
few.  Linear layers are fp8 with a power of two for each block of 128 x 128, experts fp4 with one for each 32.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from rollout.engines.vllm.tiny import write_safetensors, write_tiny_model

Tensor = tuple[str, tuple[int, ...], bytes]
HIDDEN, HEADS, HEAD_DIM, Q_RANK, O_RANK, O_GROUPS = 4096, 64, 512, 1024, 1024, 8
INDEX_HEADS, INDEX_DIM, MIX, EXPERTS, INNER, TOP_K = 64, 128, 4, 32, 512, 6
RATIOS = (0, 4, 128, 4)
HASHED_LAYERS = 1
CONFIG: dict[str, Any] = {
    "architectures": ["DeepseekV4ForCausalLM"], "model_type": "deepseek_v4", "hidden_size": HIDDEN,
    "num_hidden_layers": len(RATIOS), "compress_ratios": [*RATIOS, 0], "num_attention_heads": HEADS,
    "num_key_value_heads": 1, "head_dim": HEAD_DIM, "qk_rope_head_dim": 64, "q_lora_rank": Q_RANK,
    "o_lora_rank": O_RANK, "o_groups": O_GROUPS, "sliding_window": 128, "index_n_heads": INDEX_HEADS,
    "index_head_dim": INDEX_DIM, "index_topk": 512, "hc_mult": MIX, "hc_sinkhorn_iters": 20, "hc_eps": 1e-6,
    "n_routed_experts": EXPERTS, "n_shared_experts": 1, "num_experts_per_tok": TOP_K, "moe_intermediate_size": INNER,
    "num_hash_layers": HASHED_LAYERS, "topk_method": "noaux_tc", "scoring_func": "sqrtsoftplus", "norm_topk_prob": True,
    "routed_scaling_factor": 1.5, "swiglu_limit": 10.0, "hidden_act": "silu", "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0, "compress_rope_theta": 160000.0, "max_position_embeddings": 65536,
    "rope_scaling": {"type": "yarn", "rope_type": "yarn", "factor": 16.0, "original_max_position_embeddings": 4096,
                     "beta_fast": 32, "beta_slow": 1},
    "attention_bias": False, "tie_word_embeddings": False, "bos_token_id": 0, "eos_token_id": 1, "dtype": "bfloat16",
    "expert_dtype": "fp4", "num_nextn_predict_layers": 0,
    "quantization_config": {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic",
                            "weight_block_size": [128, 128], "scale_fmt": "ue8m0"},
}  # fmt: skip
_FP8_RMS, _FP4_RMS = 0.8, 2.9


def write_small_v4(folder: Path, seed: int = 0) -> Path:
    """Write config, tokenizer and 0.7 GB of weights to `folder`; returns it."""
    write_tiny_model(folder)
    vocab_count = json.loads((folder / "config.json").read_text())["vocab_size"]
    (folder / "config.json").write_text(json.dumps(CONFIG | {"vocab_size": vocab_count}, indent=1))
    drawn = _Drawn(seed)
    drawn.half("embed", (vocab_count, HIDDEN), 1.0)
    drawn.half("head", (vocab_count, HIDDEN), 3.0 / HIDDEN**0.5)
    drawn.norm("norm", HIDDEN)
    drawn.mixing("hc_head", MIX, 1)
    for layer, ratio in enumerate(RATIOS):
        _draw_attention(drawn, f"layers.{layer}.attn", ratio)
        _draw_experts(drawn, f"layers.{layer}.ffn", vocab_count if layer < HASHED_LAYERS else 0)
        for part in ("attn", "ffn"):
            drawn.norm(f"layers.{layer}.{part}_norm", HIDDEN)
            drawn.mixing(f"layers.{layer}.hc_{part}", (2 + MIX) * MIX, 3)
    write_safetensors(folder / "model.safetensors", drawn.tensors)
    return folder


def read_hashed_experts(folder: Path) -> np.ndarray[Any, Any]:
    """The first layer's experts for each token, as `write_small_v4` drew them."""
    with (folder / "model.safetensors").open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        entry = json.loads(file.read(size))["layers.0.ffn.gate.tid2eid"]
        file.seek(8 + size + entry["data_offsets"][0])
        count = int(np.prod(entry["shape"]))
        return np.frombuffer(file.read(4 * count), "<i4").reshape(entry["shape"])


class _Drawn:
    """Tensors drawn so far; each keeps the size of what goes through it about the same."""

    def __init__(self, seed: int) -> None:
        self.chance = np.random.default_rng(seed)
        self.tensors: dict[str, Tensor] = {}

    def single(self, name: str, shape: tuple[int, ...], scale: float) -> None:
        values = self.chance.standard_normal(shape, np.float32) * np.float32(scale)
        self.tensors[name] = ("F32", shape, values.tobytes())

    def half(self, name: str, shape: tuple[int, ...], scale: float) -> None:
        values = self.chance.standard_normal(shape, np.float32) * np.float32(scale)
        self.tensors[f"{name}.weight"] = ("BF16", shape, (values.view("<u4") >> 16).astype("<u2").tobytes())

    def norm(self, name: str, size: int) -> None:
        self.tensors[f"{name}.weight"] = ("BF16", (size,), np.full(size, 0x3F80, "<u2").tobytes())

    def mixing(self, name: str, size: int, scales_count: int) -> None:
        """The weights of a hyper-connection."""
        self.single(f"{name}_fn", (size, MIX * HIDDEN), (MIX * HIDDEN) ** -0.5)
        self.single(f"{name}_base", (size,), 0.5)
        self.tensors[f"{name}_scale"] = ("F32", (scales_count,), np.full(scales_count, 0.5, "<f4").tobytes())

    def fp8(self, name: str, rows: int, columns: int) -> None:
        """Magnitudes from 1/8 to 1.9: no byte is a NaN."""
        sign = self.chance.integers(0, 2, (rows, columns), np.uint8) << 7
        values = self.chance.integers(0x20, 0x40, (rows, columns), np.uint8) | sign
        self.tensors[f"{name}.weight"] = ("F8_E4M3", (rows, columns), values.tobytes())
        blocks = (-(-rows // 128), -(-columns // 128))
        self.tensors[f"{name}.scale"] = ("F8_E8M0", blocks, _powers(columns, _FP8_RMS, blocks))

    def fp4(self, name: str, rows: int, columns: int) -> None:
        """Two to a byte, every byte allowed."""
        shape, blocks = (rows, columns // 2), (rows, columns // 32)
        self.tensors[f"{name}.weight"] = ("U8", shape, self.chance.bytes(rows * columns // 2))
        self.tensors[f"{name}.scale"] = ("U8", blocks, _powers(columns, _FP4_RMS, blocks))


def _powers(columns: int, rms: float, blocks: tuple[int, int]) -> bytes:
    """One exponent for all, which makes a row of `columns` about one long."""
    return bytes([127 + round(np.log2(columns**-0.5 / rms))]) * (blocks[0] * blocks[1])


def _draw_attention(drawn: _Drawn, name: str, ratio: int) -> None:
    drawn.single(f"{name}.attn_sink", (HEADS,), 1.0)
    drawn.fp8(f"{name}.wq_a", Q_RANK, HIDDEN)
    drawn.fp8(f"{name}.wkv", HEAD_DIM, HIDDEN)
    drawn.norm(f"{name}.q_norm", Q_RANK)
    drawn.norm(f"{name}.kv_norm", HEAD_DIM)
    drawn.fp8(f"{name}.wq_b", HEADS * HEAD_DIM, Q_RANK)
    drawn.fp8(f"{name}.wo_a", O_GROUPS * O_RANK, HEADS * HEAD_DIM // O_GROUPS)
    drawn.fp8(f"{name}.wo_b", HIDDEN, O_GROUPS * O_RANK)
    if ratio:
        _draw_compressor(drawn, f"{name}.compressor", ratio, HEAD_DIM)
    if ratio == 4:
        drawn.fp8(f"{name}.indexer.wq_b", INDEX_HEADS * INDEX_DIM, Q_RANK)
        drawn.half(f"{name}.indexer.weights_proj", (INDEX_HEADS, HIDDEN), HIDDEN**-0.5)
        _draw_compressor(drawn, f"{name}.indexer.compressor", ratio, INDEX_DIM)


def _draw_compressor(drawn: _Drawn, name: str, ratio: int, size: int) -> None:
    width = size * (2 if ratio == 4 else 1)  # windows of four overlap
    drawn.single(f"{name}.ape", (ratio, width), 0.1)
    drawn.half(f"{name}.wkv", (width, HIDDEN), HIDDEN**-0.5)
    drawn.half(f"{name}.wgate", (width, HIDDEN), HIDDEN**-0.5)
    drawn.norm(f"{name}.norm", size)


def _draw_experts(drawn: _Drawn, name: str, hashed_tokens: int) -> None:
    drawn.half(f"{name}.gate", (EXPERTS, HIDDEN), HIDDEN**-0.5)
    if hashed_tokens:
        table = np.argsort(drawn.chance.random((hashed_tokens, EXPERTS)))[:, :TOP_K].astype("<i4")
        drawn.tensors[f"{name}.gate.tid2eid"] = ("I32", table.shape, table.tobytes())
    else:
        drawn.single(f"{name}.gate.bias", (EXPERTS,), 0.01)
    for matrix, rows, columns in (("w1", INNER, HIDDEN), ("w2", HIDDEN, INNER), ("w3", INNER, HIDDEN)):
        drawn.fp8(f"{name}.shared_experts.{matrix}", rows, columns)
        for expert in range(EXPERTS):
            drawn.fp4(f"{name}.experts.{expert}.{matrix}", rows, columns)
