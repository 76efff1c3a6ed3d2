"""What the language tests share: the shipped tokenizer, and tools as the shipped model knows them."""

from __future__ import annotations

from pathlib import Path

import pytest

from toolcall_dsl import Tokenizer

TOKENIZER_FILE = Path(__file__).parents[3] / "rollout/engines/embedded/checkpoint/tokenizer.json"


@pytest.fixture(scope="session")
def tokenizer_file() -> Path:
    return TOKENIZER_FILE


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(TOKENIZER_FILE)


@pytest.fixture(scope="session")
def tools() -> list[dict[str, object]]:
    schema = {"type": "object", "properties": {"command": {"type": "string"}}, "required": ["command"]}
    function = {"name": "bash", "description": "Run a shell command in the sandbox", "parameters": schema}
    return [{"type": "function", "function": function}]
