"""Side channels: arrays too big for a record, as safetensors files that records refer to.

One file holds the channels of the rollouts that were written together.  A channel is one tensor; the
rows of a rollout lie in `row_range` of its first axis, and `sha256` is of those rows.  The layout of the
format is fixed (u64 size of the header, JSON header, tensors end to end), so files are written as a
stream and rows are read as a mapping, bf16 among them, which numpy has no type for.

See: docs/formats/shards.md; https://github.com/huggingface/safetensors, "Format".
"""

from __future__ import annotations

import hashlib
import json
import math
import mmap
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np

from rollout.errors import RequestError, ShardError
from rollout.export.manifest import SideChannel
from rollout.export.scratch import whole_file

Array = np.ndarray[Any, np.dtype[Any]]
DTYPES: dict[str, np.dtype[Any]] = {
    "U8": np.dtype("u1"),
    "U16": np.dtype("<u2"),
    "U32": np.dtype("<u4"),
    "U64": np.dtype("<u8"),
    "I32": np.dtype("<i4"),
    "F16": np.dtype("<f2"),
    "F32": np.dtype("<f4"),
    "BF16": np.dtype("<u2"),
}
"""The format's names; the bits of a BF16 are a u16 to numpy."""
HEADER_BYTES_MAX = 16 << 20
LAYOUTS = {
    "routes": ({"U8", "U16"}, 3),
    "routes_valid": ({"U8"}, 1),
    "routes_version": ({"U32"}, 1),
    "hidden": ({"BF16"}, 2),
}
"""Names that mean the same everywhere: dtypes and axes; any other name may be used freely."""


class Channel(NamedTuple):
    """One array of a rollout, rows first.  `dtype` is a key of DTYPES; `layer_ids` name layers of the second axis."""

    array: Array
    dtype: str
    layer_ids: tuple[int, ...] = ()


class _Tensor(msgspec.Struct, frozen=True):
    dtype: str
    shape: tuple[int, ...]
    data_offsets: tuple[int, int]


def write_channels(path: Path, offered: Mapping[str, Mapping[str, Channel]]) -> dict[str, tuple[SideChannel, ...]]:
    """Write the channels of rollouts to a new file; the references to them, by rollout.

    RequestError if a channel is not what it says, or two rollouts differ in its layout; OSError.
    """
    parts: dict[str, list[tuple[str, Channel, int]]] = {}
    for rollout_id, channels in offered.items():
        for name, channel in channels.items():
            _check(rollout_id, name, channel, parts.get(name))
            start = sum(len(part.array) for _, part, _ in parts.get(name, ()))
            parts.setdefault(name, []).append((rollout_id, channel, start))
    header, offset = {}, 0
    # The format wants tensors without holes, in the order of their offsets; wide elements first keeps them aligned.
    order = sorted(parts, key=lambda name: (-DTYPES[parts[name][0][1].dtype].itemsize, name))
    for name in order:
        first = parts[name][0][1]
        size = sum(part.array.nbytes for _, part, _ in parts[name])
        rows_count = sum(len(part.array) for _, part, _ in parts[name])
        shape = [rows_count, *first.array.shape[1:]]
        header[name] = {"dtype": first.dtype, "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
    written: dict[str, list[SideChannel]] = {}
    with whole_file(path) as file:
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        file.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            for rollout_id, channel, start in parts[name]:
                data = _bytes(channel.array)
                file.write(data)
                written.setdefault(rollout_id, []).append(
                    SideChannel(
                        name=name,
                        uri=path.name,
                        dtype=channel.dtype,
                        shape=channel.array.shape,
                        layer_ids=channel.layer_ids,
                        row_range=(start, start + len(channel.array)),
                        sha256=hashlib.sha256(data).hexdigest(),
                    )
                )
    return {rollout_id: tuple(channels) for rollout_id, channels in written.items()}


def read_channel(directory: Path, channel: SideChannel) -> Array:
    """The rows of a rollout, mapped read-only and checked against their digest; ShardError names file and channel."""
    where = f"{directory / channel.uri}, {channel.name!r}"
    try:
        if Path(channel.uri).name != channel.uri:
            raise ValueError("it is no name of a file of this directory")
        with (directory / channel.uri).open("rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        size = int.from_bytes(mapped[:8], "little")
        if not 0 < size <= min(HEADER_BYTES_MAX, len(mapped) - 8):
            raise ValueError(f"its header cannot be {size} bytes")
        raw = msgspec.json.decode(mapped[8 : 8 + size], type=dict[str, msgspec.Raw])
        tensor = msgspec.json.decode(raw[channel.name], type=_Tensor)
        (start, end), item = channel.row_range, DTYPES[channel.dtype]
        rows_count, row_shape = tensor.shape[0], tensor.shape[1:]
        row_bytes = item.itemsize * math.prod(row_shape)
        begin, stop = tensor.data_offsets
        is_whole = stop - begin == rows_count * row_bytes and 0 <= begin <= stop <= len(mapped) - 8 - size
        if not is_whole or tensor.dtype != channel.dtype or not 0 <= start <= end <= rows_count:
            raise ValueError(f"its header does not fit rows {start} to {end} of {channel.dtype}")
        rows: Array = np.frombuffer(
            mapped, item, (end - start) * math.prod(row_shape), 8 + size + begin + start * row_bytes
        )
        if hashlib.sha256(_bytes(rows)).hexdigest() != channel.sha256:
            raise ValueError(f"rows {start} to {end} are not those that were written")
        return rows.reshape(end - start, *row_shape)
    except (OSError, ValueError, KeyError, IndexError, msgspec.MsgspecError) as error:
        raise ShardError(f"{where} cannot be read: {error!s}") from error


def read_side_channel(channel: SideChannel) -> Array:
    """The same where `uri` is a path: as the gRPC API says it."""
    path = Path(channel.uri)
    return read_channel(path.parent, msgspec.structs.replace(channel, uri=path.name))


def _check(rollout_id: str, name: str, channel: Channel, others: list[tuple[str, Channel, int]] | None) -> None:
    where = f"side channel {name!r} of {rollout_id}"
    if (dtype := DTYPES.get(channel.dtype)) is None:
        raise RequestError(f"{where}: {channel.dtype!r} is none of {', '.join(DTYPES)}")
    if channel.array.dtype != dtype or not channel.array.ndim:
        raise RequestError(f"{where}: {channel.dtype} takes rows of {dtype}, not {channel.array.dtype}")
    dtypes, axes = LAYOUTS.get(name, ({channel.dtype}, channel.array.ndim))
    if channel.dtype not in dtypes or channel.array.ndim != axes:
        wanted = f"{' or '.join(sorted(dtypes))} with {axes} axes"
        raise RequestError(f"{where}: it is {wanted}, not {channel.dtype} with {channel.array.ndim}")
    if channel.layer_ids and channel.array.shape[1:2] != (len(channel.layer_ids),):
        raise RequestError(f"{where}: {len(channel.layer_ids)} layer ids for rows of {channel.array.shape[1:]}")
    if others and (others[0][1].array.shape[1:], others[0][1].dtype) != (channel.array.shape[1:], channel.dtype):
        raise RequestError(f"{where} differs in its layout from that of {others[0][0]}, which is written beside it")


def _bytes(array: Array) -> memoryview:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
