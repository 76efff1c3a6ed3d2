"""What a server of ours listens on: the address, who may call, and a socket file that nobody else can take or open.

A unix socket is guarded by its file's mode; every other address needs a token, on loopback too: any user
of the host, and any program in a container with the host's network, can connect there.

See: dsec/address.py.
"""

from __future__ import annotations

import contextlib
import hmac
import os
import socket
import ssl
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import msgspec

from dsec.address import Address, parse_address
from dsec.errors import InvalidArgumentError

TOKEN_BYTES_MIN = 16
EDGE_KEY = "DSEC_API_KEY"
KEEPALIVE: tuple[tuple[str, Any], ...] = (
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 5_000),
    ("grpc.http2.max_ping_strikes", 0),
)
"""Options of a server: a client that is gone without a word is noticed, and clients may ask the same of us, however
quiet a stream is."""


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


def make_listen(url: str, token: str, certificate: Certificate | None, variable: str = EDGE_KEY) -> Listen:
    """What `url` asks for.  InvalidArgumentError where anybody could call; `variable` may hold the token."""
    address = parse_address(url)
    if address.kind == "unix":
        return Listen(address)
    check_token(token, f"{url} needs a token of at least {TOKEN_BYTES_MIN} bytes: give --token-file, or set {variable}")
    if address.kind == "tls" and certificate is None:
        raise InvalidArgumentError(f"{url} needs --tls-cert and --tls-key")
    return Listen(address, token, certificate if address.kind == "tls" else None)


def check_token(token: str, too_short: str) -> None:
    """InvalidArgumentError, which says `too_short`, or that a header cannot carry the token."""
    if len(token.encode()) < TOKEN_BYTES_MIN:
        raise InvalidArgumentError(too_short)
    if not (token.isascii() and token.isprintable()) or token != token.strip():
        raise InvalidArgumentError("the token is not printable ASCII without spaces at its ends")


def read_certificate(chain: Path | None, key: Path | None) -> Certificate | None:
    """The pair, or None for none.  InvalidArgumentError for half of one, or files that hold none."""
    if chain is None and key is None:
        return None
    if chain is None or key is None:
        raise InvalidArgumentError("--tls-cert and --tls-key belong together")
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(chain, key, password="")  # else it would ask for one
        return Certificate(chain.read_bytes(), key.read_bytes())
    except ssl.SSLError as error:
        why = f"{chain} and {key} are no chain and its unencrypted key in PEM"
        raise InvalidArgumentError(f"cannot use the certificate: {why}: {error}") from error
    except OSError as error:
        raise InvalidArgumentError(f"cannot read the certificate: {error}") from error


def read_token(path: Path | None, variable: str = EDGE_KEY) -> str:
    """What is in the file, or in the variable without one.  InvalidArgumentError if the file holds no token."""
    if path is None:
        return os.environ.get(variable, "")
    try:
        token = path.read_text().strip()
    except (OSError, ValueError) as error:
        raise InvalidArgumentError(f"cannot read the token: {error}") from error
    if not token:
        raise InvalidArgumentError(f"cannot read the token: {path} is empty")
    check_token(token, f"cannot use the token: {path} holds {len(token.encode())} bytes, at least {TOKEN_BYTES_MIN}")
    return token


class TokenInterceptor(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]  # generic in the stub only
    """Refuses every call whose `authorization` is not `Bearer` and the token; compares in constant time."""

    def __init__(self, token: str, open_service: str = "") -> None:
        """`open_service` is the full name of one that anybody may call."""
        self._open = f"/{open_service}/"
        self._wanted = f"Bearer {token}".encode()
        self._refusal = grpc.unary_unary_rpc_method_handler(self._refuse)

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any]]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any]:
        """Give the call's own handler, or one that refuses."""
        given = dict(handler_call_details.invocation_metadata).get("authorization", "")
        given = given.encode() if isinstance(given, str) else given
        is_open = handler_call_details.method.startswith(self._open)
        may_call = is_open or hmac.compare_digest(given, self._wanted)
        return await continuation(handler_call_details) if may_call else self._refusal

    @staticmethod
    async def _refuse(_request: bytes, context: grpc.aio.ServicerContext[Any, Any]) -> None:
        await context.abort(grpc.StatusCode.UNAUTHENTICATED, "the token is missing or wrong")


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


def bind(server: grpc.aio.Server, listen: Listen) -> int:
    """Have a server listen there; the port that it got.  RuntimeError if it cannot."""
    if listen.certificate is None:
        return server.add_insecure_port(listen.address.grpc_target)
    pair = (listen.certificate.key, listen.certificate.chain)
    return server.add_secure_port(listen.address.grpc_target, grpc.ssl_server_credentials([pair]))
