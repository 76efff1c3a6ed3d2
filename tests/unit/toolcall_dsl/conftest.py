"""What the language tests share: the shipped tokenizer, and tools as the shipped model knows them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from toolcall_dsl import DIALECTS, Tokenizer

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


@pytest.fixture(scope="session")
def wide_tokenizer_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped vocabulary and the tokens that it lacks of any dialect."""
    definition = json.loads(TOKENIZER_FILE.read_text())
    known = {entry["content"] for entry in definition["added_tokens"]}
    wanted = dict.fromkeys(token for dialect in DIALECTS.values() for token in (*dialect.control_tokens, dialect.image))
    next_id = max(entry["id"] for entry in definition["added_tokens"]) + 1
    for place, token in enumerate(token for token in wanted if token not in known):
        definition["added_tokens"].append(
            {**definition["added_tokens"][0], "id": next_id + place, "content": token, "special": False}
        )
    path = tmp_path_factory.mktemp("tokenizer") / "wide.json"
    path.write_text(json.dumps(definition))
    return path


@pytest.fixture(scope="session")
def wide_tokenizer(wide_tokenizer_file: Path) -> Tokenizer:
    return Tokenizer.from_file(wide_tokenizer_file)
