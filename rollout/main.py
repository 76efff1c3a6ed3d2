"""Composition: which engine, substrate and tokenizer a service on this host is made of."""

from __future__ import annotations

import asyncio
import contextlib
import math
import resource
import shutil
from functools import partial
from pathlib import Path

import wal
from dsec.address import parse_address
from dsec.edge.clock import HostClock
from dsec.edge.config import SLOTS_COUNT_MAX, SubstrateConfig
from dsec.edge.edge_config import EdgeConfig
from dsec.edge.local import EdgeSubstrate
from dsec.edge.service import Edge
from dsec.edge.substrates.container import ContainerSubstrate
from dsec.sandbox import Substrate
from rollout.config import RolloutConfig
from rollout.engines.embedded.checkpoint import DEFAULT_CHECKPOINT
from rollout.engines.embedded.engine import EmbeddedEngine
from rollout.errors import JournalError, RequestError
from rollout.service import RolloutService
from toolcall_dsl import Tokenizer

_FDS_COUNT_BASE = 256
_FDS_COUNT_PER_SANDBOX = 8
"""A guest's socket, and a command's pipes: both ends of three while it starts."""


def load_tokenizer() -> Tokenizer:
    """The tokenizer of the embedded checkpoint."""
    return Tokenizer.from_file(DEFAULT_CHECKPOINT / "tokenizer.json")


def make_service(directory: Path, config: RolloutConfig, edge_url: str = "") -> RolloutService:
    """A service over `directory` with the embedded engine and an Edge: that of `edge_url`, or one of this process.

    Not open yet.  In an Edge of its own every rollout that runs can have a sandbox: RequestError if this process may
    not hold so many.  InvalidArgumentError for a url that cannot be.
    """
    substrate: Substrate
    if edge_url:
        substrate = _remote_substrate(edge_url, directory, config)
    else:
        substrate = RunEdge(directory / "edge", substrate_config(config.concurrency))
    return RolloutService(directory, EmbeddedEngine(), substrate, load_tokenizer(), config)


class RunEdge(EdgeSubstrate):
    """An Edge for one run, on a directory that goes when the run has ended in order: nothing lives that needs it."""

    def __init__(self, directory: Path, config: SubstrateConfig) -> None:
        """`directory` holds one directory for each boot: what an earlier one left cannot live any more."""
        self._home = directory / HostClock().boot_id
        self._config = config
        self._is_open = False
        self._make()

    def _make(self) -> None:
        self._containers = ContainerSubstrate(self._config, state_dir=self._home)
        super().__init__(Edge(self._home, self._containers, edge_config()))

    async def open(self) -> None:
        """As every Edge's; what lives on with too few slots for this run is destroyed, and rebuilt."""
        await super().open()
        if self._containers.spawner.slots_count < self._config.sandboxes_count_max:
            await super().close()
            self._make()
            await super().open()
        self._is_open = True

    async def close(self) -> None:
        """Destroy what lives, and forget it."""
        await super().close()
        if self._is_open:
            await asyncio.to_thread(shutil.rmtree, self._home, ignore_errors=True)
            with contextlib.suppress(OSError):
                self._home.parent.rmdir()


def _remote_substrate(edge_url: str, directory: Path, config: RolloutConfig) -> Substrate:
    from dsec.client.leased import LeasedSubstrate  # gRPC, which most runs do not need

    parse_address(edge_url)
    return LeasedSubstrate(edge_url, partial(_log_id, directory / "wal"), config.lease_ttl_s)


def _log_id(log: Path) -> str:
    """What names a run for ever, wherever its directory is moved: the id in the log's header."""
    reader = wal.Reader(log)
    next(iter(reader), None)
    if reader.header is None:
        raise JournalError(f"{log} has no header yet")
    return reader.header.log_id.hex()


def edge_config() -> EdgeConfig:
    """The bounds of a run's own Edge: those that somebody set, else none but the run's concurrency.

    Its journal is what a run that was killed finds its sandboxes by.  They do not outlive the kernel, so it need not
    either: what must survive a power cut is in the run's own log.
    """
    config = EdgeConfig()
    of_a_run = {
        "memory_overcommit": math.inf,
        "pids_overcommit": math.inf,
        "disk_free_bytes_min": 0,
        "results_bytes_max": 8 << 20,
        "log_sync": "os",
        "log_bytes_max": 256 << 20,
        "log_reserve_bytes": 1 << 20,
    }
    return config.model_copy(update={k: v for k, v in of_a_run.items() if k not in config.model_fields_set})


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
