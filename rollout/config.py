"""Knobs of the rollout service, read from the environment (`DSEC_…`) or given by a command line."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any

import msgspec
from pydantic import Field, SecretStr, field_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

import wal
from rollout.environment.network import Networks, parse_ceiling


class WorkerConfig(BaseSettings):
    """Bounds of one worker process; docs/serving.md, "Workers"."""

    model_config = SettingsConfigDict(env_prefix="DSEC_WORKER_", extra="ignore")

    lease_ttl_s: float = Field(
        default=15.0, ge=1, le=3600, description="a worker that was silent for so long has lost its partitions"
    )
    grace_s: float = Field(default=30.0, gt=0, le=3600, description="how long a stop may take before it is a crash")


SANDBOXES_COUNT = 64
_ALIKE = 0.88
_OTHERS = ("DSEC_EDGE_", "DSEC_IMAGES_", "DSEC_DOCKER_", "DSEC_NETWORK_")
"""What the Edge reads, of which some are spelled nearly as ours."""
EMBEDDED = "embedded"
"""What the engine in this process is called where a URL may stand."""


class RolloutConfig(BaseSettings):
    """Bounds of one service process."""

    model_config = SettingsConfigDict(env_prefix="DSEC_", extra="ignore")

    concurrency: int = Field(default=16, ge=1, le=1024, description="rollouts that sample at once: engine slots")
    sandboxes_count_max: int = Field(
        default_factory=lambda given: max(SANDBOXES_COUNT, given.get("concurrency", 0)),
        ge=1,
        le=4096,
        description="sandboxes that run at once; a group needs one for each of its rollouts",
    )
    sandboxes_asleep_count_max: int = Field(
        default=32, ge=0, le=4096, description="sandboxes of preempted rollouts that sleep beside those that run"
    )
    tokens_count_max: int = Field(default=1 << 22, ge=1, description="tokens of all contexts that run, together")
    queued_count_max: int = Field(default=100_000, ge=1, description="rollouts that wait to run")
    projects_count_max: int = Field(default=1000, ge=1, description="projects that have rollouts here at once")
    project_weights: Annotated[dict[str, Annotated[float, Field(gt=0)]], NoDecode] = Field(
        default={}, description="JSON object of project to weight: its part of the tokens, 1 if it is not named"
    )
    credit_tokens_count_max: int = Field(default=65_536, ge=0, description="tokens that a project saves up by resting")
    ageing_s: float = Field(default=300.0, gt=0, description="after so long without a turn what waits rises a priority")
    preemptions_count_max: int = Field(default=8, ge=0, description="how often one rollout makes room for higher ones")
    engines: Annotated[tuple[str, ...], NoDecode] = Field(
        default=(), description="URLs of vLLM servers that draw, as one; none: the embedded engine, in this process"
    )
    engine_key: SecretStr = Field(default=SecretStr(""), description="what these servers ask for (vLLM's --api-key)")
    tokenizer: Path | None = Field(
        default=None, description="folder with the tokenizer.json of the model; unset: the embedded checkpoint's"
    )
    engine_silence_s: float = Field(
        default=600.0, gt=0, description="an engine that is not paused and says nothing for so long has failed"
    )
    engine_start_s: float = Field(
        default=3600.0, ge=0, description="how long a start waits for a first of these servers to be there"
    )
    engine_threads_count: int = Field(
        default=2, ge=1, le=16, description="threads that step the embedded engine, but no more than processors"
    )
    engine_cache: Path | None = Field(
        default=None,
        description="where states of contexts lie that memory has no room for; unset: DIR/states under dsec serve",
    )
    engine_cache_bytes_max: int = Field(default=1 << 30, ge=0, description="bytes of these states; 0: none are kept")
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
    checkpoints_root: Path | None = Field(
        default=None, description="UpdatePolicy takes weights from below this directory; unset: none"
    )
    newer_weights: Annotated[tuple[int, Path] | None, NoDecode] = Field(
        default=None,
        description="VERSION:DIR: weights to begin with where a log names none or older ones, as by UpdatePolicy",
    )
    reward_callables: Annotated[frozenset[str], NoDecode] = Field(
        default=frozenset(),
        description="module:function,module:function,… (or a JSON list) that jobs may name as their reward",
    )
    exports_shards: bool = Field(
        default=False, description="whether each rollout is written to DIR/shards when it ends, for trainers"
    )
    log_sync: str = Field(
        default="always",
        description="when the log is synced: always, interval(MS), or os (survives a kill, not a power cut)",
    )

    @field_validator("project_weights", mode="before")
    @classmethod
    def _read_weights(cls, given: Any) -> Any:
        return _decoded(given, 'write a JSON object of project to weight: {"main": 2, "side": 1}')

    @field_validator("newer_weights", mode="before")
    @classmethod
    def _read_newer_weights(cls, given: Any) -> Any:
        if not isinstance(given, str) or not given:
            return given or None
        version, _, folder = given.partition(":")
        if not (version.isascii() and version.isdecimal() and int(version) and Path(folder).is_absolute()):
            raise ValueError("write VERSION:DIR, a version above 0 and an absolute path: 8:/srv/checkpoints/8")
        return int(version), Path(folder)

    @field_validator("engines", mode="before")
    @classmethod
    def _read_engines(cls, given: Any) -> Any:
        urls = [url.rstrip("/") for url in (given.replace(",", " ").split() if isinstance(given, str) else given)]
        return () if urls == [EMBEDDED] else urls

    @field_validator("reward_callables", mode="before")
    @classmethod
    def _read_callables(cls, given: Any) -> Any:
        if isinstance(given, str) and not given.lstrip().startswith("["):
            return [name for each in given.split(",") if (name := each.strip())]
        return _decoded(given, "write module:function,module:function")

    @field_validator("engine_cache", "checkpoints_root", "tokenizer", mode="before")
    @classmethod
    def _is_set(cls, given: Any) -> Any:
        return given or None  # an empty variable is unset, and no path to where this happens to run

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

    def newer_than(self, policy_version: int) -> tuple[int, Path] | None:
        """Weights to begin with in place of those of this version."""
        return self.newer_weights if self.newer_weights and self.newer_weights[0] > policy_version else None

    @property
    def networks(self) -> Networks:
        """More than this no task gets, whatever it asks for."""
        return Networks(
            setup=parse_ceiling(self.setup_network),
            agent=parse_ceiling(self.agent_network),
            verifier=parse_ceiling(self.verifier_network),
        )


def misspelt(variables: Iterable[str]) -> dict[str, str]:
    """Environment variables that nobody reads, by how a knob is spelled that was probably meant."""
    kinds: tuple[type[BaseSettings], ...] = (RolloutConfig, WorkerConfig)
    knobs = {f"{kind.model_config['env_prefix']}{name.upper()}" for kind in kinds for name in kind.model_fields}
    found = {}
    for variable in sorted({variable.upper() for variable in variables} - knobs):
        near = get_close_matches(variable, knobs, n=1, cutoff=_ALIKE)
        if near and variable.startswith("DSEC_") and not variable.startswith(_OTHERS):
            found[variable] = near[0]
    return found


def _decoded(given: Any, rule: str) -> Any:
    """What stands in a variable as JSON.  ValueError says what to write."""
    try:
        return msgspec.json.decode(given) if isinstance(given, str) else given
    except msgspec.DecodeError:
        raise ValueError(rule) from None
