"""A checkpoint folder as the C engine needs it: dimensions, tensors, and the facts to record.

Reading is strict: every tensor the architecture needs must be there in its dtype and shape, and
every dimension must be one that the kernels support, because the C side trusts what it is given.
Nothing is downloaded or converted; the weights are mapped and copied once by `v4_create`.

See: `v4.h` (tensor table), safetensors' format description, docs/architecture.md, "Engine".
"""

from __future__ import annotations

import hashlib
import json
import mmap
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec

from rollout.errors import EngineError

DEFAULT_CHECKPOINT = Path(__file__).parent / "checkpoint"
HEADER_BYTES_MAX = 16 << 20
LAYERS_MAX = 64
"""As `V4_LAYERS_MAX` of v4.h."""
STREAMS = 4
KINDS = {"sliding_attention": 0, "compressed_sparse_attention": 1, "heavily_compressed_attention": 2}
FORK_TOKEN = "<｜User｜>"  # noqa: S105 - a token of the vocabulary, not a secret
HEADER_TOKEN = "<｜Assistant｜>"  # noqa: S105 - the same

GLOBALS = (
    "model.embed_tokens.weight",
    "lm_head.weight",
    "model.norm.weight",
    "model.hc_head.hc_fn",
    "model.hc_head.hc_base",
    "model.hc_head.hc_scale",
)
LAYER = (
    "attn_hc.fn",
    "attn_hc.base",
    "attn_hc.scale",
    "ffn_hc.fn",
    "ffn_hc.base",
    "ffn_hc.scale",
    "input_layernorm.weight",
    "post_attention_layernorm.weight",
    "self_attn.q_a_proj.weight",
    "self_attn.q_a_norm.weight",
    "self_attn.q_b_proj.weight",
    "self_attn.kv_proj.weight",
    "self_attn.kv_norm.weight",
    "self_attn.o_a_proj.weight",
    "self_attn.o_b_proj.weight",
    "self_attn.sinks",
    "self_attn.compressor.kv_proj.weight",
    "self_attn.compressor.gate_proj.weight",
    "self_attn.compressor.position_bias",
    "self_attn.compressor.kv_norm.weight",
    "self_attn.compressor.indexer.kv_proj.weight",
    "self_attn.compressor.indexer.gate_proj.weight",
    "self_attn.compressor.indexer.position_bias",
    "self_attn.compressor.indexer.kv_norm.weight",
    "self_attn.compressor.indexer.q_b_proj.weight",
    "self_attn.compressor.indexer.scorer.weights_proj.weight",
    "mlp.gate.weight",
    "mlp.gate.e_score_correction_bias",
    "mlp.gate.tid2eid",
    "mlp.experts.gate_up_proj",
    "mlp.experts.down_proj",
    "mlp.shared_experts.gate_proj.weight",
    "mlp.shared_experts.up_proj.weight",
    "mlp.shared_experts.down_proj.weight",
)


class Dimensions(msgspec.Struct, frozen=True, kw_only=True):
    """The numbers of `v4_config` that a checkpoint decides; counts unless the name says more."""

    vocab_count: int
    hidden_dim: int
    layers_count: int
    heads_count: int
    head_dim: int
    rope_dim: int
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
    sinkhorn_rounds: int
    context_tokens_max: int
    norm_eps: float
    mix_eps: float
    swiglu_limit: float
    route_scale: float
    theta_main: float
    theta_compress: float
    attention_kinds: tuple[int, ...]
    hash_routed: tuple[int, ...]


class Tensor(msgspec.Struct, frozen=True):
    """A tensor, and where it lies in the weights file: bytes [begin, end)."""

    name: str
    begin: int
    end: int


class Checkpoint(msgspec.Struct, frozen=True, kw_only=True):
    """A checked folder.  `tensors` follows the table of `v4.h`; None where a layer has no such tensor.

    `fork_token_id` ends the constant prefix of a prompt (system and tools), `header_token_id` begins the header of each
    reply; None where the vocabulary has none.
    """

    folder: Path
    dimensions: Dimensions
    tensors: tuple[Tensor | None, ...]
    weights_digest: str
    fork_token_id: int | None
    header_token_id: int | None


def load_checkpoint(folder: Path | None = None) -> Checkpoint:
    """Read and check a folder with `config.json`, `model.safetensors` and tokenizer files.

    EngineError names the file and the rule that it breaks.
    """
    folder = folder or DEFAULT_CHECKPOINT
    path = folder / "config.json"
    config = _read_json(path)
    tokenizer = _read_json(folder / "tokenizer_config.json")
    try:
        dimensions = _dimensions(config, tokenizer)
    except (KeyError, TypeError, ValueError) as error:
        raise EngineError(
            f"{folder / 'config.json'}: not a DeepSeek-V4 config this engine can run: {error!r}"
        ) from error
    _check_supported(folder / "config.json", dimensions)
    weights = folder / "model.safetensors"
    tensors, digest = _read_tensors(weights, dimensions)
    added = {entry["content"]: entry["id"] for entry in _read_json(folder / "tokenizer.json").get("added_tokens", [])}
    return Checkpoint(
        folder=folder,
        dimensions=dimensions,
        tensors=tensors,
        weights_digest=digest,
        fork_token_id=added.get(FORK_TOKEN),
        header_token_id=added.get(HEADER_TOKEN),
    )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise EngineError(f"{path}: no such file; a checkpoint folder needs it") from error
    except (OSError, ValueError) as error:
        raise EngineError(f"{path}: cannot be read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise EngineError(f"{path}: expected a JSON object")
    return value


def _dimensions(config: Mapping[str, Any], tokenizer: Mapping[str, Any]) -> Dimensions:
    rope = config["rope_parameters"]
    if config["model_type"] != "deepseek_v4":
        raise ValueError(f"model_type is {config['model_type']!r}")
    if config["hc_mult"] != STREAMS or config["scoring_func"] != "sqrtsoftplus" or config["n_shared_experts"] != 1:
        raise ValueError("needs hc_mult 4, scoring_func sqrtsoftplus and one shared expert")
    if config["tie_word_embeddings"] or any(part["rope_type"] != "default" for part in rope.values()):
        raise ValueError("needs an untied head and rope_type default")
    return Dimensions(
        vocab_count=config["vocab_size"],
        hidden_dim=config["hidden_size"],
        layers_count=config["num_hidden_layers"],
        heads_count=config["num_attention_heads"],
        head_dim=config["head_dim"],
        rope_dim=int(config["head_dim"] * rope["main"]["partial_rotary_factor"]),
        query_rank=config["q_lora_rank"],
        output_groups=config["o_groups"],
        output_rank=config["o_lora_rank"],
        window_tokens=config["sliding_window"],
        index_heads=config["index_n_heads"],
        index_dim=config["index_head_dim"],
        index_topk=config["index_topk"],
        csa_rate=config["compress_rates"]["compressed_sparse_attention"],
        hca_rate=config["compress_rates"]["heavily_compressed_attention"],
        experts_count=config["n_routed_experts"],
        experts_active=config["num_experts_per_tok"],
        expert_dim=config["moe_intermediate_size"],
        sinkhorn_rounds=config["hc_sinkhorn_iters"],
        context_tokens_max=min(config["max_position_embeddings"], tokenizer["model_max_length"]),
        norm_eps=config["rms_norm_eps"],
        mix_eps=config["hc_eps"],
        swiglu_limit=config["swiglu_limit"],
        route_scale=config["routed_scaling_factor"],
        theta_main=rope["main"]["rope_theta"],
        theta_compress=rope["compress"]["rope_theta"],
        attention_kinds=tuple(KINDS[kind] for kind in config["layer_types"]),
        hash_routed=tuple(int(kind == "hash_moe") for kind in config["mlp_layer_types"]),
    )


def _check_supported(path: Path, d: Dimensions) -> None:
    """The shapes the kernels are written for (v4.h, linear.c)."""
    per_group = d.heads_count * d.head_dim // max(d.output_groups, 1)
    rules = {
        "matrix columns must be multiples of 16": all(
            columns > 0 and columns % 16 == 0
            for columns in (d.hidden_dim, d.query_rank, d.expert_dim, per_group, d.output_groups * d.output_rank)
        ),
        "head, index and rotary dimensions must be multiples of 8": all(
            n > 0 and n % 8 == 0 for n in (d.head_dim, d.index_dim, d.rope_dim, d.vocab_count, d.heads_count)
        ),
        "the rotary part must fit the head and index dimensions": d.rope_dim <= min(d.head_dim, d.index_dim),
        f"1 to {LAYERS_MAX} layers": 1 <= d.layers_count <= LAYERS_MAX,
        "a kind for every layer": len(d.attention_kinds) == len(d.hash_routed) == d.layers_count,
        "8 to 64 experts in steps of 8, at most 8 active": d.experts_count in range(8, 65, 8)
        and 1 <= d.experts_active <= 8,
        "1 to 8 output groups that divide the heads": 1 <= d.output_groups <= 8
        and d.heads_count * d.head_dim % d.output_groups == 0,
        "positive sizes": min(
            d.window_tokens, d.index_heads, d.index_topk, d.csa_rate, d.hca_rate, d.sinkhorn_rounds, d.output_rank
        )
        > 0,
        "at least two context tokens": d.context_tokens_max >= 2,
    }
    for rule, holds in rules.items():
        if not holds:
            raise EngineError(f"{path}: unsupported dimensions: {rule}")


def _shapes(d: Dimensions) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor by the name in GLOBALS or LAYER (compressors: see `_layer_shapes`)."""
    mixes = (2 + STREAMS) * STREAMS
    width = d.heads_count * d.head_dim
    hidden, inner, experts = d.hidden_dim, d.expert_dim, d.experts_count
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (d.vocab_count, hidden),
        "lm_head.weight": (d.vocab_count, hidden),
        "model.norm.weight": (hidden,),
        "model.hc_head.hc_fn": (STREAMS, STREAMS * hidden),
        "model.hc_head.hc_base": (STREAMS,),
        "model.hc_head.hc_scale": (1,),
        "input_layernorm.weight": (hidden,),
        "post_attention_layernorm.weight": (hidden,),
        "self_attn.q_a_proj.weight": (d.query_rank, hidden),
        "self_attn.q_a_norm.weight": (d.query_rank,),
        "self_attn.q_b_proj.weight": (width, d.query_rank),
        "self_attn.kv_proj.weight": (d.head_dim, hidden),
        "self_attn.kv_norm.weight": (d.head_dim,),
        "self_attn.o_a_proj.weight": (d.output_groups * d.output_rank, width // d.output_groups),
        "self_attn.o_b_proj.weight": (hidden, d.output_groups * d.output_rank),
        "self_attn.sinks": (d.heads_count,),
        "mlp.gate.weight": (experts, hidden),
        "mlp.gate.e_score_correction_bias": (experts,),
        "mlp.gate.tid2eid": (d.vocab_count, d.experts_active),
        "mlp.experts.gate_up_proj": (experts, 2 * inner, hidden),
        "mlp.experts.down_proj": (experts, hidden, inner),
        "mlp.shared_experts.gate_proj.weight": (inner, hidden),
        "mlp.shared_experts.up_proj.weight": (inner, hidden),
        "mlp.shared_experts.down_proj.weight": (hidden, inner),
    }
    for site in ("attn_hc", "ffn_hc"):
        shapes |= {f"{site}.fn": (mixes, STREAMS * hidden), f"{site}.base": (mixes,), f"{site}.scale": (3,)}
    return shapes


def _compressor_shapes(d: Dimensions, kind: int) -> dict[str, tuple[int, ...]]:
    if kind == KINDS["sliding_attention"]:
        return {}
    sparse = kind == KINDS["compressed_sparse_attention"]
    rate, series = (d.csa_rate, 2) if sparse else (d.hca_rate, 1)
    names = {"self_attn.compressor.": d.head_dim}
    if sparse:
        names["self_attn.compressor.indexer."] = d.index_dim
    shapes: dict[str, tuple[int, ...]] = {}
    for prefix, dim in names.items():
        shapes[prefix + "kv_proj.weight"] = shapes[prefix + "gate_proj.weight"] = (series * dim, d.hidden_dim)
        shapes[prefix + "position_bias"] = (rate, series * dim)
        shapes[prefix + "kv_norm.weight"] = (dim,)
    if sparse:
        prefix = "self_attn.compressor.indexer."
        shapes[prefix + "q_b_proj.weight"] = (d.index_heads * d.index_dim, d.query_rank)
        shapes[prefix + "scorer.weights_proj.weight"] = (d.index_heads, d.hidden_dim)
    return shapes


def _wanted(d: Dimensions) -> Iterator[tuple[str, tuple[int, ...]] | None]:
    """Name and shape of every slot of the tensor table; None for a slot that stays empty."""
    shapes = _shapes(d)
    yield from ((name, shapes[name]) for name in GLOBALS)
    for index, kind in enumerate(d.attention_kinds):
        skipped = "mlp.gate.e_score_correction_bias" if d.hash_routed[index] else "mlp.gate.tid2eid"
        own = shapes | _compressor_shapes(d, kind)
        for name in LAYER:
            yield (f"model.layers.{index}.{name}", own[name]) if name in own and name != skipped else None


def _read_tensors(path: Path, d: Dimensions) -> tuple[tuple[Tensor | None, ...], str]:
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            header, start = _read_header(path, data)
            tensors = tuple(
                None if want is None else _tensor(path, header, start, len(data), *want) for want in _wanted(d)
            )
            _check_routes(path, d, data, tensors)
            return tensors, hashlib.sha256(data).hexdigest()
    except FileNotFoundError as error:
        raise EngineError(f"{path}: no such file; a checkpoint folder needs it") from error
    except (OSError, ValueError) as error:
        raise EngineError(f"{path}: cannot be read as safetensors: {error}") from error


def _read_header(path: Path, data: mmap.mmap) -> tuple[dict[str, Any], int]:
    size = struct.unpack_from("<Q", data)[0] if len(data) >= 8 else 0
    if not 0 < size <= min(HEADER_BYTES_MAX, len(data) - 8):
        raise EngineError(f"{path}: damaged: its header does not fit the file")
    header = json.loads(data[8 : 8 + size])
    if not isinstance(header, dict):
        raise EngineError(f"{path}: damaged: its header is not a JSON object")
    return header, 8 + size


def _tensor(path: Path, header: Mapping[str, Any], start: int, size: int, name: str, shape: tuple[int, ...]) -> Tensor:
    entry = header.get(name)
    if not isinstance(entry, dict):
        raise EngineError(f"{path}: tensor {name} is missing")
    dtype, item = ("I64", 8) if name.endswith("tid2eid") else ("BF16", 2)
    if entry.get("dtype") != dtype or tuple(entry.get("shape", ())) != shape:
        raise EngineError(
            f"{path}: tensor {name} is {entry.get('dtype')} {entry.get('shape')}, not {dtype} {list(shape)}"
        )
    begin, end = (start + offset for offset in entry["data_offsets"])
    count = item
    for n in shape:
        count *= n
    if not start <= begin <= end <= size or end - begin != count:
        raise EngineError(f"{path}: damaged: tensor {name} lies outside the file; it may have been cut short")
    return Tensor(name, begin, end)


def _check_routes(path: Path, d: Dimensions, data: mmap.mmap, tensors: tuple[Tensor | None, ...]) -> None:
    slot = LAYER.index("mlp.gate.tid2eid")
    for index in range(d.layers_count):
        tensor = tensors[len(GLOBALS) + index * len(LAYER) + slot]
        if tensor is None:
            continue
        ids = memoryview(data[tensor.begin : tensor.end]).cast("q")
        if not 0 <= min(ids) <= max(ids) < d.experts_count:
            raise EngineError(f"{path}: layer {index} routes a token to an expert that does not exist")
