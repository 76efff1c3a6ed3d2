"""What an Edge listens on: the address, who may call, and a socket file that nobody else can take or open.

A unix socket is guarded by its file's mode; every other address needs a token, on loopback too: any user
of the host, and any program in a container with the host's network, can connect there.

See: dsec/address.py.
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import msgspec

from dsec.address import Address, parse_address
from dsec.errors import InvalidArgumentError

TOKEN_BYTES_MIN = 16


class Certificate(msgspec.Struct, frozen=True):
    """PEM: the chain, and its private key."""

    chain: bytes
    key: bytes


class Listen(msgspec.Struct, frozen=True):
    """One address to serve; `token` is empty for a unix socket only."""

    address: Address
    token: str = ""
    certificate: Certificate | None = None

    def url_with(self, port: int) -> str:
        """The address as it came to be; `port` replaces 0."""
        if self.address.kind == "unix":
            return self.address.url
        return f"{self.address.kind}:{self.address.target.rpartition(':')[0]}:{port}"


def make_listen(url: str, token: str, certificate: Certificate | None) -> Listen:
    """What `url` asks for.  InvalidArgumentError where anybody could call."""
    address = parse_address(url)
    if address.kind == "unix":
        return Listen(address)
    if len(token.encode()) < TOKEN_BYTES_MIN:
        raise InvalidArgumentError(
            f"{url} needs a token of at least {TOKEN_BYTES_MIN} bytes: give --token-file, or set DSEC_API_KEY"
        )
    if not (token.isascii() and token.isprintable()) or token != token.strip():
        raise InvalidArgumentError("the token is not printable ASCII without spaces at its ends")
    if address.kind == "tls" and certificate is None:
        raise InvalidArgumentError(f"{url} needs --tls-cert and --tls-key")
    return Listen(address, token, certificate if address.kind == "tls" else None)


@contextlib.contextmanager
def claim_socket(listen: Listen) -> Iterator[None]:
    """Bind in here: a file that a killed server left is removed, and the new one is our user's alone.

    InvalidArgumentError if somebody listens there, or the directory cannot be made.
    """
    if listen.address.kind != "unix":
        yield
        return
    path = Path(listen.address.target)
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        _remove_stale(path)
    except OSError as error:
        raise InvalidArgumentError(f"cannot listen on {listen.address.url}: {error}") from error
    mask = os.umask(0o177)
    try:
        yield
    finally:
        os.umask(mask)


def _remove_stale(path: Path) -> None:
    if not path.is_socket():
        if path.exists():
            raise InvalidArgumentError(f"cannot listen on {path}: it is there, and no socket")
        return
    with socket.socket(socket.AF_UNIX) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            path.unlink()
            return
    raise InvalidArgumentError(f"cannot listen on unix:{path}: another process does")
