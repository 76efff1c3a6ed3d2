"""A checkpoint folder as the C engine needs it: dimensions, tensors, and the facts to record.

Reading is strict, because the C side trusts what it is given: `config.py` checks the numbers, `tensors.py` where the
weights lie, and this module what belongs to neither: routing tables, and a tokenizer that has what the service writes.
Nothing is downloaded; the weights are read again for `v4_create`, which copies them, and must not have changed.

See: checkpoint/README.md, docs/architecture.md, "Engine".
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from rollout.engines.embedded.config import Dimensions, read_dimensions, read_length_max
from rollout.engines.embedded.tensors import GLOBALS, LAYER, Tensor, locate
from rollout.engines.embedded.weights import Stamp, read_weights
from rollout.errors import EngineError
from toolcall_dsl.dialect import V4
from toolcall_dsl.errors import TokenizerError
from toolcall_dsl.tokenizer import merged_ids

DEFAULT_CHECKPOINT = Path(__file__).parent / "checkpoint"


class Checkpoint(msgspec.Struct, frozen=True, kw_only=True):
    """A checked folder.  `tensors` follows the table of `v4.h`; None where a layer has no such tensor.

    `weights_digest` (sha256) is of all that decides what is drawn: the weights' file, and every number of the config
    but the length of a context.  `fork_token_id` ends the constant prefix of a prompt (system and tools),
    `header_token_id` begins the header of each reply.  `vocabulary_digest` (sha256) says what the ids mean.
    """

    folder: Path
    dimensions: Dimensions
    tensors: tuple[Tensor | None, ...]
    weights_digest: str
    weights_stamp: Stamp
    fork_token_id: int
    header_token_id: int
    vocabulary_digest: str


def load_checkpoint(folder: Path | None = None) -> Checkpoint:
    """Read and check a folder with `config.json`, `model.safetensors` and tokenizer files.

    EngineError names the file and the rule that it breaks.
    """
    folder = folder or DEFAULT_CHECKPOINT
    lengths = folder / "tokenizer_config.json"
    length_max = read_length_max(lengths, _read_json(lengths))
    config = folder / "config.json"
    dimensions, is_tied = read_dimensions(config, _read_json(config), length_max)
    try:
        tensors, digest, stamp = _read_weights(folder, dimensions, is_tied=is_tied)
        ids = read_vocabulary(folder / "tokenizer.json", dimensions.vocab_count)
    except MemoryError as error:
        raise EngineError(f"{folder}: cannot be read: out of memory") from error
    return Checkpoint(
        folder=folder,
        dimensions=dimensions,
        tensors=tensors,
        weights_digest=_digest(digest, dimensions),
        weights_stamp=stamp,
        fork_token_id=ids[V4.user],
        header_token_id=ids[V4.assistant],
        vocabulary_digest=hashlib.sha256(json.dumps(sorted(ids.items())).encode()).hexdigest(),
    )


def _digest(of_file: str, dimensions: Dimensions) -> str:
    """Not of how a config spells its numbers, which are exact on every host (`rope.py`)."""
    numbers = msgspec.structs.asdict(dimensions)
    del numbers["context_tokens_max"]
    return hashlib.sha256(json.dumps([of_file, numbers], sort_keys=True).encode()).hexdigest()


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise EngineError(f"{path}: no such file; a checkpoint folder needs it") from error
    except (OSError, ValueError, RecursionError) as error:
        raise EngineError(f"{path}: cannot be read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise EngineError(f"{path}: expected a JSON object")
    return value


def read_vocabulary(path: Path, vocab_count: float = math.inf) -> Mapping[str, int]:
    """Every token's id.  EngineError: one is beyond, or a control token that prompts are made of is no added one."""
    parts = _read_json(path)
    try:
        added = {entry["content"]: entry["id"] for entry in parts["added_tokens"]}
        ids = merged_ids(parts["model"]["vocab"], added, str(path))
    except TokenizerError as error:
        raise EngineError(str(error)) from error
    except (KeyError, TypeError) as error:
        raise EngineError(f"{path}: no tokenizer of a model: it lacks added_tokens or model.vocab") from error
    if missing := [token for token in V4.control_tokens if token not in added]:
        raise EngineError(f"{path}: the vocabulary lacks the control tokens {', '.join(missing)}")
    for token, token_id in ids.items():
        if type(token_id) is not int or not 0 <= token_id < vocab_count:
            raise EngineError(
                f"{path}: token {token!r:.80} has the id {token_id!r:.40}, beyond vocab_size {vocab_count}"
            )
    return ids


def _read_weights(folder: Path, d: Dimensions, *, is_tied: bool) -> tuple[tuple[Tensor | None, ...], str, Stamp]:
    path = folder / "model.safetensors"
    if not path.exists():
        is_in_shards = (folder / "model.safetensors.index.json").exists()
        why = "the weights must be in one, not in shards" if is_in_shards else "a checkpoint folder needs it"
        raise EngineError(f"{path}: no such file; {why}")
    data, stamp = read_weights(path)
    with memoryview(data) as view:
        tensors = locate(path, view, d, is_tied=is_tied)
        _check_routes(path, d, view, tensors)
    return tensors, hashlib.sha256(data).hexdigest(), stamp


def _check_routes(path: Path, d: Dimensions, data: memoryview, tensors: tuple[Tensor | None, ...]) -> None:
    slot = list(LAYER).index("mlp.gate.tid2eid")
    for index in range(d.layers_count):
        tensor = tensors[len(GLOBALS) + index * len(LAYER) + slot]
        if tensor is None:
            continue
        ids = data[tensor.pieces[0].begin : tensor.pieces[0].end].cast("q")
        if not 0 <= min(ids) <= max(ids) < d.experts_count:
            raise EngineError(f"{path}: {tensor.name} routes a token to an expert that does not exist")
