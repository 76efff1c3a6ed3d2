"""The Edge of one run, in the run's process: what it may have, where its state lies, and when that goes.

The run's own log is what must survive a power cut.  This Edge's journal is what a run that was killed finds its
sandboxes by; they do not outlive the kernel, so the journal need not either, and is not synced.

See: dsec/edge/local.py, docs/adr/0010-the-edge-in-process.md.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import resource
import shutil
from collections.abc import Mapping
from pathlib import Path

import msgspec
from pydantic_settings import BaseSettings

from dsec.edge.clock import HostClock
from dsec.edge.config import SLOTS_COUNT_MAX, SubstrateConfig
from dsec.edge.edge_config import EdgeConfig
from dsec.edge.local import EdgeSubstrate
from dsec.edge.network.decisions import Decision
from dsec.edge.service import Edge
from dsec.edge.substrates.container import ContainerSubstrate
from dsec.edge.threads import start_threads
from rollout.errors import RequestError

_FDS_COUNT_BASE = 256
_FDS_COUNT_PER_SANDBOX = 8
"""A guest's socket, and a command's pipes: both ends of three while it starts."""

EDGE_OF_A_RUN = {
    "memory_overcommit": math.inf,
    "pids_overcommit": math.inf,
    "disk_free_bytes_min": 0,
    "results_bytes_max": 8 << 20,
    "log_sync": "os",
    "log_bytes_max": 256 << 20,
    "log_reserve_bytes": 1 << 20,
}
SPOOL_OF_A_RUN = {"spool_bytes_max": 4 << 20, "spool_sandbox_bytes_max": 16 << 20}
"""A rollout asks for 2 MiB of a command's output at most, and never for that of an earlier one."""


class RunEdge(EdgeSubstrate):
    """An Edge for one run, on a directory that goes when the run has ended in order: nothing lives that needs it."""

    def __init__(self, directory: Path, config: SubstrateConfig) -> None:
        """`directory` holds one directory for each boot: what an earlier one left cannot live any more.

        Beside it stands what was decided of connections, if a sandbox asked for any.
        """
        self._home = directory / HostClock().boot_id
        self.decisions = directory.parent / "network.jsonl"
        self._config = config
        self._is_open = False
        super().__init__(self._make())

    def _make(self) -> Edge:
        self._containers = ContainerSubstrate(self._config, state_dir=self._home)
        edge = Edge(self._home, self._containers, edge_config())
        self._containers.gateway.on_decision = self._note
        return edge

    def _note(self, decision: Decision) -> None:
        """Keep what was decided of a connection for longer than the Edge's own journal: a line of JSON."""
        with self.decisions.open("ab") as file:
            file.write(msgspec.json.encode(decision) + b"\n")

    async def open(self) -> None:
        """As every Edge's; what lives on with too few slots for this run is destroyed, and rebuilt."""
        await start_threads()
        await asyncio.to_thread(self._forget_earlier_boots)
        await super().open()
        if self._containers.spawner.slots_count < self._config.sandboxes_count_max:
            await super().close()
            self.edge = self._make()
            await super().open()
        self._is_open = True

    def _forget_earlier_boots(self) -> None:
        for home in self._home.parent.glob("*"):
            if home != self._home:
                shutil.rmtree(home, ignore_errors=True)

    async def close(self) -> None:
        """Destroy what lives, and forget it."""
        await super().close()
        if self._is_open:
            await asyncio.to_thread(shutil.rmtree, self._home, ignore_errors=True)
            with contextlib.suppress(OSError):
                self._home.parent.rmdir()


def edge_config() -> EdgeConfig:
    """The bounds of a run's own Edge: those that somebody set, else none but those of the run."""
    config = EdgeConfig()
    return config.model_copy(update=_unset(config, EDGE_OF_A_RUN))


def substrate_config(sandboxes_count: int) -> SubstrateConfig:
    """The host's bounds with a slot and the descriptors for each of so many sandboxes.

    RequestError names the bound that somebody set below that.
    """
    config = SubstrateConfig()
    config = config.model_copy(update=_unset(config, SPOOL_OF_A_RUN))
    if config.sandboxes_count_max < sandboxes_count:
        if "sandboxes_count_max" in config.model_fields_set:
            raise RequestError(
                f"{sandboxes_count} rollouts at once need as many sandboxes, and DSEC_EDGE_SANDBOXES_COUNT_MAX allows "
                f"{config.sandboxes_count_max}: raise it, or lower the concurrency"
            )
        slots = min(SLOTS_COUNT_MAX, sandboxes_count + config.creates_in_flight_max)  # one that ends still has its slot
        config = config.model_copy(update={"sandboxes_count_max": slots})
    needed = _FDS_COUNT_BASE + sandboxes_count * _FDS_COUNT_PER_SANDBOX
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < needed:
        if hard != resource.RLIM_INFINITY and hard < needed:
            raise RequestError(
                f"{sandboxes_count} rollouts at once need {needed} open files, and this process may have {hard}: "
                f"raise the hard limit (ulimit -Hn {needed}), or lower the concurrency"
            )
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))
    return config


def _unset(config: BaseSettings, bounds: Mapping[str, object]) -> dict[str, object]:
    """Those of `bounds` that nobody set."""
    return {name: bound for name, bound in bounds.items() if name not in config.model_fields_set}
