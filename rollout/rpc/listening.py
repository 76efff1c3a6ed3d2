"""Who may reach a rollout service, over gRPC and over HTTP: an address, its token and its certificate.

On a loopback address whoever is on the host may call unless there is a token; every other one has a token, or is a
socket that its file's mode guards.

See: dsec/listen.py.
"""

from __future__ import annotations

from dsec.address import Address, parse_address
from dsec.client.channel import ROLLOUTS
from dsec.listen import Certificate, Listen, make_listen

KEY = f"{ROLLOUTS}_KEY"
"""The variable of the token."""


def listen_at(where: str, token: str = "", certificate: Certificate | None = None) -> Listen:
    """What `where` asks for.  InvalidArgumentError: no address, or one that others reach too and has no token."""
    address = address_of(where)
    if address.kind == "tcp" and address.is_loopback and not token:
        return Listen(address)
    return make_listen(address.url, token, certificate, KEY)


def address_of(where: str) -> Address:
    """`HOST:PORT` means `tcp:HOST:PORT`.  InvalidArgumentError."""
    return parse_address(where, is_bare_tcp=True)


def told(url: str) -> str:
    """An address as people give it."""
    return url.removeprefix("tcp:")
