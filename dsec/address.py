"""Where a server of ours listens: `unix:PATH`, `tcp:HOST:PORT` (a token, nothing encrypted) or `tls:HOST:PORT`.

The same words for the server's `--listen`, the client's `DSEC_API_URL` or `DSEC_ROLLOUT_URL`, and what is printed.
"""

from __future__ import annotations

import ipaddress
import os
import re
from pathlib import Path
from typing import Literal

import msgspec

from dsec.errors import InvalidArgumentError

SOCKET_PATH_BYTES_MAX = 107
_HOST_PORT = re.compile(r"(\[[0-9A-Fa-f:.%]+\]|[^\s:\[\]/]+):(\d{1,5})")


class Address(msgspec.Struct, frozen=True):
    """One place; `target` is a path, or `host:port`."""

    kind: Literal["unix", "tcp", "tls"]
    target: str

    @property
    def url(self) -> str:
        """As it is written."""
        return f"{self.kind}:{self.target}"

    @property
    def grpc_target(self) -> str:
        """As gRPC wants it."""
        return self.url if self.kind == "unix" else self.target

    @property
    def is_loopback(self) -> bool:
        """Whether only programs of this host reach it, by TCP."""
        host = self.target.rpartition(":")[0].strip("[]")
        try:
            return self.kind != "unix" and (host == "localhost" or ipaddress.ip_address(host).is_loopback)
        except ValueError:
            return False


def parse_address(url: str, *, is_bare_tcp: bool = False) -> Address:
    """InvalidArgumentError if it is none; with `is_bare_tcp`, HOST:PORT alone is one, too."""
    kind, _, target = url.partition(":")
    if is_bare_tcp and _HOST_PORT.fullmatch(url):
        kind, target = "tcp", url
    if kind == "unix":
        path = os.path.abspath(target.removeprefix("//"))
        if not target or len(os.fsencode(path)) > SOCKET_PATH_BYTES_MAX:
            raise InvalidArgumentError(f"{url!r} is no socket path of 1 to {SOCKET_PATH_BYTES_MAX} bytes")
        return Address("unix", path)
    if kind in ("tcp", "tls"):
        found = _HOST_PORT.fullmatch(target.removeprefix("//"))
        if found is not None and int(found[2]) < 1 << 16:
            return Address("tcp" if kind == "tcp" else "tls", found[0])
    tcp = "HOST:PORT" if is_bare_tcp else "tcp:HOST:PORT"
    raise InvalidArgumentError(f"{url!r} is no address: give unix:PATH, {tcp} or tls:HOST:PORT")


def default_url() -> str:
    """Where the Edge of this host listens unless told otherwise: /run/dsec for root, else the user's own place."""
    if os.geteuid() == 0:
        return "unix:/run/dsec/edge.sock"
    runtime = os.environ.get("XDG_RUNTIME_DIR") or str(default_directory())
    return f"unix:{runtime}/dsec/edge.sock"


def default_directory() -> Path:
    """Where the Edge of this host keeps its state unless told otherwise."""
    if os.geteuid() == 0:
        return Path("/var/lib/dsec")
    return Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local/state") / "dsec"
