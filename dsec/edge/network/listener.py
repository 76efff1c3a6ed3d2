"""A listening socket inside a sandbox's network namespace, held by this process.

A socket belongs for ever to the namespace in which its thread was when it was made.  So a fresh thread enters
the sandbox's namespace, makes the socket and ends; nothing else of this process was ever there.  The
sandbox sees a listener on its own loopback and can neither close nor replace it.  A guest is named by a
pidfd, since a number may be another process's by now.
"""

from __future__ import annotations

import asyncio
import ctypes
import os
import socket
from concurrent.futures import Future, ThreadPoolExecutor
from errno import EADDRINUSE

from dsec.errors import DsecError, ResourceExhaustedError, SandboxLostError, StateError

PROXY_ADDRESS = "127.0.0.1"
PROXY_PORT = 3128
_BACKLOG_COUNT = 64
_BUFFER_BYTES = 256 << 10  # of an accepted connection: a sandbox that does not read holds no more kernel memory
_CLONE_NEWNET = 0x40000000
_LIBC = ctypes.CDLL(None, use_errno=True)


async def open_listener(guest: int) -> socket.socket:
    """Listen at 127.0.0.1:3128 in the network namespace of `guest`, a pidfd.

    StateError if a process of the sandbox has the port, SandboxLostError if the guest is gone, ResourceExhaustedError.
    """
    with ThreadPoolExecutor(max_workers=1) as fresh:  # never a pooled thread: it stays in the namespace
        try:
            listening = fresh.submit(_listen_in, guest)
        except RuntimeError as error:
            raise ResourceExhaustedError(f"no thread for a sandbox's network: {error}") from error
        try:
            return await asyncio.shield(asyncio.wrap_future(listening))
        except asyncio.CancelledError:
            listening.add_done_callback(_close_listener)
            raise


def _close_listener(listening: Future[socket.socket]) -> None:
    if listening.exception() is None:
        listening.result().close()


def _listen_in(guest: int) -> socket.socket:
    enter_network(guest)
    return _listen()


def enter_network(guest: int) -> None:
    """Move the calling thread, for the rest of its life, to the network of `guest`, a pidfd.  SandboxLostError."""
    if _LIBC.setns(guest, _CLONE_NEWNET) != 0:
        raise SandboxLostError(f"cannot enter the sandbox's network: {os.strerror(ctypes.get_errno())}")
    if os.path.samestat(os.stat("/proc/thread-self/ns/net"), os.stat("/proc/self/ns/net")):
        raise SandboxLostError("the sandbox has no network of its own, but this host's")


def _listen() -> socket.socket:
    try:
        listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    except OSError as error:
        raise ResourceExhaustedError(f"no socket for a sandbox's network: {error.strerror}") from error
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        for option in (socket.SO_RCVBUF, socket.SO_SNDBUF):
            listener.setsockopt(socket.SOL_SOCKET, option, _BUFFER_BYTES)
        listener.bind((PROXY_ADDRESS, PROXY_PORT))
        listener.listen(_BACKLOG_COUNT)
    except OSError as error:
        listener.close()
        raise _refusal(error) from error
    return listener


def _refusal(error: OSError) -> DsecError:
    if error.errno == EADDRINUSE:
        return StateError(f"a process of the sandbox has port {PROXY_PORT}, where the proxy listens: end it first")
    return ResourceExhaustedError(f"cannot listen in a sandbox: {error.strerror}")
