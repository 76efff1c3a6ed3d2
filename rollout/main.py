"""Composition: which engine, substrate and tokenizer a service on this host is made of."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import wal
from dsec.address import parse_address
from dsec.sandbox import Substrate
from rollout.config import RolloutConfig
from rollout.edge import RunEdge, substrate_config
from rollout.engines.embedded.checkpoint import DEFAULT_CHECKPOINT
from rollout.engines.embedded.engine import EmbeddedEngine
from rollout.errors import JournalError
from rollout.service import RolloutService
from toolcall_dsl import Tokenizer

EDGE = "edge"


def load_tokenizer() -> Tokenizer:
    """The tokenizer of the embedded checkpoint."""
    return Tokenizer.from_file(DEFAULT_CHECKPOINT / "tokenizer.json")


def holds_edge(directory: Path) -> bool:
    """Whether a run there was killed before its own Edge had ended in order."""
    return (directory / EDGE).exists()


def make_service(directory: Path, config: RolloutConfig, edge_url: str = "") -> RolloutService:
    """A service over `directory` with the embedded engine and an Edge: that of `edge_url`, or one of this process.

    Not open yet.  In an Edge of its own every rollout that runs can have a sandbox: RequestError if this process may
    not hold so many.  InvalidArgumentError for a url that cannot be.
    """
    substrate: Substrate
    if edge_url:
        substrate = _remote_substrate(edge_url, directory, config)
    else:
        substrate = RunEdge(directory / EDGE, substrate_config(config.concurrency))
    return RolloutService(directory, EmbeddedEngine(), substrate, load_tokenizer(), config)


def _remote_substrate(edge_url: str, directory: Path, config: RolloutConfig) -> Substrate:
    from dsec.client.leased import LeasedSubstrate  # gRPC, which a run with an Edge of its own does not need

    parse_address(edge_url)
    return LeasedSubstrate(edge_url, partial(_log_id, directory / "wal"), config.lease_ttl_s)


def _log_id(log: Path) -> str:
    """What names a run for ever, wherever its directory is moved: the id in the log's header."""
    reader = wal.Reader(log)
    next(iter(reader), None)
    if reader.header is None:
        raise JournalError(f"{log} has no header yet")
    return reader.header.log_id.hex()
