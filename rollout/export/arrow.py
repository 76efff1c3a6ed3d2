"""Trajectories as Arrow: the schema, derived from the record, and one IPC file of many records.

Arrow IPC is memory-mappable and read by every data library; per-token fields are u32 and f32 lists,
never JSON.  Whatever is written here is derived: it can be deleted and made again from the log.

The rule for columns, in the order of TrajectoryRecord's fields (a new field needs no line here):

- a scalar is of its type: text, bool, u64, f64; a struct is a struct, a tuple a list;
- a tuple of numbers that is itself a field of the record is per token: a list of u32 or f32;
- what has free keys (a dict) is JSON text, and its field's metadata says `encoding: json`;
- everything may be null: an unset reward is not 0.

See: docs/formats/trajectory.md.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import pyarrow as pa
from msgspec import inspect

from rollout.record import TrajectoryRecord

_ROWS_PER_BATCH = 256
_SCALARS = {
    inspect.BoolType: pa.bool_(),
    inspect.IntType: pa.uint64(),
    inspect.FloatType: pa.float64(),
    inspect.StrType: pa.string(),
    inspect.LiteralType: pa.string(),
    inspect.EnumType: pa.string(),
}
_AS_JSON = {"encoding": "json"}


class _Column(NamedTuple):
    """A field, and how a value becomes what Arrow takes for it (None: as it is)."""

    field: pa.Field
    convert: Callable[[Any], Any] | None


def schema() -> pa.Schema:
    """The columns, in the order of TrajectoryRecord's fields."""
    metadata = {"format": "dsec.trajectory", "version": "2"}
    return pa.schema([column.field for column in _columns()], metadata=metadata)


def to_batch(records: Sequence[TrajectoryRecord]) -> pa.RecordBatch:
    """One record batch, a row for each record."""
    arrays = []
    for field, convert in _columns():
        values = [getattr(record, field.name) for record in records]
        arrays.append(pa.array(values if convert is None else map(convert, values), field.type))
    return pa.RecordBatch.from_arrays(arrays, schema=schema())


def stream_head() -> bytes:
    """What an Arrow IPC stream of records begins with."""
    return bytes(schema().serialize())


def stream_batch(records: Sequence[TrajectoryRecord]) -> bytes:
    """What such a stream goes on with: one record batch."""
    return bytes(to_batch(records).serialize())


def write(path: Path, records: Iterable[TrajectoryRecord]) -> int:
    """Write all records to `path` (replaced atomically); returns how many.  OSError if it cannot."""
    scratch, count = path.with_name(f".{path.name}.{os.getpid()}"), 0
    try:
        with pa.OSFile(str(scratch), "wb") as sink, pa.ipc.new_file(sink, schema()) as writer:
            rows: list[TrajectoryRecord] = []
            for record in records:
                rows.append(record)
                count += 1
                if len(rows) == _ROWS_PER_BATCH:
                    writer.write_batch(to_batch(rows))
                    rows.clear()
            if rows:
                writer.write_batch(to_batch(rows))
        scratch.replace(path)
    finally:
        scratch.unlink(missing_ok=True)
    return count


@cache
def _columns() -> tuple[_Column, ...]:
    fields = msgspec.structs.fields(TrajectoryRecord)
    return tuple(_column(field.encode_name, inspect.type_info(field.type), per_token=True) for field in fields)


def _column(name: str, kind: inspect.Type, *, per_token: bool = False) -> _Column:
    """The rule above."""
    if isinstance(kind, inspect.UnionType):  # T | None is T: everything may be null
        (kind,) = (member for member in kind.types if not isinstance(member, inspect.NoneType))
    if isinstance(kind, inspect.StructType):
        members = [_column(field.encode_name, field.type) for field in kind.fields]
        return _Column(pa.field(name, pa.struct([member.field for member in members])), _struct(members))
    if isinstance(kind, inspect.VarTupleType | inspect.TupleType):
        item_kind = kind.item_type if isinstance(kind, inspect.VarTupleType) else kind.item_types[0]
        item = _column("item", item_kind)
        if per_token and item.field.type in (pa.uint64(), pa.float64()):
            item = _Column(pa.field("item", pa.uint32() if item.field.type == pa.uint64() else pa.float32()), None)
        return _Column(pa.field(name, pa.list_(item.field)), _list(item.convert))
    if (scalar := _SCALARS.get(type(kind))) is not None:
        return _Column(pa.field(name, scalar), None)
    return _Column(pa.field(name, pa.string(), metadata=_AS_JSON), _json)


def _struct(members: Sequence[_Column]) -> Callable[[Any], Any]:
    names = [(member.field.name, member.convert) for member in members]

    def convert(value: Any) -> Any:
        if value is None:
            return None
        return {name: getattr(value, name) if inner is None else inner(getattr(value, name)) for name, inner in names}

    return convert


def _list(inner: Callable[[Any], Any] | None) -> Callable[[Any], Any] | None:
    if inner is None:
        return None
    return lambda value: None if value is None else [inner(item) for item in value]


def _json(value: Any) -> str | None:
    return None if value is None else msgspec.json.encode(value).decode()
