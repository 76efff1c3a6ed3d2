"""What goes over the wire, and what people write: messages, errors, addresses, network rules, text for a terminal."""

from __future__ import annotations

import grpc
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsec import messages
from dsec.address import parse_address
from dsec.client.policy import parse_policy
from dsec.client.sandbox import CreateOptions, make_heir_request, make_request
from dsec.errors import DsecError, InvalidArgumentError, UnreachableError
from dsec.terminal import render_columns, visible_line
from dsec.types import (
    Command,
    ExecResult,
    LayerId,
    NetworkPolicy,
    NetworkRule,
    Output,
    SandboxId,
    SandboxSpec,
    TtySize,
)
from dsec.views import CommandView, CreateRequest, HostView, SandboxView
from dsec.wire import DETAILS_BYTES_MAX, error_of, status_of

LEAVES = sorted(
    (leaf for leaf in DsecError.__subclasses__() if leaf.__module__ == DsecError.__module__), key=lambda leaf: leaf.code
)
"""Those that a server answers with: the others are made by the client itself."""
NAMES = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=20)
KERNEL_TEXTS = st.binary(max_size=20).map(lambda data: data.replace(b"\0", b"").decode(errors="surrogateescape"))
SECONDS = st.floats(0.001, 1e6)
SIZES = st.integers(0, 1 << 40)
POLICIES = st.builds(
    NetworkPolicy,
    rules=st.lists(
        st.builds(NetworkRule, host=NAMES, cidr=NAMES, ports=st.lists(st.integers(0, 65535)).map(tuple)), max_size=3
    ).map(tuple),
)
SPECS = st.builds(
    SandboxSpec,
    base=st.sampled_from(["host", ""]),
    layers=st.lists(NAMES.map(LayerId), max_size=3).map(tuple),
    network=POLICIES,
    cpu_weight=st.integers(1, 10_000),
    memory_bytes=SIZES,
    disk_bytes=SIZES,
    pids_count_max=st.integers(0, 1 << 20),
    cpu_cores=SECONDS,
    hostname=NAMES,
)
COMMANDS = st.builds(
    Command,
    argv=st.lists(KERNEL_TEXTS, max_size=4).map(tuple),
    cwd=KERNEL_TEXTS.map(lambda text: "/" + text),
    env=st.dictionaries(NAMES, KERNEL_TEXTS, max_size=3),
    stdin=st.binary(max_size=20),
    timeout_s=SECONDS,
    output_bytes_max=SIZES,
    merge_stderr=st.booleans(),
    kill_others=st.booleans(),
    user=NAMES,
    keep_stdin_open=st.booleans(),
    tty=st.none() | st.builds(TtySize, st.integers(1, 1000), st.integers(1, 1000)),
)
OUTPUTS = st.builds(Output, st.binary(max_size=20), st.binary(max_size=20), SIZES)
RESULTS = st.builds(
    ExecResult,
    exit_code=st.integers(0, 255),
    stdout=OUTPUTS,
    stderr=OUTPUTS,
    timed_out=st.booleans(),
    oom_killed=st.booleans(),
    duration_s=SECONDS,
)
LABELS = st.dictionaries(NAMES, NAMES, max_size=3)


@given(
    st.builds(
        CreateRequest,
        spec=SPECS,
        request_id=NAMES,
        labels=LABELS,
        owner=NAMES,
        epoch=SIZES,
        idle_timeout_s=st.none() | SECONDS,
        lifetime_s=st.none() | SECONDS,
    )
)
def test_a_request_arrives_as_it_was_sent(request: CreateRequest) -> None:
    assert messages.create_of(messages.create_message(request)) == request


@given(
    st.builds(
        SandboxView,
        id=NAMES.map(SandboxId),
        state=NAMES,
        spec=SPECS,
        labels=LABELS,
        owner=NAMES,
        epoch=SIZES,
        created_at_s=SECONDS,
        expires_at_s=st.none() | SECONDS,
        commands_count=st.integers(0, 1000),
        reason=NAMES,
    )
)
def test_a_sandbox_arrives_as_it_was_sent(view: SandboxView) -> None:
    assert messages.sandbox_of(messages.sandbox_message(view)) == view


@given(
    st.builds(
        CommandView,
        key=NAMES,
        number=st.integers(0, 1000),
        command=COMMANDS,
        state=st.sampled_from(["running", "finished", "unknown"]),
        result=st.none() | RESULTS,
    )
)
def test_a_command_and_its_result_arrive_as_they_were_sent(view: CommandView) -> None:
    assert messages.info_of(messages.info_message(view)) == view


@given(st.builds(HostView, used=st.dictionaries(NAMES, SECONDS), total=st.dictionaries(NAMES, SECONDS)))
def test_a_host_arrives_as_it_was_sent(view: HostView) -> None:
    assert messages.host_of(messages.host_message(view)) == view


@pytest.mark.parametrize(
    "command",
    [
        Command(argv=("\ud800",)),
        Command(argv=("a",), env={"\udcff": "a"}),
        Command(argv=("a",), user="\udcff"),
        Command(argv=("a",), output_bytes_max=-1),
        Command(argv=("a",), tty=TtySize(-1, 1 << 40)),
    ],
)
def test_what_no_message_can_hold_is_the_callers_error(command: Command) -> None:
    with pytest.raises(InvalidArgumentError):
        messages.command_message(command)


@pytest.mark.parametrize(
    "spec", [SandboxSpec(memory_bytes=-1), SandboxSpec(network=NetworkPolicy(rules=(NetworkRule(ports=(-1,)),)))]
)
def test_a_spec_that_no_message_can_hold_is_the_callers_error(spec: SandboxSpec) -> None:
    with pytest.raises(InvalidArgumentError):
        messages.spec_message(spec)


@pytest.mark.parametrize("leaf", LEAVES)
def test_an_error_arrives_as_the_class_and_the_sentence_that_it_was(leaf: type[DsecError]) -> None:
    again = error_of(*status_of(leaf("what: and why")))
    assert (type(again), str(again)) == (leaf, "what: and why")


@given(st.text())
def test_the_details_of_any_error_fit_a_header(text: str) -> None:
    status, details = status_of(InvalidArgumentError(text * 50))
    assert len(details.encode()) <= DETAILS_BYTES_MAX + 5
    assert isinstance(error_of(status, details), InvalidArgumentError)


def test_a_long_error_keeps_its_beginning_and_its_end() -> None:
    _, details = status_of(InvalidArgumentError("cwd " + "x" * 100_000 + " is no path"))
    assert details.startswith("INVALID_ARGUMENT: cwd x")
    assert details.endswith("x is no path")


def test_an_error_without_a_code_of_ours_is_the_connections_or_a_bug() -> None:
    assert isinstance(error_of(grpc.StatusCode.UNAVAILABLE, "Socket closed"), UnreachableError)
    assert type(error_of(grpc.StatusCode.INTERNAL, "internal error")) is DsecError


@pytest.mark.parametrize(
    ("url", "target"),
    [
        ("unix:/run/a b.sock", "unix:/run/a b.sock"),
        ("unix:///run/x", "unix:/run/x"),
        ("tcp:localhost:80", "localhost:80"),
        ("tcp://10.0.0.1:80", "10.0.0.1:80"),
        ("tls:[::1]:443", "[::1]:443"),
    ],
)
def test_an_address_is_what_grpc_calls_it(url: str, target: str) -> None:
    assert parse_address(url).grpc_target == target


@pytest.mark.parametrize("url", ["", "unix", "tcp:", "tcp:a", "tcp:a:b", "tcp:a:70000", "tcp:a/b:1", "ftp:a:1", "::1"])
def test_what_is_no_address_is_refused(url: str) -> None:
    with pytest.raises(InvalidArgumentError):
        parse_address(url)


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("api.example.com", NetworkRule(host="api.example.com")),
        ("api.example.com:443", NetworkRule(host="api.example.com", ports=(443,))),
        ("*.example.org:80,443", NetworkRule(host="*.example.org", ports=(80, 443))),
        ("10.0.0.0/8", NetworkRule(cidr="10.0.0.0/8")),
        ("10.1.2.3:22", NetworkRule(cidr="10.1.2.3/32", ports=(22,))),
        ("fd00::/8", NetworkRule(cidr="fd00::/8")),
        ("[fd00::/8]:22", NetworkRule(cidr="fd00::/8", ports=(22,))),
    ],
)
def test_a_network_rule_is_read_as_people_write_it(text: str, rule: NetworkRule) -> None:
    assert parse_policy([text]).rules == (rule,)


@pytest.mark.parametrize("text", ["", ":80", "a:", "a:b", "a:0", "a:65536", "[fd00::/8]80", "a:80,"])
def test_what_is_no_network_rule_is_refused(text: str) -> None:
    with pytest.raises(InvalidArgumentError, match="no network rule"):
        parse_policy([text])


def test_one_rule_is_not_taken_for_a_list_of_letters() -> None:
    with pytest.raises(InvalidArgumentError, match="list of rules"):
        parse_policy("api.example.com")


def test_options_of_create_become_the_spec_that_they_mean() -> None:
    layer = "sha256:" + "0" * 64
    request = make_request(CreateOptions(layers=["sha256:top"], memory_bytes=1 << 30, cpu=2, timeout_s=60), layer)
    assert request.spec == SandboxSpec(
        base="", layers=(LayerId("sha256:top"), LayerId(layer)), memory_bytes=1 << 30, disk_bytes=3 << 28, cpu_cores=2
    )
    assert (request.lifetime_s, request.idle_timeout_s) == (60, 3600)
    for options in ({"memory": 1 << 30}, {"timeout": 5.0}):
        with pytest.raises(TypeError, match="there is no option"):
            make_request(options)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="'layers'"):
        make_heir_request({"layers": ["sha256:top"]})  # type: ignore[typeddict-unknown-key]
    assert make_request(CreateOptions()).spec == SandboxSpec()
    assert make_request(CreateOptions(idle_timeout_s=None)).idle_timeout_s is None


def test_a_table_sends_no_control_to_the_terminal() -> None:
    table = render_columns(("A", "B"), [("\x1b[2J", "x\ny"), ("long text", "\u202e")])
    assert table == "A          B\n\\x1b[2J    x\\ny\nlong text  \\x202e"
    assert visible_line("a\tb") == "a\\tb"
