"""Knobs of one host's Edge, each also an environment variable `DSEC_EDGE_<NAME>`."""

from __future__ import annotations

from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict

import wal


class EdgeConfig(BaseSettings):
    """Bounds of one Edge.  Bytes, seconds, counts.

    The overcommits say how often the host's memory and process ids may be promised: most sandboxes
    use little of what they ask for.  None for `memory_bytes_total` and `pids_count_total` is what the host has.
    """

    model_config = SettingsConfigDict(env_prefix="DSEC_EDGE_", frozen=True)

    id_prefix: str = Field(default="sb-", pattern=r"^[a-z0-9-]{0,32}$")
    sandboxes_count_max: int = Field(default=4096, ge=1)
    memory_overcommit: float = Field(default=10.0, gt=0)
    memory_bytes_total: int | None = Field(default=None, ge=1)
    pids_overcommit: float = Field(default=16.0, gt=0)
    pids_count_total: int | None = Field(default=None, ge=1)
    disk_free_bytes_min: int = Field(default=256 << 20, ge=0)
    """Of the directory's file system, or a twentieth of its size, whichever is less."""
    creates_waiting_count_max: int = Field(default=1024, ge=0)
    create_wait_s: float = Field(default=2.0, ge=0)
    """How long a create waits for others to end before it is refused."""
    forks_count_max: int = Field(default=1024, ge=1)
    commands_count_max: int = Field(default=100_000, ge=1)
    """Of one sandbox, ever."""
    commands_running_count_max: int = Field(default=256, ge=1)
    """Of one sandbox, running or waiting for their turn."""
    inline_bytes_max: int = Field(default=8 << 20, ge=0, le=16 << 20)
    """Of each stream in a record and in an answer; the whole is read by offset."""
    results_bytes_max: int = Field(default=64 << 20, ge=0)
    """Of results that are kept in memory, to be asked for again."""
    scans_count_max: int = Field(default=1024, ge=1)
    """Questions about the journal's past that may be under way, a trajectory until its client has all of it."""
    processes_kept_count_max: int = Field(default=1024, ge=0)
    """Ended commands whose output can be read by offset without asking the sandbox again."""
    ended_count_max: int = Field(default=10_000, ge=1)
    """Sandboxes that ended, and cancelled requests, that are remembered."""
    labels_count_max: int = Field(default=64, ge=0)
    leases_count_max: int = Field(default=20_000, ge=1)
    """Live ones, and the `ended_count_max` that ended last."""
    lease_ttl_s_max: float = Field(default=86_400.0, gt=0)
    lease_grace_s: float = Field(default=30.0, ge=0)
    """How long owners have to renew after an Edge has opened."""
    close_wait_s: float = Field(default=30.0, gt=0)
    """How long a close waits for the last records."""
    log_sync: str = "always"
    log_segment_bytes_max: int = Field(default=16 << 20, ge=1 << 16)
    log_bytes_max: int = Field(default=4 << 30, ge=0)
    """Above it the oldest trajectories of ended sandboxes go; what lives keeps its own."""
    log_reserve_bytes: int = Field(default=16 << 20, ge=0)
    """Kept free for the log itself: what runs can end in the journal of a full disk."""

    @property
    def sync_policy(self) -> wal.SyncPolicy:
        """When the journal is synced."""
        return wal.SyncPolicy.parse(self.log_sync)
