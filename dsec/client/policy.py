"""Network rules as people write them: `HOST[:PORT,...]`, `*.HOST[:...]`, `ADDRESS/BITS[:...]`, `[V6/BITS]:PORT`."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable

from dsec.errors import InvalidArgumentError
from dsec.types import NetworkPolicy, NetworkRule


def parse_policy(rules: NetworkPolicy | Iterable[str]) -> NetworkPolicy:
    """An allowlist of such rules.  InvalidArgumentError."""
    if isinstance(rules, NetworkPolicy):
        return rules
    if isinstance(rules, str):
        raise InvalidArgumentError(f"the network is a list of rules: give [{rules!r}]")
    return NetworkPolicy(rules=tuple(map(_parse_rule, rules)))


def _parse_rule(text: str) -> NetworkRule:
    where, separator, ports = text, "", ""
    if text.startswith("["):
        where, _, after = text[1:].partition("]")
        separator, ports = after[:1], after[1:]
    elif text.count(":") == 1:
        where, separator, ports = text.partition(":")
    try:
        numbers = tuple(int(port) for port in ports.split(",")) if separator else ()
    except ValueError:
        numbers = (0,)
    if not where or any(not 0 < number < 1 << 16 for number in numbers) or separator not in ("", ":"):
        raise InvalidArgumentError(
            f"{text!r} is no network rule: say for example api.example.com:443 or 10.0.0.0/8:80,443"
        )
    try:
        return NetworkRule(cidr=str(ipaddress.ip_network(where)), ports=numbers)
    except ValueError:
        return NetworkRule(host=where, ports=numbers)
