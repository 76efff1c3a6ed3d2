"""A shard as Parquet, for readers that know no Arrow stream: the same columns in compressed row groups.

It is made of the stream when a shard is full or its writer closes, so it may lag behind an open shard,
and is never behind a full one.

See: docs/formats/shards.md.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
from pyarrow import parquet

from rollout.export.scratch import whole_file

ROW_GROUP_BYTES_MAX = 64 << 20
"""Before compression; a larger record has a row group of its own."""
_ROW_GROUP_ROWS_MAX = 1024
_LOGPROBS = "logprobs.list.element"


def write_parquet(path: Path, size: int) -> Path:
    """Write the batches in the first `size` bytes of the stream at `path` to `.parquet` beside it.  OSError."""
    target = path.with_suffix(".parquet")
    with pa.memory_map(str(path)) as source, pa.ipc.open_stream(source.read_buffer(size)) as stream:
        layout = stream.schema
        texts = [field.name for field in layout if pa.types.is_string(field.type)]
        with (
            whole_file(target) as file,
            parquet.ParquetWriter(
                file,
                layout,
                compression="zstd",
                use_dictionary=[*texts, "token_ids.list.element"],
                column_encoding={_LOGPROBS: "BYTE_STREAM_SPLIT"},
            ) as writer,
        ):
            for group in _row_groups(stream):
                writer.write_table(pa.Table.from_batches(group, layout), row_group_size=_ROW_GROUP_ROWS_MAX)
    return target


def has_schema(path: Path, schema: pa.Schema) -> bool:
    """Whether the stream at `path` is of that schema, metadata included."""
    with pa.memory_map(str(path)) as source, pa.ipc.open_stream(source) as stream:
        return bool(stream.schema.equals(schema, check_metadata=True))


def _row_groups(batches: Iterator[pa.RecordBatch]) -> Iterator[list[pa.RecordBatch]]:
    group: list[pa.RecordBatch] = []
    for batch in batches:
        whole = [*group, batch]
        if group and (
            sum(each.num_rows for each in whole) > _ROW_GROUP_ROWS_MAX
            or sum(each.nbytes for each in whole) > ROW_GROUP_BYTES_MAX
        ):
            yield group
            group = []
        group.append(batch)
    if group:
        yield group
