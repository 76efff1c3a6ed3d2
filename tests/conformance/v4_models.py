"""Small models of DeepSeek-V4 with random weights, made by transformers, as checkpoint folders of the engine."""

import copy
import json
import math
import random
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import DeepseekV4Config, DeepseekV4ForCausalLM

from toolcall_dsl.dialect import V4

SLIDING, CSA, HCA = "sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention"
VOCAB_COUNT = 256 + 24
assert len(V4.control_tokens) <= 24


def random_config(source: random.Random, **changes: object) -> dict[str, object]:
    """A config within the engine's bounds, small enough for a test, in which everything that can bite does."""
    heads, head_dim = source.choice([(2, 16), (3, 32), (4, 24), (8, 16), (12, 16), (4, 8)])
    groups = source.choice([g for g in (1, 2, 4) if heads * head_dim % (16 * g) == 0])
    rope_dim = source.choice([dim for dim in (2, 4, 8, 16) if dim <= head_dim])
    layers_count, experts_count = source.randint(4, 6), source.randint(2, 20)
    kinds = [SLIDING, CSA, HCA, CSA, *source.choices([SLIDING, CSA, HCA], k=layers_count - 4)]
    mlp_kinds = ["hash_moe", "moe", *source.choices(["hash_moe", "moe"], k=layers_count - 2)]
    rates = (source.randint(1, 6), source.randint(7, 24))
    source.shuffle(kinds)
    source.shuffle(mlp_kinds)
    return {
        "vocab_size": VOCAB_COUNT,
        "hidden_size": source.choice([32, 48, 64]),
        "hc_mult": source.choice([1, 2, 3, 4, 4, 5, 8]),
        "num_hidden_layers": layers_count,
        "layer_types": kinds,
        "mlp_layer_types": mlp_kinds,
        "num_attention_heads": heads,
        "head_dim": head_dim,
        "partial_rotary_factor": rope_dim / head_dim,
        "q_lora_rank": source.choice([16, 32, 48]),
        "o_groups": groups,
        "o_lora_rank": source.choice([16, 32]) // groups,
        "sliding_window": source.randint(3, 40),
        "compress_rates": dict(zip(source.choice([(CSA, HCA), (HCA, CSA)]), rates, strict=True)),
        "index_n_heads": source.randint(1, 5),
        "index_head_dim": source.choice([dim for dim in (8, 16, 24) if dim >= rope_dim]),
        "index_topk": source.randint(2, 6),
        "n_routed_experts": experts_count,
        "num_experts_per_tok": source.randint(1, min(4, experts_count)),
        "moe_intermediate_size": source.choice([16, 32, 48]),
        "scoring_func": source.choice(["sqrtsoftplus", "sigmoid"]),
        "routed_scaling_factor": source.choice([0.5, 1.5, 2.5]),
        "swiglu_limit": source.choice([0.5, 2.0, 10.0]),
        "hc_sinkhorn_iters": source.choice([1, 4, 20]),
        "tie_word_embeddings": source.random() < 0.5,
        "max_position_embeddings": 256,
        **changes,
    }


def make_model(config: dict[str, object], seed: int) -> DeepseekV4ForCausalLM:
    """A model whose parameters are random enough for every part to matter, each a bf16 value, held in float32."""
    torch.set_num_threads(1)
    model = DeepseekV4ForCausalLM(DeepseekV4Config(**config)).eval()
    noise = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if name.endswith("tid2eid"):
                ranks = torch.rand(tensor.shape[0], config["n_routed_experts"], generator=noise)
                tensor.copy_(ranks.argsort(dim=-1)[:, : tensor.shape[1]])
                tensor[::5] = 0  # one expert several times, as a table that nobody filled in says
            elif not name.endswith("inv_freq"):
                values = torch.randn(tensor.shape, generator=noise)
                if tensor.dim() > 1 and not name.endswith(("embed_tokens.weight", "position_bias")):
                    values *= 1.5 / math.sqrt(tensor.shape[-1])
                elif name.endswith("norm.weight"):
                    values = 1 + 0.2 * values
                tensor.copy_(values.to(torch.bfloat16))
    return model


def save(model: DeepseekV4ForCausalLM, folder: Path, *, as_transformers: bool = False) -> Path:
    """A checkpoint folder: tensors as the modules are called, or as `save_pretrained` calls them."""
    stored = copy.deepcopy(model).to(torch.bfloat16)
    stored.save_pretrained(folder)
    if not as_transformers:
        tensors = {name: tensor.contiguous() for name, tensor in stored.state_dict().items()}
        if model.config.tie_word_embeddings:
            del tensors["lm_head.weight"]
        save_file(tensors, folder / "model.safetensors")
    write_tokenizer(folder)
    return folder


def write_tokenizer(folder: Path) -> None:
    """The 256 bytes, and the control tokens behind them."""
    vocabulary = {f"<{byte:02x}>": byte for byte in range(256)}
    added = [{"id": 256 + i, "content": token} for i, token in enumerate(V4.control_tokens)]
    (folder / "tokenizer.json").write_text(json.dumps({"added_tokens": added, "model": {"vocab": vocabulary}}))
    (folder / "tokenizer_config.json").write_text("{}")


def break_ties_by_age(model: DeepseekV4ForCausalLM) -> None:
    """Scores of exactly 0 are common (a ReLU) and torch.topk picks any of them: here the older wins, as in the engine.

    1e-12 an entry is far below the last bit of every other score.
    """
    for name, module in model.named_modules():
        if name.endswith("indexer.scorer"):
            module.register_forward_hook(lambda _, __, scores: scores - 1e-12 * torch.arange(scores.shape[-1]))
