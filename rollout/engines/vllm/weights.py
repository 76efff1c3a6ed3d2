"""Which weights a vLLM draws with, as far as that can be known from outside.

The server tells a label of its weights, and nothing of their contents that holds for every backend (its own checksums
leave out what a CPU packs).  So a digest is made here: over the tensors and the config of the checkpoint where this
host sees them, else over the name that the server has for it.  It is put into the label with the trainer's number and
the folder, `7@<sha256> /srv/7`: there the next service finds all three.

A server that loads other tensors keeps the config that it was started with, so a checkpoint whose config says otherwise
is refused.

See: docs/adr/0027-engines-over-http.md.
"""

from __future__ import annotations

import hashlib
import json
import re
import struct
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from rollout.engines.config_fields import WITHOUT_EFFECT
from rollout.engines.vllm.wire import decode_json
from rollout.errors import EngineError

UNLABELLED = "default"
CHANGING = "changing "
"""What a label begins with while the weights that it names are exchanged for others."""
HEADER_BYTES_MAX = 256 << 20
FILES_MAX = 4096
READ_AT_START = frozenset(
    {"architectures", "auto_map", "dtype", "torch_dtype", "is_encoder_decoder", "num_nextn_predict_layers"}
)
"""What a vLLM builds a model by, of the fields that decide nothing any more once it runs."""
_READERS = 4
_LABEL = re.compile(r"(\d{1,18})(?:@([0-9a-f]{64})(?: (/[^\x00-\x1f\x7f]{0,4096}))?)?")


class Label(NamedTuple):
    """What a server calls its weights: the trainer's number, their digest and their folder if they are known ("")."""

    policy_version: int
    weights_digest: str = ""
    folder: str = ""

    def __str__(self) -> str:
        """As the server keeps it."""
        return f"{self.policy_version}@{self.weights_digest} {self.folder}"


class _Tensor(msgspec.Struct, frozen=True):
    dtype: str
    shape: tuple[int, ...]
    data_offsets: tuple[int, int]


class Weights(NamedTuple):
    """A checkpoint: sha256 over what its files and config decide; dtype and shape of each tensor."""

    digest: str
    tensors: dict[str, tuple[str, tuple[int, ...]]]
    config: dict[str, Any]


def parse_label(text: str) -> Label:
    """A server's label; what no trainer numbered is version 0."""
    match = _LABEL.fullmatch(text.removeprefix(CHANGING))
    return Label(int(match[1]), match[2] or "", match[3] or "") if match else Label(0)


def digest_of_name(root: str, policy_version: int) -> str:
    """Of weights that this host cannot see."""
    return hashlib.sha256(f"{root}@{policy_version}".encode()).hexdigest()


def read_config(folder: Path) -> dict[str, Any]:
    """The model's config.json, its text model's where there are several.  EngineError."""
    config = _whole_config(folder)
    text = config.get("text_config")
    return text if isinstance(text, dict) else config


def _whole_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    try:
        config: dict[str, Any] = decode_json(path.read_bytes(), f"{folder}: no checkpoint: config.json", dict[str, Any])
    except OSError as error:
        raise EngineError(f"{folder}: no checkpoint: {error}") from error
    return config


def read_weights(folder: Path) -> Weights:
    """What is in a folder; reads all of its .safetensors, once for as long as no file changes.  EngineError."""
    try:
        files = sorted(folder.glob("*.safetensors"))
        if not files or len(files) > FILES_MAX:
            raise EngineError(f"{folder}: no checkpoint: it holds {len(files)} .safetensors files")
        config = _whole_config(folder)
        stats = [path.stat() for path in files]
        sums, tensors = _read(
            tuple((path, stat.st_size, stat.st_mtime_ns) for path, stat in zip(files, stats, strict=True))
        )
        said = json.dumps(_deciding(config), sort_keys=True)
        return Weights(hashlib.sha256(f"{sums}\n{said}".encode()).hexdigest(), tensors, config)
    except OSError as error:
        raise EngineError(f"{folder}: no checkpoint: {error}") from error


def _deciding(config: dict[str, Any]) -> dict[str, Any]:
    """What of a config a server that starts draws by."""
    left_out = WITHOUT_EFFECT - READ_AT_START
    return {
        name: _deciding(value) if isinstance(value, dict) else value
        for name, value in config.items()
        if name not in left_out
    }


@lru_cache(maxsize=8)
def _read(files: tuple[tuple[Path, int, int], ...]) -> tuple[str, dict[str, tuple[str, tuple[int, ...]]]]:
    """A line for each file, and what is in all."""
    tensors: dict[str, tuple[str, tuple[int, ...]]] = {}
    for path, size, _ in files:
        tensors |= _tensors(path, size)
    with ThreadPoolExecutor(_READERS) as readers:
        sums = list(readers.map(_sum, (path for path, _, _ in files)))
    named = zip((path.name for path, _, _ in files), sums, strict=True)
    return "\n".join(f"{each} {name}" for name, each in named), tensors


def _sum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _tensors(path: Path, size: int) -> dict[str, tuple[str, tuple[int, ...]]]:
    """What a file says that it holds, if it is as long as that takes."""
    with path.open("rb") as file:
        head = file.read(8)
        length = struct.unpack("<Q", head)[0] if len(head) == 8 else 0
        if not 0 < length <= min(HEADER_BYTES_MAX, size - 8):
            raise EngineError(f"{path}: no .safetensors: its header is cut short")
        header = file.read(length)
    what = f"{path}: no .safetensors"
    entries = decode_json(header, what, dict[str, msgspec.Raw])
    entries.pop("__metadata__", None)
    found = {name: decode_json(bytes(entry), what, _Tensor) for name, entry in entries.items()}
    end = max((each.data_offsets[1] for each in found.values()), default=0)
    if end != size - 8 - length:
        raise EngineError(f"{path}: its tensors take {end} bytes, and it has {size - 8 - length}")
    return {name: (each.dtype, each.shape) for name, each in found.items()}


def check_fits(folder: Path, new: Weights, old: Weights) -> None:
    """EngineError unless the tensors are called and shaped as the old ones, and no field that counts says otherwise.

    A server that fails to load has neither weights, and one that loads goes on with the old config.
    """
    if differing := sorted(name for name, _ in set(new.tensors.items()) ^ set(old.tensors.items())):
        raise EngineError(
            f"{folder}: not a checkpoint of this model: {len(differing)} tensors are missing, extra, or of another "
            f"shape, {differing[0]} among them"
        )
    if said := sorted(_said_otherwise(new.config, old.config)):
        raise EngineError(
            f"{folder}: not a checkpoint of this model: its config.json says otherwise of {', '.join(said[:3]):.200}, "
            "and vLLM reads it only when it starts"
        )


def _said_otherwise(new: dict[str, Any], old: dict[str, Any], prefix: str = "") -> Iterator[str]:
    """The fields of both that have another value; null, and what only one has, may be a default, or spelt otherwise."""
    for name in new.keys() & old.keys() - WITHOUT_EFFECT:
        one, other = new[name], old[name]
        if isinstance(one, dict) and isinstance(other, dict):
            yield from _said_otherwise(one, other, f"{prefix}{name}.")
        elif None not in (one, other) and one != other:
            yield f"{prefix}{name}"
