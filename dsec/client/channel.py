"""A channel to a server of ours: where it is, its token and its certificate, as given or from the environment.

The clients of the Edge and of the rollout service read the same three variables, each below a prefix of its own:
`…_URL`, `…_KEY` (the token) and `…_CA` (a file of certificates to trust, PEM).
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import grpc

from dsec.address import Address
from dsec.errors import InvalidArgumentError

EDGE = "DSEC_API"
ROLLOUTS = "DSEC_ROLLOUT"


def given(prefix: str, url: str, token: str, default: str) -> tuple[str, str]:
    """The address and the token: these, or what the environment says, or the default address."""
    return url or os.environ.get(f"{prefix}_URL", "") or default, token or os.environ.get(f"{prefix}_KEY", "")


def open_channel(
    prefix: str, address: Address, token: str, options: list[tuple[str, Any]]
) -> tuple[grpc.aio.Channel, list[tuple[str, str]]]:
    """A channel, and the metadata that each call over it carries.  InvalidArgumentError: the certificates to trust."""
    metadata = [("authorization", f"Bearer {token}")] if token and address.kind != "unix" else []
    if address.kind != "tls":
        return grpc.aio.insecure_channel(address.grpc_target, options=options), metadata
    roots = os.environ.get(f"{prefix}_CA")
    try:
        credentials = grpc.ssl_channel_credentials(Path(roots).read_bytes() if roots else None)
    except OSError as error:
        raise InvalidArgumentError(f"cannot read the certificates of {prefix}_CA: {error}") from error
    return grpc.aio.secure_channel(address.grpc_target, credentials, options=options), metadata
