"""What the rollout tests share: the embedded checkpoint's tokenizer."""

import pytest

from rollout.main import load_tokenizer
from toolcall_dsl import Tokenizer


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return load_tokenizer()
