"""Where the tensors of a model lie in its `model.safetensors`: names, shapes, and a header that is believed in nothing.

A checkpoint calls its tensors as transformers' modules do, or as DeepSeek's own files and `save_pretrained` do; there
the experts are tensors of their own.  Every tensor of the architecture must be there once, in its dtype and shape,
every byte of the file must be one tensor's, and no tensor may be left over but those of MTP layers, which are not run.

See: `v4.h` (tensor table), checkpoint/README.md, "Weights"; safetensors' format description.
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Iterable, Iterator, Mapping
from math import prod
from pathlib import Path

import msgspec

from rollout.engines.embedded.config import CSA, KINDS, SLIDING, Dimensions
from rollout.errors import EngineError

HEADER_BYTES_MAX = 16 << 20
RANK_MAX = 8
"""Dimensions of any tensor, also of those that are not run: what is multiplied here must be little."""
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
GLOBALS: Mapping[str, str] = {
    EMBEDDING: "embed.weight",
    HEAD: "head.weight",
    "model.norm.weight": "norm.weight",
    "model.hc_head.hc_fn": "hc_head_fn",
    "model.hc_head.hc_base": "hc_head_base",
    "model.hc_head.hc_scale": "hc_head_scale",
}
"""The tensors that are no layer's, in the order of v4.h, and DeepSeek's names of them."""
LAYER: Mapping[str, str] = {
    "attn_hc.fn": "hc_attn_fn",
    "attn_hc.base": "hc_attn_base",
    "attn_hc.scale": "hc_attn_scale",
    "ffn_hc.fn": "hc_ffn_fn",
    "ffn_hc.base": "hc_ffn_base",
    "ffn_hc.scale": "hc_ffn_scale",
    "input_layernorm.weight": "attn_norm.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    "self_attn.q_a_proj.weight": "attn.wq_a.weight",
    "self_attn.q_a_norm.weight": "attn.q_norm.weight",
    "self_attn.q_b_proj.weight": "attn.wq_b.weight",
    "self_attn.kv_proj.weight": "attn.wkv.weight",
    "self_attn.kv_norm.weight": "attn.norm.weight",
    "self_attn.o_a_proj.weight": "attn.wo_a.weight",
    "self_attn.o_b_proj.weight": "attn.wo_b.weight",
    "self_attn.sinks": "attn.attn_sink",
    "self_attn.compressor.kv_proj.weight": "attn.compressor.wkv.weight",
    "self_attn.compressor.gate_proj.weight": "attn.compressor.wgate.weight",
    "self_attn.compressor.position_bias": "attn.compressor.ape",
    "self_attn.compressor.kv_norm.weight": "attn.compressor.norm.weight",
    "self_attn.compressor.indexer.kv_proj.weight": "attn.indexer.compressor.wkv.weight",
    "self_attn.compressor.indexer.gate_proj.weight": "attn.indexer.compressor.wgate.weight",
    "self_attn.compressor.indexer.position_bias": "attn.indexer.compressor.ape",
    "self_attn.compressor.indexer.kv_norm.weight": "attn.indexer.compressor.norm.weight",
    "self_attn.compressor.indexer.q_b_proj.weight": "attn.indexer.wq_b.weight",
    "self_attn.compressor.indexer.scorer.weights_proj.weight": "attn.indexer.weights_proj.weight",
    "mlp.gate.weight": "ffn.gate.weight",
    "mlp.gate.e_score_correction_bias": "ffn.gate.bias",
    "mlp.gate.tid2eid": "ffn.gate.tid2eid",
    "mlp.experts.gate_up_proj": "ffn.experts.{}.w1.weight ffn.experts.{}.w3.weight",
    "mlp.experts.down_proj": "ffn.experts.{}.w2.weight",
    "mlp.shared_experts.gate_proj.weight": "ffn.shared_experts.w1.weight",
    "mlp.shared_experts.up_proj.weight": "ffn.shared_experts.w3.weight",
    "mlp.shared_experts.down_proj.weight": "ffn.shared_experts.w2.weight",
}
"""The tensors of a layer, in the order of v4.h, and DeepSeek's names of them."""
_OURS = {theirs: ours for names in (GLOBALS, LAYER) for ours, theirs in names.items()}
_LAYER_NAME = re.compile(r"(?:model\.)?layers\.(\d{1,4})\.(.+)", re.DOTALL)
_MTP = re.compile(r"(?:model\.)?mtp\.")
_ITEM_BYTES = {"BF16": 2, "F32": 4, "I64": 8}


class Piece(msgspec.Struct, frozen=True):
    """Bytes [begin, end) of the file, which hold numbers of `dtype`."""

    begin: int
    end: int
    dtype: str


class Tensor(msgspec.Struct, frozen=True):
    """A tensor of v4.h's table, called as the file does if it is one there: its pieces, one after the other."""

    name: str
    pieces: tuple[Piece, ...]

    @property
    def words_count(self) -> int:
        """Of 16 bits, in memory: those of bf16 numbers, or of the routing table."""
        return sum((piece.end - piece.begin) // (4 if piece.dtype == "F32" else 2) for piece in self.pieces)


class _Stored(msgspec.Struct, frozen=True):
    """A tensor of the file: what its header calls it, and what it says of it."""

    name: str
    piece: Piece
    shape: tuple[int, ...]


def locate(path: Path, data: memoryview, d: Dimensions, *, is_tied: bool) -> tuple[Tensor | None, ...]:
    """The table of `v4.h`; None where a layer has no such tensor.  EngineError names the file and the tensor."""
    stored = _read_header(path, data)
    everything = list(stored.values())
    table: list[Tensor | None] = []
    for want in _wanted(d):
        if want is None:
            table.append(None)
        elif want[0] == HEAD and is_tied:
            table.append(table[0])
        else:
            table.append(_take(path, stored, d, *want))
    left = [entry.name for name, entry in stored.items() if not _MTP.match(name)]
    if left:
        named = ", ".join(f"{name:.100}" for name in sorted(left)[:3])
        why = " (tie_word_embeddings is true)" if is_tied and HEAD in stored else ""
        raise EngineError(f"{path}: {len(left)} tensors are none of this model's: {named}{why}")
    _check_bytes(path, everything, data)
    return tuple(table)


def _read_header(path: Path, data: memoryview) -> dict[str, _Stored]:
    """What the header says, by our names."""
    size = struct.unpack_from("<Q", data)[0] if len(data) >= 8 else 0
    if not 0 < size <= min(HEADER_BYTES_MAX, len(data) - 8):
        raise EngineError(f"{path}: damaged: its header does not fit the file")
    try:
        header = json.loads(bytes(data[8 : 8 + size]))
    except (ValueError, RecursionError) as error:
        raise EngineError(f"{path}: damaged: its header is no JSON: {error}") from error
    if not isinstance(header, dict):
        raise EngineError(f"{path}: damaged: its header is not a JSON object")
    header.pop("__metadata__", None)
    stored: dict[str, _Stored] = {}
    for name, said in header.items():
        entry = _entry(path, name, said, 8 + size, len(data))
        if stored.setdefault(_our_name(entry.name), entry) is not entry:
            raise EngineError(f"{path}: tensor {entry.name:.100} is there twice, once by another name")
    return stored


def _check_bytes(path: Path, stored: Iterable[_Stored], data: memoryview) -> None:
    """Every byte behind the header is one tensor's."""
    expected = 8 + int(struct.unpack_from("<Q", data)[0])
    for entry in sorted(stored, key=lambda entry: (entry.piece.begin, entry.piece.end)):
        if entry.piece.begin != expected:
            raise EngineError(
                f"{path}: damaged: the bytes before tensor {entry.name:.100} are nobody's, or another's too"
            )
        expected = entry.piece.end
    if expected != len(data):
        raise EngineError(f"{path}: damaged: {len(data) - expected} bytes behind the last tensor are nobody's")


def _our_name(name: str) -> str:
    """Without DeepSeek's spellings; single experts keep theirs."""
    if (match := _LAYER_NAME.fullmatch(name)) is not None:
        return f"model.layers.{int(match[1])}.{_OURS.get(match[2], match[2])}"
    return _OURS.get(name, name)


def _entry(path: Path, name: str, entry: object, start: int, size: int) -> _Stored:
    match entry:
        case {"dtype": str(dtype), "shape": list(shape), "data_offsets": [int(begin), int(end)]} if len(
            shape
        ) <= RANK_MAX and all(type(n) is int and 0 <= n <= size for n in shape):
            piece = Piece(start + begin, start + end, dtype)
        case _:
            raise EngineError(
                f"{path}: damaged: its header has no dtype, shape and offsets of tensor {name:.100}, or a shape of "
                f"more than {RANK_MAX} dimensions"
            )
    if not start <= piece.begin <= piece.end <= size:
        raise EngineError(f"{path}: damaged: tensor {name:.100} lies outside the file; it may have been cut short")
    if dtype in _ITEM_BYTES and piece.end - piece.begin != prod(shape) * _ITEM_BYTES[dtype]:
        raise EngineError(f"{path}: damaged: tensor {name:.100} has not the bytes of {dtype} {shape}")
    return _Stored(name, piece, tuple(shape))


def _take(path: Path, stored: dict[str, _Stored], d: Dimensions, name: str, shape: tuple[int, ...]) -> Tensor:
    """Remove from `stored` what makes up a tensor of the table."""
    parts, part_shape = [name], shape
    prefix, _, leaf = name.partition(".mlp.experts.")
    if leaf and name not in stored:
        templates = LAYER[f"mlp.experts.{leaf}"].split()
        parts = [f"{prefix}.{template.format(i)}" for i in range(d.experts_count) for template in templates]
        part_shape = (shape[1] // len(templates), shape[2])
        if stored.keys().isdisjoint(parts):
            raise _missing(path, name)
    called = stored[name].name if name in stored else name
    return Tensor(called, tuple(_take_part(path, stored, part, part_shape) for part in parts))


def _take_part(path: Path, stored: dict[str, _Stored], name: str, shape: tuple[int, ...]) -> Piece:
    entry = stored.pop(name, None)
    if entry is None:
        raise _missing(path, name)
    accepted = ("I64",) if name.endswith("tid2eid") else ("BF16", "F32")
    if entry.piece.dtype not in accepted or entry.shape != shape:
        found = f"{entry.piece.dtype:.20} {list(entry.shape)!s:.100}"
        raise EngineError(f"{path}: tensor {entry.name} is {found}, not {accepted[0]} {list(shape)}")
    return entry.piece


def _missing(path: Path, name: str) -> EngineError:
    """Nobody knows what a file would have called the tensor that it lacks: both names are told."""
    match = _LAYER_NAME.fullmatch(name)
    theirs = LAYER.get(match[2]) if match else GLOBALS.get(name)
    layer = f"layers.{match[1]}." if match else ""
    also = "" if theirs is None else f" (DeepSeek's name: {layer}{theirs.split()[0].format(0)})"
    return EngineError(f"{path}: tensor {name} is missing{also}")


def _wanted(d: Dimensions) -> Iterator[tuple[str, tuple[int, ...]] | None]:
    """Name and shape of every slot of the tensor table; None for a slot that stays empty."""
    shapes = _shapes(d)
    yield from ((name, shapes[name]) for name in GLOBALS)
    for index, kind in enumerate(d.attention_kinds):
        skipped = "mlp.gate.e_score_correction_bias" if d.hash_routed[index] else "mlp.gate.tid2eid"
        own = shapes | _compressor_shapes(d, KINDS[kind])
        for name in LAYER:
            yield (f"model.layers.{index}.{name}", own[name]) if name in own and name != skipped else None


def _shapes(d: Dimensions) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor by the name in GLOBALS or LAYER, but those of compressors."""
    streams, mixes = d.streams_count, (2 + d.streams_count) * d.streams_count
    width = d.heads_count * d.head_dim
    hidden, inner, experts = d.hidden_dim, d.expert_dim, d.experts_count
    shapes: dict[str, tuple[int, ...]] = {
        EMBEDDING: (d.vocab_count, hidden),
        HEAD: (d.vocab_count, hidden),
        "model.norm.weight": (hidden,),
        "model.hc_head.hc_fn": (streams, streams * hidden),
        "model.hc_head.hc_base": (streams,),
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
        shapes |= {f"{site}.fn": (mixes, streams * hidden), f"{site}.base": (mixes,), f"{site}.scale": (3,)}
    return shapes


def _compressor_shapes(d: Dimensions, kind: str) -> dict[str, tuple[int, ...]]:
    if kind == SLIDING:
        return {}
    rate, series = (d.csa_rate, 2) if kind == CSA else (d.hca_rate, 1)
    names = {"self_attn.compressor.": d.head_dim}
    if kind == CSA:
        names["self_attn.compressor.indexer."] = d.index_dim
    shapes: dict[str, tuple[int, ...]] = {}
    for prefix, dim in names.items():
        shapes[prefix + "kv_proj.weight"] = shapes[prefix + "gate_proj.weight"] = (series * dim, d.hidden_dim)
        shapes[prefix + "position_bias"] = (rate, series * dim)
        shapes[prefix + "kv_norm.weight"] = (dim,)
    if kind == CSA:
        prefix = "self_attn.compressor.indexer."
        shapes[prefix + "q_b_proj.weight"] = (d.index_heads * d.index_dim, d.query_rank)
        shapes[prefix + "scorer.weights_proj.weight"] = (d.index_heads, d.hidden_dim)
    return shapes
