"""Records as Arrow: the columns that the rule gives, and values that survive them."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import pyarrow as pa
import pytest

from rollout.export import arrow
from rollout.export.testing import made_up_record


def plain(field: pa.Field, value: object) -> object:
    """A value of a column as JSON would say it."""
    if value is None:
        return None
    if field.metadata:
        return json.loads(value)
    if pa.types.is_struct(field.type):
        return {member.name: plain(member, value[member.name]) for member in field.type}
    if pa.types.is_list(field.type):
        return [plain(field.type.value_field, item) for item in value]
    return pytest.approx(value, abs=1e-6) if isinstance(value, float) else value


def test_what_is_written_is_what_the_record_says(tmp_path: Path) -> None:
    records = [
        made_up_record("a", turns=((3, 4), (2, 5))),
        made_up_record("b", reward=None, finish_reason=None, turns=((5, 0),)),
    ]
    assert arrow.write(tmp_path / "x.arrow", records) == 2
    with pa.memory_map(str(tmp_path / "x.arrow")) as source:
        table = pa.ipc.open_file(source).read_all()
    for row, record in zip(table.to_pylist(), records, strict=True):
        said = {field.name: plain(field, row[field.name]) for field in table.schema}
        assert said == json.loads(msgspec.json.encode(record))
    assert table["reward"].to_pylist()[1]["value"] is None


def test_tokens_are_u32_and_their_logprobs_f32() -> None:
    layout = arrow.schema()
    assert layout.field("token_ids").type == pa.list_(pa.uint32())
    assert layout.field("logprobs").type == pa.list_(pa.float32())


def test_only_what_has_free_keys_is_json() -> None:
    def texts(field: pa.Field, path: str) -> list[str]:
        if pa.types.is_list(field.type):
            return texts(field.type.value_field, path)
        if pa.types.is_struct(field.type):
            return [name for member in field.type for name in texts(member, f"{path}.{member.name}")]
        return [path] if field.metadata else []

    names = [name for field in arrow.schema() for name in texts(field, field.name)]
    assert names == ["infra_failure", "reward.components", "group.missing_reasons", "tool_calls.arguments"]
