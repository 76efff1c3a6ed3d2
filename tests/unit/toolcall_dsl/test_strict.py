"""The strict grammar: what its sentences tell a model to write."""

from __future__ import annotations

import pytest

from toolcall_dsl import DIALECTS, Dialect, parse_text

EOS = "<｜end▁of▁sentence｜>"


@pytest.mark.parametrize("dialect", DIALECTS.values(), ids=lambda dialect: dialect.name)
@pytest.mark.parametrize("thinking", [False, True])
@pytest.mark.parametrize(
    "opener", ["\n<{dsml}{block}>", "\n\n<{dsml}calls_of_tools>", "\n\n<{dsml}{invoke} name=", "{dsml}"]
)
def test_a_tag_outside_of_a_block_tells_how_a_block_begins(opener: str, thinking: bool, dialect: Dialect) -> None:
    text = "x" + opener.format(dsml=dialect.dsml, block=dialect.block_name, invoke=dialect.invoke_name) + EOS
    error = parse_text(text, thinking=thinking, dialect=dialect).error
    assert error is not None
    assert error.rule == "block-not-opened"
    assert f"a blank line and then <{dialect.dsml}{dialect.block_name}> on a line of its own" in error.message
