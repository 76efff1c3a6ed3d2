"""A tiny model with random weights, for a real vLLM on any machine: two layers of Qwen3, float32, 2.5 MB.

It speaks nonsense, in the vocabulary of the embedded checkpoint, so that a service can run over it.  A seed gives the
same bytes everywhere: nothing here needs torch.

See: docs/serving.md, "Engines"; safetensors' format description.
"""

from __future__ import annotations

import filecmp
import json
import shutil
import struct
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from rollout.engines.embedded.checkpoint import DEFAULT_CHECKPOINT
from rollout.errors import RequestError

Tensors = dict[str, tuple[str, tuple[int, ...], bytes]]
"""By name: type as the format calls it, shape, and little-endian contents."""
_CONFIG, _WEIGHTS = "config.json", "model.safetensors"
_TOKENIZER = ("tokenizer.json", "tokenizer_config.json")
_SCRATCH = ".tiny-"
"""What a folder's name begins with in which a model is written; a kill may have left one."""
_HIDDEN, _HEADS, _KV_HEADS, _HEAD_DIM, _INNER, _LAYERS = 64, 4, 2, 32, 128, 2
CONTEXT_TOKENS_MAX = 2048
CONFIG: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "dtype": "float32",
    "head_dim": _HEAD_DIM,
    "hidden_act": "silu",
    "hidden_size": _HIDDEN,
    "intermediate_size": _INNER,
    "max_position_embeddings": CONTEXT_TOKENS_MAX,
    "num_attention_heads": _HEADS,
    "num_hidden_layers": _LAYERS,
    "num_key_value_heads": _KV_HEADS,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
}
_WIDTHS = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
_EXPERTS = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "moe_intermediate_size": _INNER,
    "norm_topk_prob": True,
    "num_experts_per_tok": 2,
}
_HEAD_GAIN = 3.0
"""What the best token has before the next: float32 never confuses them, and chance still has a choice."""


def write_tiny_model(
    folder: Path, seed: int = 0, experts_count: int = 0, *, scale: int = 1, layers_count: int = _LAYERS
) -> Path:
    """Write config, tokenizer and weights to `folder`, which is made if need be; returns it.

    With `experts_count` each layer has that many, and two of them for a token: the model to see routes with.  `scale`
    is how many times wider it is, for who wants it to take its time.  RequestError if another model lies there.
    """
    vocab_count: int = json.loads((DEFAULT_CHECKPOINT / "config.json").read_text())["vocab_size"]
    routed = {**_EXPERTS, "num_experts": experts_count} if experts_count else {}
    config = CONFIG | routed | {name: CONFIG[name] * scale for name in _WIDTHS}
    config |= {"vocab_size": vocab_count, "num_hidden_layers": layers_count}
    chance = np.random.default_rng(seed)
    tensors: Tensors = {}
    for name, shape in _shapes(config, experts_count).items():
        gain = _HEAD_GAIN if name.startswith("lm_head") else 1.0
        spread = gain if "embed" in name else gain / shape[-1] ** 0.5
        values = np.ones(shape) if len(shape) == 1 else chance.standard_normal(shape) * spread
        tensors[name] = ("F32", shape, values.astype("<f4").tobytes())
    _put(folder, json.dumps(config, indent=1), tensors)
    return folder


def _put(folder: Path, config: str, tensors: Tensors) -> None:
    """Write a model, each file whole or not at all, and in the place of none but its like.  RequestError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for found in (*folder.glob(_CONFIG), *folder.glob("*.safetensors")):
            if found.name != _WEIGHTS and not (found.name == _CONFIG and found.read_bytes() == config.encode()):
                raise _other_model(found)
        for found in folder.iterdir():
            if found.name not in {_CONFIG, _WEIGHTS, *_TOKENIZER} and not found.name.startswith(_SCRATCH):
                raise RequestError(f"{found} is no file of this model: give a new or an empty folder")
        with tempfile.TemporaryDirectory(prefix=_SCRATCH, dir=folder) as scratch:
            new = Path(scratch)
            write_safetensors(new / _WEIGHTS, tensors)
            if (folder / _WEIGHTS).exists() and not filecmp.cmp(new / _WEIGHTS, folder / _WEIGHTS, shallow=False):
                raise _other_model(folder / _WEIGHTS)
            (new / _CONFIG).write_text(config)
            for name in _TOKENIZER:
                shutil.copyfile(DEFAULT_CHECKPOINT / name, new / name)
            for path in new.iterdir():
                path.replace(folder / path.name)
    except OSError as error:
        raise RequestError(f"cannot write a model to {folder}: {error.strerror or error}") from error


def _other_model(found: Path) -> RequestError:
    return RequestError(f"{found} is of another model, which would be overwritten: give another folder, or remove it")


def write_safetensors(path: Path, tensors: Tensors) -> None:
    """A file of these tensors."""
    header: dict[str, dict[str, object]] = {}
    end = 0
    for name, (dtype, shape, data) in tensors.items():
        start, end = end, end + len(data)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.writelines(data for _, _, data in tensors.values())


def _shapes(config: dict[str, Any], experts_count: int) -> dict[str, tuple[int, ...]]:
    """By tensor; the last dimension of a matrix is what it takes in."""
    hidden, inside, vocab_count = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    query, pair = config["num_attention_heads"] * _HEAD_DIM, config["num_key_value_heads"] * _HEAD_DIM
    layer: dict[str, tuple[int, ...]] = {
        "input_layernorm": (hidden,),
        "self_attn.q_proj": (query, hidden),
        "self_attn.k_proj": (pair, hidden),
        "self_attn.v_proj": (pair, hidden),
        "self_attn.o_proj": (hidden, query),
        "self_attn.q_norm": (_HEAD_DIM,),
        "self_attn.k_norm": (_HEAD_DIM,),
        "post_attention_layernorm": (hidden,),
    }
    inner = {"gate_proj": (inside, hidden), "up_proj": (inside, hidden), "down_proj": (hidden, inside)}
    for block in [f"mlp.experts.{i}" for i in range(experts_count)] or ["mlp"]:
        layer |= {f"{block}.{name}": shape for name, shape in inner.items()}
    if experts_count:
        layer["mlp.gate"] = (experts_count, hidden)
    layers_count = config["num_hidden_layers"]
    names = {f"model.layers.{i}.{name}": shape for i in range(layers_count) for name, shape in layer.items()}
    outer = {"model.embed_tokens": (vocab_count, hidden), "model.norm": (hidden,), "lm_head": (vocab_count, hidden)}
    return {f"{name}.weight": shape for name, shape in (outer | names).items()}
