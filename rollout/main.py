"""Composition: which engine, substrate and tokenizer a service on this host is made of."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import wal
from dsec.address import parse_address
from dsec.edge.clock import HostClock
from dsec.sandbox import Substrate
from rollout.config import RolloutConfig
from rollout.edge import RunEdge, substrate_config
from rollout.engines.embedded.checkpoint import DEFAULT_CHECKPOINT
from rollout.engines.embedded.engine import EmbeddedEngine
from rollout.errors import JournalError
from rollout.service import RolloutService
from toolcall_dsl import Tokenizer

EDGE = "edge"
_LOCKS = "[0-9a-f]" * 8 + ".lock"
"""Of a log, by epoch: docs/formats/wal.md."""


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
    return LeasedSubstrate(edge_url, partial(sandbox_labels, directory / "wal"), config.lease_ttl_s)


def sandbox_labels(log: Path) -> dict[str, str]:
    """What the sandboxes of an open log are found by: `run`, its id, and `log`, the one file that locks it.

    A copy of a run has its id and all that it ever wrote, but not that file: it is on this boot of this host, and its
    inode is taken for as long as somebody holds the lock.
    """
    reader = wal.Reader(log)
    next(iter(reader), None)
    if reader.header is None:
        raise JournalError(f"{log} has no header yet")
    lock = max(log.glob(_LOCKS)).stat()
    return {"run": reader.header.log_id.hex(), "log": f"{HostClock().boot_id}/{lock.st_dev:x}/{lock.st_ino:x}"}
