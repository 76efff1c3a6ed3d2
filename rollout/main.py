"""Composition: which engine, substrate and tokenizer a service on this host is made of."""

from __future__ import annotations

import resource
from pathlib import Path

from dsec.edge.config import SLOTS_COUNT_MAX, SubstrateConfig
from dsec.edge.substrates.container import ContainerSubstrate
from rollout.config import RolloutConfig
from rollout.engines.embedded.checkpoint import DEFAULT_CHECKPOINT
from rollout.engines.embedded.engine import EmbeddedEngine
from rollout.errors import RequestError
from rollout.service import RolloutService
from toolcall_dsl import Tokenizer

_FDS_COUNT_BASE = 256
_FDS_COUNT_PER_SANDBOX = 8
"""A guest's socket, and a command's pipes: both ends of three while it starts."""


def load_tokenizer() -> Tokenizer:
    """The tokenizer of the embedded checkpoint."""
    return Tokenizer.from_file(DEFAULT_CHECKPOINT / "tokenizer.json")


def make_service(directory: Path, config: RolloutConfig) -> RolloutService:
    """A service over `directory` with the embedded engine and the container substrate; not open yet.

    Every rollout that runs can have a sandbox.  RequestError if this process may not hold so many.
    """
    substrate = ContainerSubstrate(substrate_config(config.concurrency))
    return RolloutService(directory, EmbeddedEngine(), substrate, load_tokenizer(), config)


def substrate_config(concurrency: int) -> SubstrateConfig:
    """The host's bounds with a slot and the descriptors for each of `concurrency` rollouts.

    RequestError names the bound that somebody set below that.
    """
    config = SubstrateConfig()
    if config.sandboxes_count_max < concurrency:
        if "sandboxes_count_max" in config.model_fields_set:
            raise RequestError(
                f"{concurrency} rollouts at once need as many sandboxes, and DSEC_EDGE_SANDBOXES_COUNT_MAX allows "
                f"{config.sandboxes_count_max}: raise it, or lower the concurrency"
            )
        slots = min(SLOTS_COUNT_MAX, concurrency + config.creates_in_flight_max)  # one that ends still has its slot
        config = config.model_copy(update={"sandboxes_count_max": slots})
    needed = _FDS_COUNT_BASE + concurrency * _FDS_COUNT_PER_SANDBOX
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < needed:
        if hard != resource.RLIM_INFINITY and hard < needed:
            raise RequestError(
                f"{concurrency} rollouts at once need {needed} open files, and this process may have {hard}: "
                f"raise the hard limit (ulimit -Hn {needed}), or lower the concurrency"
            )
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))
    return config
