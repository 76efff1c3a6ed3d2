"""Knobs of the sandboxes' way out, each also an environment variable `DSEC_NETWORK_<NAME>`.

See: docs/adr/0007-network-by-proxy.md.
"""

from __future__ import annotations

from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict


class NetworkConfig(BaseSettings):
    """Bounds of a gateway.

    `idle_timeout_s` ends a connection on which no byte moved in either direction, `connection_s_max` any.
    `resolves_in_flight_max` is for one sandbox.  Of the decisions of one sandbox `decisions_per_s_max` are
    told, after a burst of `decisions_burst_max`; the others are counted.
    """

    model_config = SettingsConfigDict(env_prefix="DSEC_NETWORK_", frozen=True)

    connections_count_max: int = Field(default=1024, ge=1)
    sandbox_connections_count_max: int = Field(default=64, ge=1)
    resolves_in_flight_max: int = Field(default=4, ge=1)
    request_timeout_s: float = Field(default=30.0, gt=0)
    resolve_timeout_s: float = Field(default=15.0, gt=0)
    connect_timeout_s: float = Field(default=15.0, gt=0)
    idle_timeout_s: float = Field(default=300.0, gt=0)
    connection_s_max: float = Field(default=86_400.0, gt=0)
    decisions_per_s_max: float = Field(default=1.0, gt=0)
    decisions_burst_max: int = Field(default=500, ge=1)
