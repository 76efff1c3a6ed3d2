"""Composition: which engine, substrate and tokenizer a service on this host is made of."""

from __future__ import annotations

from pathlib import Path

from dsec.edge.substrates.container import ContainerSubstrate
from rollout.config import RolloutConfig
from rollout.engines.embedded.checkpoint import DEFAULT_CHECKPOINT
from rollout.engines.embedded.engine import EmbeddedEngine
from rollout.service import RolloutService
from toolcall_dsl import Tokenizer


def load_tokenizer() -> Tokenizer:
    """The tokenizer of the embedded checkpoint."""
    return Tokenizer.from_file(DEFAULT_CHECKPOINT / "tokenizer.json")


def make_service(directory: Path, config: RolloutConfig) -> RolloutService:
    """A service over `directory` with the embedded engine and the container substrate; not open yet."""
    return RolloutService(directory, EmbeddedEngine(), ContainerSubstrate(), load_tokenizer(), config)
