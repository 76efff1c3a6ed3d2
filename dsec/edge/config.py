"""Knobs of one host's sandboxes, each also an environment variable `DSEC_EDGE_<NAME>`.

See: docs/architecture.md, "Sandbox"; dsec/native/protocol.h for the bounds of the C side.
"""

from __future__ import annotations

from pathlib import Path

from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict

SLOTS_COUNT_MAX = 4608
LAYERS_COUNT_MAX = 1024
SANDBOX_LAYERS_COUNT_MAX = 64
EXECS_COUNT_MAX = 64
NATIVE_BINARY = Path(__file__).resolve().parent.parent / "native" / "dsec-sandbox"


class SubstrateConfig(BaseSettings):
    """Bounds of a substrate.

    `cgroup_parent` is the cgroup below which ours are made, relative to each hierarchy's mount
    ("" is its root).  `answer_grace_s` is how long after a command's timeout the guest may take to
    answer before the sandbox counts as lost.  `keep_s` is how long sandboxes wait for the next Edge when theirs has
    died (see `ContainerSubstrate`).  `warm_count` sandboxes are made ahead (`warm_pool.py`).
    `spool_bytes_max` is how much of one stream of a command is kept on disk, and `spool_sandbox_bytes_max` how
    much of all the ended commands of a sandbox.  `layer_idle_s` is how long a layer that no sandbox uses stays mounted.
    """

    model_config = SettingsConfigDict(env_prefix="DSEC_EDGE_", frozen=True)

    sandboxes_count_max: int = Field(default=256, ge=1, le=SLOTS_COUNT_MAX)
    creates_in_flight_max: int = Field(default=8, ge=1, le=256)
    execs_in_flight_max: int = Field(default=16, ge=1, le=EXECS_COUNT_MAX)
    create_timeout_s: float = Field(default=60.0, gt=0)
    answer_grace_s: float = Field(default=30.0, gt=0)
    spool_bytes_max: int = Field(default=64 << 20, ge=0)
    spool_sandbox_bytes_max: int = Field(default=1 << 30, ge=0)
    keep_s: int = Field(default=600, ge=1, le=7 * 86_400)
    warm_count: int = Field(default=0, ge=0, le=256)
    layer_idle_s: float = Field(default=60.0, ge=0)
    cgroup_parent: str = Field(default="", pattern=r"^([\w.@:-]+(/[\w.@:-]+)*)?$")
    binary_path: Path = NATIVE_BINARY


class DockerConfig(SubstrateConfig):
    """Bounds of the Docker substrate, each also an environment variable `DSEC_DOCKER_<NAME>`.

    `url` is Docker's socket ("": what DOCKER_HOST says, or the usual place); its daemon must see this
    host's files.  `image` is what base "host" means ("": made once of this host's own programs).  `layers_count_max`
    is how many snapshots, and stacks of them that were asked for, are kept beside those that something needs.
    """

    model_config = SettingsConfigDict(env_prefix="DSEC_DOCKER_", frozen=True)

    url: str = ""
    image: str = ""
    call_timeout_s: float = Field(default=300.0, gt=0)
    layers_count_max: int = Field(default=512, ge=1)
