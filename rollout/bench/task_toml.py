"""The keys of a task's `task.toml`, checked.

Harbor's format grows by new keys, so unknown keys are let through; a known key with a wrong type or
with a meaning that this substrate cannot give (another user, a GPU, a foreign image) is
an error, because a task that silently runs elsewhere than its author meant gives wrong rewards.

See: docs/formats/task.md; Harbor 0.25's task format (schema_version 1.4).
"""

from __future__ import annotations

import tomllib
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, ValidationInfo, field_validator

from dsec.types import NetworkPolicy
from rollout.environment.network import PUBLIC, Networks, parse_rules

TIMEOUT_S_DEFAULT = 600.0
Seconds = Annotated[float, Field(gt=0, le=86_400)]
EnvName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]
Env = dict[EnvName, str]


class _Table(BaseModel):
    """One table of the file: strict types, unknown keys ignored, never changed after loading."""

    model_config = ConfigDict(strict=True, extra="ignore", frozen=True)

    @field_validator("user", check_fields=False)
    @classmethod
    def _is_root(cls, user: str | int | None) -> str | int | None:
        if user in (None, "root", "0", 0):
            return user
        raise ValueError(f'"{user}": commands run as root of the sandbox only; leave `user` out')

    @field_validator("env", check_fields=False)
    @classmethod
    def _is_literal(cls, env: Env) -> Env:
        for name, value in env.items():
            if "${" in value:
                raise ValueError(f"{name}: `${{...}}` would read the host's environment, which no sandbox sees")
            if "\0" in value:
                raise ValueError(f"{name}: a NUL byte cannot stand in an environment variable")
        return env


class _PhaseTable(_Table):
    """A table that may say where its phase connects to."""

    network_mode: str | None = None
    allowed_hosts: list[str] | None = None

    @field_validator("network_mode")
    @classmethod
    def _is_known(cls, mode: str | None) -> str | None:
        if mode not in (None, "no-network", "public", "allowlist"):
            raise ValueError(f'"{mode}" is not one of "no-network", "public", "allowlist"')
        return mode

    @field_validator("allowed_hosts")
    @classmethod
    def _are_rules(cls, hosts: list[str] | None, info: ValidationInfo) -> list[str] | None:
        if hosts is not None and info.data.get("network_mode") != "allowlist":
            raise ValueError('without network_mode = "allowlist" in the same table it would mean nothing: add that')
        parse_rules(hosts or ())
        return hosts

    @property
    def network(self) -> NetworkPolicy | None:
        """What the table says, if it says anything."""
        match self.network_mode:
            case None:
                return None
            case "public":
                return PUBLIC
            case _:
                return parse_rules(self.allowed_hosts or ())


class VerifierTable(_PhaseTable):
    """`[verifier]`: how test.sh is run."""

    timeout_sec: Seconds = TIMEOUT_S_DEFAULT
    env: Env = {}
    user: str | int | None = None


class AgentTable(_PhaseTable):
    """`[agent]`: how long the agent may take."""

    timeout_sec: Seconds = TIMEOUT_S_DEFAULT
    user: str | int | None = None


class EnvironmentTable(_PhaseTable):
    """`[environment]`: limits and variables of the sandbox; sizes in MiB."""

    docker_image: str | None = None
    cpus: Annotated[float, Field(gt=0, le=1024)] | None = None
    memory_mb: Annotated[int, Field(ge=16, le=1 << 22)] | None = None
    storage_mb: Annotated[int, Field(ge=1, le=1 << 22)] | None = None
    gpus: int = 0
    env: Env = {}
    workdir: Annotated[str, StringConstraints(pattern=r"^/[^\x00]*$")] | None = None
    memory: object = None
    storage: object = None

    @field_validator("memory", "storage")
    @classmethod
    def _has_the_newer_spelling(cls, size: object, field: ValidationInfo) -> None:
        raise ValueError(f"this spelling is not read any more: write {field.field_name}_mb, a number of MiB")

    @field_validator("docker_image")
    @classmethod
    def _has_no_image(cls, image: str | None) -> str | None:
        if image:
            raise ValueError(f'"{image}": images cannot be pulled yet; describe it in environment/Dockerfile')
        return image

    @field_validator("gpus")
    @classmethod
    def _has_no_gpus(cls, gpus: int) -> int:
        if gpus:
            raise ValueError("sandboxes have no GPUs: use 0")
        return gpus


class SolutionTable(_Table):
    """`[solution]`: variables of solve.sh."""

    env: Env = {}


class MetadataTable(_Table):
    """`[metadata]`: ours is `keep_processes`, for tasks whose agent starts a server that the tests talk to."""

    keep_processes: bool = False


class TaskToml(_Table):
    """The whole file."""

    schema_version: str = "1.0"
    verifier: VerifierTable = VerifierTable()
    agent: AgentTable = AgentTable()
    environment: EnvironmentTable = EnvironmentTable()
    solution: SolutionTable = SolutionTable()
    metadata: MetadataTable = MetadataTable()
    steps: list[object] = []

    @field_validator("steps")
    @classmethod
    def _has_one_step(cls, steps: list[object]) -> list[object]:
        if steps:
            raise ValueError("tasks of several steps are not supported: one instruction.md, one tests/")
        return steps

    @property
    def networks(self) -> Networks:
        """Of each phase; agent and verifier have that of `[environment]` where they say nothing."""
        setup = self.environment.network or NetworkPolicy()
        return Networks(setup=setup, agent=self.agent.network or setup, verifier=self.verifier.network or setup)


def parse_task_toml(data: bytes) -> TaskToml:
    """Read the bytes of a task.toml.  ValueError: one line for each rule that is broken."""
    try:
        return TaskToml.model_validate(tomllib.loads(data.decode()))
    except UnicodeDecodeError as why:
        raise ValueError(f"not UTF-8 (byte {why.start}): save it as UTF-8") from why
    except tomllib.TOMLDecodeError as why:
        raise ValueError(f"not TOML: {why}") from why
    except RecursionError:
        raise ValueError("not TOML that can be read: its arrays or tables are nested too deeply") from None
    except ValidationError as why:
        lines = (f"{'.'.join(map(str, e['loc']))}: {e['msg'].removeprefix('Value error, ')}" for e in why.errors())
        raise ValueError("; ".join(lines)) from why
