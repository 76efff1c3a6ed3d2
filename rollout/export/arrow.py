"""Trajectories as one Arrow IPC file: a row for each rollout, per-token fields as typed lists.

Arrow IPC is memory-mappable and read by every data library; per-token fields are u32 and f32 lists,
never JSON.  The file is derived: it can be deleted and made again from the log.

See: docs/formats/trajectory.md.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

import msgspec
import pyarrow as pa

from rollout.record import TrajectoryRecord

_SPANS = pa.list_(
    pa.struct(
        [
            ("start", pa.uint32()),
            ("length", pa.uint32()),
            ("kind", pa.string()),
            ("turn", pa.uint32()),
            ("trainable", pa.bool_()),
        ]
    )
)
_ROWS_PER_BATCH = 256
_TYPED = {
    "token_ids": pa.list_(pa.uint32()),
    "logprobs": pa.list_(pa.float32()),
    "kv_breaks": pa.list_(pa.uint32()),
    "group_index": pa.uint32(),
    "group_size": pa.uint32(),
    "reward": pa.float64(),
    "attempt": pa.uint32(),
    "tokens_sampled": pa.uint32(),
    "tokens_replayed": pa.uint64(),
    "commands_replayed": pa.uint32(),
    "commands_run_twice": pa.uint32(),
    "sandbox_start_s": pa.float64(),
    "tools_s": pa.float64(),
    "judge_s": pa.float64(),
    "first_lsn": pa.uint64(),
    "last_lsn": pa.uint64(),
}
_AS_JSON = ("sampling", "policy_versions", "turns", "tool_calls", "reward_components", "infra_failure")
"""Small, deeply nested fields: one JSON text each."""


def schema() -> pa.Schema:
    """The columns, in the order of TrajectoryRecord's fields."""
    columns = []
    for name in TrajectoryRecord.__struct_fields__:
        kind = _SPANS if name == "spans" else _TYPED.get(name, pa.string())
        columns.append(pa.field(name, kind, metadata={"encoding": "json"} if name in _AS_JSON else None))
    return pa.schema(columns, metadata={"format": "dsec.trajectory", "version": "1"})


def write(path: Path, records: Iterable[TrajectoryRecord]) -> int:
    """Write all records to `path` (replaced atomically); returns how many.  OSError if it cannot."""
    scratch, count, layout = path.with_name(f".{path.name}.{os.getpid()}"), 0, schema()
    try:
        with pa.OSFile(str(scratch), "wb") as sink, pa.ipc.new_file(sink, layout) as writer:
            rows: list[dict[str, object]] = []
            for record in records:
                rows.append(_row(record))
                count += 1
                if len(rows) == _ROWS_PER_BATCH:
                    writer.write_batch(pa.RecordBatch.from_pylist(rows, schema=layout))
                    rows.clear()
            if rows:
                writer.write_batch(pa.RecordBatch.from_pylist(rows, schema=layout))
        scratch.replace(path)
    finally:
        scratch.unlink(missing_ok=True)
    return count


def _row(record: TrajectoryRecord) -> dict[str, object]:
    row: dict[str, object] = msgspec.structs.asdict(record)
    row["spans"] = [msgspec.structs.asdict(span) for span in record.spans]
    for name in _AS_JSON:
        row[name] = None if row[name] is None else msgspec.json.encode(row[name]).decode()
    return row
