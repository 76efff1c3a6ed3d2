"""Which experts each token went through, as a record: for anticipatory routing and routing replay.

Expert ids are 1 or 2 bytes wide, layer after layer within a row, `top_k` of them a layer; 258 bytes a
token for 43 layers of 6 experts.  They are checked when they are appended, because a buffer that an
engine never filled looks like data to everybody after it.  Two experts of a layer are compared for all
rows at once, as the xor of two long integers: a zero byte in it is a pair that is equal.

     0  1  type (5)
     1  1  width w of an expert id, 1 or 2
     2  2  size r of the request id; 0: named by slot
     4  4  slot; 0 if named by id
     8  8  start: index of the first row's token in the stream
    16  8  router version
    24  4  rows n, 1 or more
    28  4  experts count e: ids are below it
    32  2  layers l, 1 or more
    34  2  top_k k, 1 or more, at most e
    36  4  zero
    40  r  request id, UTF-8
     .. b  validity bitmap, b = (n + 7) / 8: bit i % 8 of byte i / 8 says that row i is valid; spare bits are zero
     .. nlkw  expert ids; a row that is not valid holds zeros

See: docs/formats/wal_tokens.md, "Type 5: expert routes".
"""

from __future__ import annotations

import itertools
import struct
from array import array
from collections.abc import Iterator
from dataclasses import dataclass

from wal.token_columns import IS_BIG_ENDIAN, check_u32, check_u64, invalid
from wal.token_records import (
    ROUTES_RECORDED,
    WHO_HEAD,
    Who,
    decode_who,
    encode_who,
    need_head,
    need_size,
    need_zero,
)

_REST = struct.Struct("<QQIIHHI")
_FIXED = WHO_HEAD.size + _REST.size
_U16_MAX = (1 << 16) - 1


@dataclass(frozen=True, slots=True)
class RoutesRecorded:
    """Expert ids of the tokens `start` .. `start + rows_count` of a stream, by router `router_version`.

    `expert_ids`: rows x layers x top_k ids of `width` bytes, little endian; a valid row has `top_k`
    distinct ids below `experts_count` in each layer, and is not all zero where it has more than one id to
    choose (more than one expert, more than one id in the row).  `validity`: bit i % 8 of byte i // 8 is
    set if row i is valid; other rows hold zeros.  Layers are those that the engine routes, in order.
    """

    who: Who
    start: int
    router_version: int
    rows_count: int
    experts_count: int
    layers_count: int
    top_k: int
    width: int
    validity: bytes
    expert_ids: bytes

    def valid_rows(self) -> Iterator[int]:
        """Indices of the valid rows, from 0."""
        return (row for row in range(self.rows_count) if self.validity[row >> 3] >> (row & 7) & 1)


def encode_routes(record: RoutesRecorded) -> bytes:
    """The payload of a RoutesRecorded.  RecordInvalidError names the field that breaks its rule."""
    _check(record)
    head, request = encode_who(ROUTES_RECORDED, record.width, record.who)
    rest = _REST.pack(
        record.start,
        record.router_version,
        record.rows_count,
        record.experts_count,
        record.layers_count,
        record.top_k,
        0,
    )
    return b"".join((head, rest, request, record.validity, record.expert_ids))


def decode_routes(payload: bytes) -> RoutesRecorded:
    """The RoutesRecorded in a payload of type 5.  RecordInvalidError."""
    need_head(payload, _FIXED)
    who, who_end, width = decode_who(payload, _FIXED)
    start, router_version, rows, experts, layers, top_k, zero = _REST.unpack_from(payload, WHO_HEAD.size)
    need_zero(zero, "bytes 36 to 39")
    ids_at = who_end + (rows + 7) // 8
    need_size(payload, ids_at + rows * layers * top_k * width)
    record = RoutesRecorded(
        who, start, router_version, rows, experts, layers, top_k, width, payload[who_end:ids_at], payload[ids_at:]
    )
    _check(record)
    return record


def _check(record: RoutesRecorded) -> None:
    rows, row_bytes = record.rows_count, record.layers_count * record.top_k * record.width
    check_u64(record.start, "start")
    check_u64(record.router_version, "router_version")
    check_u32(rows, "rows_count")
    check_u32(record.experts_count, "experts_count")
    if record.width not in {1, 2}:
        raise invalid("width", f"must be 1 or 2 bytes, is {record.width}")
    if not rows:
        raise invalid("rows_count", "must be 1 or more")
    if not 0 < record.layers_count <= _U16_MAX:
        raise invalid("layers_count", f"must be in 1..{_U16_MAX}, is {record.layers_count}")
    if not 0 < record.top_k <= min(record.experts_count, _U16_MAX):
        raise invalid("top_k", f"must be in 1..{min(record.experts_count, _U16_MAX)}, is {record.top_k}")
    if record.experts_count > 1 << 8 * record.width:
        raise invalid("experts_count", f"must fit {record.width} bytes, is {record.experts_count}")
    if len(record.validity) != (rows + 7) // 8:
        raise invalid("validity", f"must have {(rows + 7) // 8} bytes for {rows} rows, has {len(record.validity)}")
    if rows & 7 and record.validity[-1] >> (rows & 7):
        raise invalid("validity", "must have zeros behind its last row")
    if len(record.expert_ids) != rows * row_bytes:
        raise invalid("expert_ids", f"must have {rows * row_bytes} bytes, have {len(record.expert_ids)}")
    valid = list(record.valid_rows())
    ids = record.expert_ids
    if len(valid) < rows:
        ids = b"".join(record.expert_ids[row * row_bytes : (row + 1) * row_bytes] for row in valid)
        if len(record.expert_ids) - record.expert_ids.count(0) != len(ids) - ids.count(0):
            raise invalid("expert_ids", "must be zeros in rows that are not valid")
    _check_range(record, ids)
    _check_distinct(record, ids, valid)
    is_choice = record.experts_count > 1 and record.layers_count * record.top_k > 1
    if record.top_k == 1 and is_choice:
        for index, row in enumerate(valid):
            if not any(ids[index * row_bytes : (index + 1) * row_bytes]):
                raise invalid("expert_ids", f"are all zero in row {row}: was it ever filled?")


def _check_range(record: RoutesRecorded, ids: bytes) -> None:
    if record.width == 1:
        is_within = not ids.translate(None, bytes(range(record.experts_count)))
    else:
        column = array("H", ids)
        if IS_BIG_ENDIAN:
            column.byteswap()
        is_within = max(column, default=0) < record.experts_count
    if not is_within:
        raise invalid("expert_ids", f"must be below experts_count = {record.experts_count}")


def _check_distinct(record: RoutesRecorded, ids: bytes, valid: list[int]) -> None:
    """Every two ids of one layer differ, for all rows and layers at once."""
    stride = record.top_k * record.width
    cells = len(ids) // stride
    planes = [int.from_bytes(ids[at::stride], "little") for at in range(stride)]
    for first, second in itertools.combinations(range(record.top_k), 2):
        differs = 0
        for byte in range(record.width):
            differs |= planes[first * record.width + byte] ^ planes[second * record.width + byte]
        at = differs.to_bytes(cells, "little").find(0)
        if at >= 0:
            row, layer = divmod(at, record.layers_count)
            raise invalid("expert_ids", f"must be distinct within a layer: row {valid[row]}, layer {layer}")
