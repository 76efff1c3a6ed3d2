"""Where a sandbox may connect to: names, addresses and ports against an allowlist.  Pure.

A name is allowed by a rule for names and an address by a rule for addresses, and neither stands for the
other: an allowed name does not open its address under other names, an allowed address is reached by its
digits only.  So a name that no rule knows is never even looked up, and looking names up carries no
data out of a sandbox.

Invariants:
    1. Without a rule nothing is allowed.
    2. A *guarded* address (loopback, private, link-local, multicast, reserved, or the host's own) is allowed
       only by a CIDR that lies wholly among guarded ones, or is that very address: neither a name that
       resolves to it (DNS rebinding) nor `0.0.0.0/0` opens it.
    3. Addresses are compared in one form: IPv4 inside IPv6 is IPv4.

See: docs/adr/0007-network-by-proxy.md; the IANA special-purpose address registries (RFC 6890).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network

from dsec.errors import InvalidArgumentError
from dsec.types import RULES_COUNT_MAX, NetworkPolicy, NetworkRule

Address = IPv4Address | IPv6Address
Network = IPv4Network | IPv6Network
Host = str | IPv4Address | IPv6Address
"""A name in its normal form (lower case, IDNA, no trailing dot), or an address."""

PORTS_COUNT_MAX = 256
NAME_BYTES_MAX = 253
_LABEL = re.compile(r"(?!-)[a-z0-9_-]{1,63}(?<!-)")
_NUMBER = re.compile(r"[0-9]+|0x[0-9a-f]*")
GUARDED: tuple[Network, ...] = tuple(
    ip_network(text)
    for text in (
        "0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16", "172.16.0.0/12", "192.0.0.0/24",
        "192.0.2.0/24", "192.88.99.0/24", "192.168.0.0/16", "198.18.0.0/15", "198.51.100.0/24", "203.0.113.0/24",
        "224.0.0.0/4", "240.0.0.0/4",
        "::/3", "4000::/2", "8000::/1",  # all but global unicast: NAT64 and IPv4 in IPv6 among them
        "2001::/23", "2001:db8::/32", "2002::/16", "3fff::/20",  # Teredo, 6to4: they carry an IPv4 address
    )
)  # fmt: skip


def parse_host(text: str) -> Host:
    """A name or an address as a client or a rule gives it, in its normal form.  InvalidArgumentError.

    What some resolvers take for an address (`127.1`, `0x7f000001`) is neither.
    """
    if "%" not in text:  # no zones: they would name an interface of the host
        try:
            return _plain(ip_address(text))
        except ValueError:
            pass
    return _parse_name(text)


def _parse_name(text: str) -> str:
    if len(text) > NAME_BYTES_MAX + 1:
        raise InvalidArgumentError(f"a host name of {len(text)} characters, more than {NAME_BYTES_MAX}")
    try:
        name = text if text.isascii() else text.encode("idna").decode()
    except UnicodeError as error:
        raise InvalidArgumentError(f"{text!r} is not a host name: {error}") from error
    name = name.lower().removesuffix(".")
    labels = name.split(".")
    if len(name) > NAME_BYTES_MAX or not all(map(_LABEL.fullmatch, labels)) or _NUMBER.fullmatch(labels[-1]):
        raise InvalidArgumentError(f"{text!r} is neither a host name nor an address")
    return name


def _plain(address: Address) -> Address:
    mapped = address.ipv4_mapped if isinstance(address, IPv6Address) else None
    return mapped or address


def _is_of_no_host(_address: Address) -> bool:
    return False


class _Ports:
    def __init__(self, ports: tuple[int, ...]) -> None:
        if len(ports) > PORTS_COUNT_MAX:
            raise InvalidArgumentError(f"{len(ports)} ports in one rule, more than {PORTS_COUNT_MAX}")
        for port in ports:
            if not 1 <= port <= 65_535:
                raise InvalidArgumentError(f"{port} is not a port")
        self._ports = frozenset(ports)

    def allow(self, port: int) -> bool:
        return port in self._ports if self._ports else 1 <= port <= 65_535

    def cover(self, other: _Ports) -> bool:
        return not self._ports or (bool(other._ports) and other._ports <= self._ports)


class Allowlist:
    """A policy, ready to be asked.  `is_own` knows the host's own addresses.  InvalidArgumentError."""

    def __init__(self, policy: NetworkPolicy, is_own: Callable[[Address], bool] = _is_of_no_host) -> None:
        if len(policy.rules) > RULES_COUNT_MAX:
            raise InvalidArgumentError(f"{len(policy.rules)} network rules, more than {RULES_COUNT_MAX}")
        self._is_own = is_own
        self._names: list[tuple[str, _Ports]] = []
        self._networks: list[tuple[Network, _Ports]] = []
        for rule in policy.rules:
            self._add(rule)

    def _add(self, rule: NetworkRule) -> None:
        if bool(rule.host) == bool(rule.cidr):
            raise InvalidArgumentError(f"a network rule has a host or a cidr: {rule.host!r} and {rule.cidr!r}")
        ports = _Ports(rule.ports)
        if rule.cidr:
            self._networks.append((_parse_network(rule.cidr), ports))
            return
        wildcard = "*." if rule.host.startswith("*.") else ""
        name = rule.host if rule.host == "*" else parse_host(rule.host.removeprefix(wildcard))
        if not isinstance(name, str):
            raise InvalidArgumentError(f"{rule.host!r} is an address: allow it by cidr")
        self._names.append((wildcard + name, ports))

    def may_resolve(self, name: str, port: int) -> bool:
        """True if a rule allows this name (in its normal form), wherever it may lie."""
        return any(_matches(pattern, name) and ports.allow(port) for pattern, ports in self._names)

    def allows(self, host: Host, address: Address, port: int) -> bool:
        """True if a client that asked for `host` may be connected to `address`."""
        address = _plain(address)
        if isinstance(host, str):
            return self.may_resolve(host, port) and (not self.guards(address) or self._lists(address, port))
        return _plain(host) == address and self._lists(address, port)

    def covers(self, rule: NetworkRule) -> bool:
        """True if one rule of this list allows whatever that rule would.  InvalidArgumentError.

        One that means guarded addresses, or a single one (it may be the host's own), needs a rule that does too.
        """
        asked = Allowlist(NetworkPolicy(rules=(rule,)))
        names = all(
            any(_matches(pattern, name) and allowed.cover(ports) for pattern, allowed in self._names)
            for name, ports in asked._names
        )
        return names and all(
            any(
                _is_within(network, known) and _is_explicit(known) >= _is_explicit(network) and allowed.cover(ports)
                for known, allowed in self._networks
            )
            for network, ports in asked._networks
        )

    def means(self, host: Host) -> bool:
        """True if a rule is about this very name, or means this address, on whatever port."""
        if isinstance(host, str):
            return any(pattern == host for pattern, _ in self._names)
        return any(host in network and _is_explicit(network) for network, _ in self._networks)

    def guards(self, address: Address) -> bool:
        """True if only a CIDR that means this address opens it."""
        return any(address in network for network in GUARDED) or self._is_own(address)

    def _lists(self, address: Address, port: int) -> bool:
        found = [network for network, ports in self._networks if address in network and ports.allow(port)]
        return any(map(_is_explicit, found)) or (bool(found) and not self.guards(address))


def _is_explicit(network: Network) -> bool:
    """True if nobody can have written it without meaning guarded addresses."""
    return network.num_addresses == 1 or any(_is_within(network, guarded) for guarded in GUARDED)


def _is_within(network: Network, other: Network) -> bool:
    return network.version == other.version and network[0] in other and network[-1] in other


def _matches(pattern: str, name: str) -> bool:
    return pattern == "*" or (name.endswith(pattern[1:]) if pattern.startswith("*.") else name == pattern)


def _parse_network(text: str) -> Network:
    try:
        network = ip_network(text)
    except ValueError as error:
        raise InvalidArgumentError(f"{text!r} is not a network: {error}") from error
    if isinstance(network, IPv6Network) and network.network_address.ipv4_mapped and network.prefixlen >= 96:
        raise InvalidArgumentError(f"{text!r}: write it as IPv4")
    return network
