"""The way out of every sandbox of this host: attach, change, detach.

A sandbox's network namespace has nothing but its loopback.  Where a policy has rules, a proxy of this
process listens on that loopback; programs find it by the variables of `environment`.  There is no
other way out and none to forget: without this process, or before `apply`, nothing is reachable.

A proxy that was once attached stays until `detach`, whatever the policy becomes: a process that had taken
its port between two phases would read what the next phase sends.

See: docs/adr/0007-network-by-proxy.md.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from errno import EADDRNOTAVAIL
from typing import Protocol, runtime_checkable

from dsec.edge.network.config import NetworkConfig
from dsec.edge.network.decisions import Decision, log_decision
from dsec.edge.network.listener import PROXY_ADDRESS, PROXY_PORT
from dsec.edge.network.proxy import KEY_PREFIX, Keeper, Proxy, Resolver, Shared
from dsec.edge.network.rules import Address, Allowlist, parse_host
from dsec.types import NetworkPolicy, SandboxId

_RESOLVER_THREADS_COUNT = 16
_LOOPBACK = ("localhost", "127.0.0.1", "::1")


def environment(policy: NetworkPolicy) -> dict[str, str]:
    """The variables by which programs find the proxy; none without rules.

    Their own loopback they reach past it, but for what a rule says of the host's: that is asked of the proxy.
    ALL_PROXY is the proxy's HTTP side: Python's HTTP clients refuse to start on a SOCKS address that
    they lack a package for.
    """
    if not policy.rules:
        return {}
    url = f"http://{PROXY_ADDRESS}:{PROXY_PORT}"
    allowlist = Allowlist(policy)
    own = ",".join(host for host in _LOOPBACK if not allowlist.means(parse_host(host)))
    values = {"http_proxy": url, "https_proxy": url, "all_proxy": url, "no_proxy": own}
    return values | {name.upper(): value for name, value in values.items()}


def is_own_address(address: Address) -> bool:
    """True if `address` is one of this host's (or cannot be told from one): a socket can be bound to it."""
    family = socket.AF_INET if address.version == 4 else socket.AF_INET6
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.bind((str(address), 0))
    except OSError as error:
        return error.errno != EADDRNOTAVAIL
    return True


class Gateway:
    """The proxies of this host's sandboxes.

    `on_decision` is called in the event loop and must not wait.
    """

    def __init__(
        self,
        config: NetworkConfig | None = None,
        on_decision: Callable[[Decision], None] = log_decision,
        resolve: Resolver | None = None,
    ) -> None:
        self._threads: ThreadPoolExecutor | None = None
        self.on_decision = on_decision
        self._shared = Shared(config or NetworkConfig(), resolve or self._resolve, self._tell)
        self._proxies: dict[SandboxId, Proxy] = {}

    async def apply(self, sandbox_id: SandboxId, open_guest: Callable[[], int], policy: NetworkPolicy) -> None:
        """Allow this sandbox what `policy` says and nothing else; connections it no longer allows are closed.

        `open_guest` gives a pidfd of its first process, to be closed here.

        InvalidArgumentError (the old policy stays), StateError if a process of the sandbox listens on the
        proxy's port, SandboxLostError, ResourceExhaustedError: then nothing is reachable.
        """
        allowlist = Allowlist(policy, is_own_address)
        proxy = self._proxies.get(sandbox_id)
        if proxy is None:
            if not policy.rules:
                return
            proxy = self._proxies[sandbox_id] = Proxy(sandbox_id, self._shared)
        await proxy.apply(allowlist, open_guest)

    async def adopt(self, keeper: Keeper, kept: dict[str, int], alive: Collection[SandboxId]) -> None:
        """Keep listeners in `keeper` from now on, and take over those that `kept` has of sandboxes that are `alive`.

        Clients that connect to one of these wait until `apply` has said what it allows.
        """
        self._shared.keeper = keeper
        for key in [key for key in kept if key.startswith(KEY_PREFIX)]:
            sandbox_id = SandboxId(key.removeprefix(KEY_PREFIX))
            self._proxies[sandbox_id] = Proxy(sandbox_id, self._shared, socket.socket(fileno=kept.pop(key)))
            if sandbox_id not in alive:
                await self.detach(sandbox_id)

    async def detach(self, sandbox_id: SandboxId) -> bool:
        """End every connection of this sandbox and its proxy; False if it never had one."""
        proxy = self._proxies.pop(sandbox_id, None)
        if proxy is not None:
            await proxy.close(is_over=True)
        return proxy is not None

    async def close(self) -> None:
        """End every connection; listeners that the keeper has stay for the next process."""
        proxies, self._proxies = self._proxies, {}
        await asyncio.gather(*(proxy.close(is_over=False) for proxy in proxies.values()))
        threads, self._threads = self._threads, None
        if threads is not None:
            threads.shutdown(wait=False, cancel_futures=True)

    def _tell(self, decision: Decision) -> None:
        self.on_decision(decision)

    async def _resolve(self, name: str) -> list[str]:
        if self._threads is None:  # a lookup blocks its thread: never one that the rest of the host agent uses
            self._threads = ThreadPoolExecutor(_RESOLVER_THREADS_COUNT, thread_name_prefix="resolve")
        loop = asyncio.get_running_loop()
        found = await loop.run_in_executor(self._threads, socket.getaddrinfo, name, None, 0, socket.SOCK_STREAM)
        return [str(entry[4][0]) for entry in found]


@runtime_checkable
class Networked(Protocol):
    """A substrate whose sandboxes have a way out."""

    gateway: Gateway
