"""Where a sandbox may connect to: names, addresses, ports; and what an allowed name may not be turned into."""

from ipaddress import IPv4Address, IPv6Address, ip_address

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsec.edge.network.gateway import environment
from dsec.edge.network.rules import GUARDED, Allowlist, parse_host
from dsec.errors import InvalidArgumentError
from dsec.types import RULES_COUNT_MAX, NetworkPolicy, NetworkRule

PUBLIC = ip_address("1.1.1.1")


def allowlist(*rules: tuple[str, str] | tuple[str, str, tuple[int, ...]], own: tuple[str, ...] = ()) -> Allowlist:
    """From ("host" or "cidr", value, ports)."""
    made = [NetworkRule(**{rule[0]: rule[1]}, ports=rule[2] if len(rule) == 3 else ()) for rule in rules]
    return Allowlist(NetworkPolicy(rules=tuple(made)), lambda address: str(address) in own)


names = st.lists(st.from_regex(r"[a-z0-9]([a-z0-9-]{0,8}[a-z0-9])?", fullmatch=True), min_size=1, max_size=4).map(
    lambda labels: ".".join([*labels, "example"])
)
addresses = st.ip_addresses()
ports = st.integers(1, 65_535)
policies = st.lists(
    st.one_of(
        st.builds(NetworkRule, host=st.one_of(names, names.map("*.{}".format), st.just("*"))),
        st.builds(NetworkRule, cidr=addresses.map(str).map(parse_host).map(str)),
        st.sampled_from([NetworkRule(cidr=text) for text in ("0.0.0.0/0", "::/0", "10.0.0.0/8", "1.0.0.0/8")]),
    ),
    max_size=6,
).map(lambda rules: NetworkPolicy(rules=tuple(rules)))


@given(host=st.one_of(names, addresses), address=addresses, port=ports)
def test_nothing_is_allowed_without_a_rule(
    host: str | IPv4Address | IPv6Address, address: IPv4Address, port: int
) -> None:
    assert not allowlist().allows(host, address, port)


@given(policy=policies, name=names, address=st.sampled_from(GUARDED).flatmap(lambda net: st.ip_addresses(network=net)))
def test_a_guarded_address_is_never_opened_by_a_name_alone(
    policy: NetworkPolicy, name: str, address: IPv4Address | IPv6Address
) -> None:
    only_names = Allowlist(NetworkPolicy(rules=tuple(rule for rule in policy.rules if rule.host)))
    assert not only_names.allows(name, address, 443)


@given(policy=policies, more=policies, name=names, address=addresses, port=ports)
def test_more_rules_allow_no_less(
    policy: NetworkPolicy, more: NetworkPolicy, name: str, address: IPv4Address, port: int
) -> None:
    few, many = Allowlist(policy), Allowlist(NetworkPolicy(rules=policy.rules + more.rules))
    for host in (name, address):
        assert many.allows(host, address, port) or not few.allows(host, address, port)


@given(name=names)
def test_every_spelling_of_a_name_is_one(name: str) -> None:
    assert parse_host(name) == parse_host(name.upper()) == parse_host(name + ".") == name


@given(text=st.text(max_size=300))
def test_whatever_is_parsed_is_a_host_in_normal_form_or_refused(text: str) -> None:
    try:
        host = parse_host(text)
    except InvalidArgumentError:
        return
    assert parse_host(str(host)) == host


def test_a_wildcard_is_every_name_below_and_not_the_name_itself() -> None:
    allowed = allowlist(("host", "*.Example.com"))
    assert allowed.may_resolve("a.example.com", 443)
    assert allowed.may_resolve("a.b.example.com", 443)
    assert not allowed.may_resolve("example.com", 443)
    assert not allowed.may_resolve("badexample.com", 443)
    assert not allowed.may_resolve("example.com.evil.net", 443)


def test_names_are_compared_in_idna_form() -> None:
    allowed = allowlist(("host", "Bücher.example."))
    assert allowed.allows("xn--bcher-kva.example", PUBLIC, 80)


def test_ports_are_those_of_the_matching_rule() -> None:
    allowed = allowlist(("host", "a.example", (443,)), ("host", "*.example", (80, 8080)))
    assert [port for port in (80, 443, 8080, 22) if allowed.may_resolve("a.example", port)] == [80, 443, 8080]
    assert not allowlist(("host", "a.example")).may_resolve("a.example", 0)


def test_an_allowed_name_does_not_open_its_address_nor_an_address_its_name() -> None:
    by_name, by_address = allowlist(("host", "a.example")), allowlist(("cidr", "1.1.1.0/24"))
    assert by_name.allows("a.example", PUBLIC, 80)
    assert not by_name.allows(PUBLIC, PUBLIC, 80)
    assert not by_name.allows("b.example", PUBLIC, 80)
    assert by_address.allows(PUBLIC, PUBLIC, 80)
    assert not by_address.allows("a.example", PUBLIC, 80)
    assert not by_address.allows(ip_address("1.1.2.1"), ip_address("1.1.2.1"), 80)


@pytest.mark.parametrize(
    "text",
    ["127.0.0.1", "169.254.169.254", "10.1.2.3", "192.168.0.1", "172.31.0.1", "100.64.0.1", "0.0.0.0", "224.0.0.1",
     "255.255.255.255", "::", "::1", "fe80::1", "fd00::1", "ff02::1", "::ffff:127.0.0.1", "64:ff9b::a9fe:a9fe",
     "2002:7f00:1::", "2001:0:7f00:1::"],
)  # fmt: skip
def test_a_name_that_resolves_inwards_is_refused_and_so_is_the_whole_internet_rule(text: str) -> None:
    address = ip_address(text)
    everything = allowlist(("host", "*"), ("cidr", "0.0.0.0/0"), ("cidr", "::/0"))
    assert not everything.allows("a.example", address, 80)
    assert not everything.allows(address, address, 80)


def test_a_guarded_address_is_opened_by_a_cidr_that_means_it() -> None:
    for cidr in ("10.0.0.0/8", "10.1.0.0/16", "10.1.2.3/32", "10.1.2.3"):
        allowed = allowlist(("cidr", cidr, (5432,)), ("host", "db.example"))
        inside = ip_address("10.1.2.3")
        assert allowed.allows(inside, inside, 5432)
        assert allowed.allows("db.example", inside, 5432)
        assert not allowed.allows(inside, inside, 22)
        assert not allowed.allows("db.example", inside, 22)
        assert not allowed.allows("db.example", ip_address("192.168.0.1"), 5432)


def test_the_hosts_own_public_address_is_opened_only_by_itself() -> None:
    own = ip_address("1.1.1.1")
    assert not allowlist(("cidr", "1.1.1.0/24"), own=("1.1.1.1",)).allows(own, own, 80)
    assert not allowlist(("host", "*"), own=("1.1.1.1",)).allows("a.example", own, 80)
    assert allowlist(("cidr", "1.1.1.1/32"), own=("1.1.1.1",)).allows(own, own, 80)


def test_ipv4_inside_ipv6_is_ipv4() -> None:
    assert parse_host("::ffff:1.1.1.1") == PUBLIC
    assert allowlist(("cidr", "1.1.1.1/32")).allows(PUBLIC, ip_address("::ffff:1.1.1.1"), 80)
    assert not allowlist(("cidr", "::/0")).allows(PUBLIC, ip_address("::ffff:1.1.1.1"), 80)


@pytest.mark.parametrize(
    "text",
    ["127.1", "0x7f000001", "2130706433", "0177.0.0.1", "1.2.3", "a..b", "-a.example", "a-.example", "", ".", "a b",
     "a/b", "fe80::1%eth0", "[::1]", "a" * 64 + ".example", "a." * 127 + "example", "a\0.example", "*", "a.example:80",
     "é" * 300],
)  # fmt: skip
def test_what_is_neither_a_name_nor_an_address_is_refused(text: str) -> None:
    with pytest.raises(InvalidArgumentError):
        parse_host(text)


@pytest.mark.parametrize(
    "rule",
    [NetworkRule(), NetworkRule(host="a.example", cidr="1.1.1.1/32"), NetworkRule(host="1.1.1.1"),
     NetworkRule(host="*.1.1.1.1"), NetworkRule(host="*.*.example"), NetworkRule(host="a.*"), NetworkRule(host="*."),
     NetworkRule(cidr="1.1.1.1/24"), NetworkRule(cidr="1.1.1.1/33"), NetworkRule(cidr="::ffff:0:0/96"),
     NetworkRule(cidr="a.example"), NetworkRule(host="a.example", ports=(0,)),
     NetworkRule(host="a.example", ports=(65_536,)), NetworkRule(host="a.example", ports=tuple(range(1, 300)))],
)  # fmt: skip
def test_a_rule_that_says_nothing_clear_is_refused(rule: NetworkRule) -> None:
    with pytest.raises(InvalidArgumentError):
        Allowlist(NetworkPolicy(rules=(rule,)))


def test_the_number_of_rules_is_bounded() -> None:
    rule = NetworkRule(host="a.example")
    Allowlist(NetworkPolicy(rules=(rule,) * RULES_COUNT_MAX))
    with pytest.raises(InvalidArgumentError, match="network rules"):
        Allowlist(NetworkPolicy(rules=(rule,) * (RULES_COUNT_MAX + 1)))


@pytest.mark.parametrize(
    ("rules", "own"),
    [
        ([], None),
        ([("host", "*"), ("cidr", "0.0.0.0/0"), ("host", "api.example.com")], "localhost,127.0.0.1,::1"),
        ([("host", "localhost", (8765,))], "127.0.0.1,::1"),
        ([("cidr", "127.0.0.1/32", (8765,))], "localhost,::1"),
        ([("cidr", "127.0.0.0/8"), ("cidr", "::1/128"), ("host", "LOCALHOST")], ""),
    ],
)
def test_what_a_rule_says_of_the_hosts_loopback_is_asked_of_the_proxy(
    rules: list[tuple[str, str]], own: str | None
) -> None:
    made = tuple(NetworkRule(**{rule[0]: rule[1]}, ports=rule[2] if len(rule) == 3 else ()) for rule in rules)
    assert environment(NetworkPolicy(rules=made)).get("no_proxy") == own


@given(ceiling=policies, asked=policies, name=names, address=addresses, port=ports)
def test_what_is_covered_allows_no_more_than_what_covers_it(
    ceiling: NetworkPolicy, asked: NetworkPolicy, name: str, address: IPv4Address | IPv6Address, port: int
) -> None:
    allowed = Allowlist(ceiling, lambda own: own == address)
    covered = Allowlist(NetworkPolicy(rules=tuple(filter(allowed.covers, asked.rules))), lambda own: own == address)
    for host in (name, address):
        assert allowed.allows(host, address, port) or not covered.allows(host, address, port)


@pytest.mark.parametrize(
    ("ceiling", "asked", "is_covered"),
    [
        (("host", "*"), ("host", "*.a.example", (443,)), True),
        (("host", "*.example"), ("host", "*.a.example"), True),
        (("host", "*.a.example"), ("host", "*.example"), False),
        (("host", "*.example"), ("host", "example"), False),
        (("host", "*.example"), ("host", "*"), False),
        (("host", "*"), ("cidr", "1.1.1.0/24"), False),
        (("cidr", "0.0.0.0/0"), ("cidr", "1.1.1.0/24"), True),
        (("cidr", "0.0.0.0/0"), ("cidr", "10.0.0.0/8"), False),
        (("cidr", "0.0.0.0/0"), ("cidr", "1.1.1.1/32"), False),
        (("cidr", "10.0.0.0/8"), ("cidr", "10.1.0.0/16", (80,)), True),
        (("cidr", "10.0.0.0/8"), ("cidr", "0.0.0.0/0"), False),
        (("host", "a.example", (80, 443)), ("host", "A.example.", (443,)), True),
        (("host", "a.example", (80, 443)), ("host", "a.example"), False),
        (("host", "a.example", (80, 443)), ("host", "a.example", (22,)), False),
    ],
)
def test_a_list_covers_rules_that_allow_no_more(
    ceiling: tuple[str, str], asked: tuple[str, str, tuple[int, ...]], is_covered: bool
) -> None:
    rule = NetworkRule(**{asked[0]: asked[1]}, ports=asked[2] if len(asked) == 3 else ())
    assert allowlist(ceiling).covers(rule) is is_covered
