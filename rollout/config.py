"""Knobs of the rollout service, read from the environment (`DSEC_…`) or given by a command line."""

from __future__ import annotations

from pydantic import Field, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

import wal
from rollout.network import Networks, parse_ceiling


class WorkerConfig(BaseSettings):
    """Bounds of one worker process; docs/operating.md, "Workers"."""

    model_config = SettingsConfigDict(env_prefix="DSEC_WORKER_", extra="ignore")

    lease_ttl_s: float = Field(
        default=15.0, ge=1, le=3600, description="a worker that was silent for so long has lost its partitions"
    )
    grace_s: float = Field(default=30.0, gt=0, le=3600, description="how long a stop may take before it is a crash")


class RolloutConfig(BaseSettings):
    """Bounds of one service process."""

    model_config = SettingsConfigDict(env_prefix="DSEC_", extra="ignore")

    concurrency: int = Field(default=16, ge=1, le=1024, description="rollouts that run at once")
    jobs_count_max: int = Field(default=10_000, ge=1, description="jobs that one log may hold")
    rollouts_count_max: int = Field(default=100_000, ge=1, description="rollouts that one job may ask for")
    context_tokens_count_max: int = Field(default=2048, ge=1, description="longest context that a job may ask for")
    watch_events_count_max: int = Field(default=100_000, ge=1, description="events kept for a slow watcher")
    lease_ttl_s: float = Field(
        default=600.0, gt=0, le=86_400, description="how long the sandboxes of a killed run wait for it at an --edge"
    )
    setup_network: str = Field(
        default="", description="where set-ups of tasks may connect to at most: rules as of --allow, or public"
    )
    agent_network: str = Field(default="", description="where agents may connect to at most")
    verifier_network: str = Field(default="", description="where tests of tasks may connect to at most")
    reward_callables: frozenset[str] = Field(
        default=frozenset(), description="JSON list of module:function that jobs may name as their reward"
    )
    log_sync: str = Field(
        default="always",
        description="when the log is synced: always, interval(MS), or os (survives a kill, not a power cut)",
    )

    @field_validator("log_sync")
    @classmethod
    def _is_a_policy(cls, text: str) -> str:
        wal.SyncPolicy.parse(text)
        return text

    @field_validator("setup_network", "agent_network", "verifier_network")
    @classmethod
    def _is_an_allowlist(cls, text: str) -> str:
        parse_ceiling(text)
        return text

    @property
    def networks(self) -> Networks:
        """More than this no task gets, whatever it asks for."""
        return Networks(
            setup=parse_ceiling(self.setup_network),
            agent=parse_ceiling(self.agent_network),
            verifier=parse_ceiling(self.verifier_network),
        )
