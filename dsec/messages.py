"""Values and their messages: what the gRPC server and its clients agree on, both ways.

`x_message(value)` gives the protobuf message, `x_of(message)` the value; nothing is decided here, but what a hostile
message may hold millions of is counted before it is made: meanwhile everybody waits.
Where the kernel takes bytes (argv, env, cwd) the message has bytes and the value a str as `os.fsdecode` gives it.

See: proto/dsec/pb/v1/edge.proto, dsec/types.py, dsec/views.py.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import msgspec

from dsec.errors import InvalidArgumentError
from dsec.images import Image, ImageConfig, Layer
from dsec.pb.v1 import edge_pb2 as pb
from dsec.types import (
    ARG_BYTES,
    ARGS_BYTES_MAX,
    RULES_COUNT_MAX,
    Command,
    Defaults,
    ExecResult,
    LayerId,
    NetworkPolicy,
    NetworkRule,
    Output,
    SandboxId,
    SandboxSpec,
    Stream,
    TtySize,
)
from dsec.views import CommandView, CreateRequest, HostView, ImportOptions, SandboxView

STREAMS: dict[int, Stream] = {pb.STREAM_UNSPECIFIED: "stdout", pb.STDOUT: "stdout", pb.STDERR: "stderr"}
STREAM_NUMBERS: dict[Stream, pb.Stream] = {"stdout": pb.STDOUT, "stderr": pb.STDERR}
_SPEC_SCALARS = ("base", "cpu_weight", "memory_bytes", "disk_bytes", "pids_count_max", "cpu_cores", "hostname")


def _set_fields(message: Any, *names: str) -> dict[str, Any]:
    """The fields that the sender set, by name; the rest keeps the value's own default."""
    return {name: getattr(message, name) for name in names if message.HasField(name)}


def _check_count(what: str, count: int, count_max: int) -> None:
    if count > count_max:
        raise InvalidArgumentError(f"{count} {what}, more than {count_max}")


def _kernel_bytes(what: str, text: str) -> bytes:
    try:
        return os.fsencode(text)
    except UnicodeEncodeError as error:
        raise InvalidArgumentError(f"{what} cannot be encoded: {error.reason}") from error


def policy_message(policy: NetworkPolicy) -> pb.NetworkPolicy:
    """An allowlist."""
    try:
        rules = [pb.NetworkRule(host=rule.host, cidr=rule.cidr, ports=rule.ports) for rule in policy.rules]
    except ValueError as error:
        raise InvalidArgumentError(f"a port of the network policy: {error}") from error
    return pb.NetworkPolicy(rules=rules)


def policy_of(message: pb.NetworkPolicy) -> NetworkPolicy:
    """An allowlist.  InvalidArgumentError for more rules than one may have, before any is made."""
    _check_count("network rules", len(message.rules), RULES_COUNT_MAX)
    rules = (NetworkRule(host=rule.host, cidr=rule.cidr, ports=tuple(rule.ports)) for rule in message.rules)
    return NetworkPolicy(rules=tuple(rules))


def defaults_message(defaults: Defaults) -> pb.Defaults:
    """What commands get that they do not say."""
    return pb.Defaults(env=_env_message(defaults.env), cwd=_kernel_bytes("cwd", defaults.cwd), user=defaults.user)


def defaults_of(message: pb.Defaults) -> Defaults:
    """What commands get that they do not say."""
    return Defaults(env=_env_of(message.env), cwd=os.fsdecode(message.cwd), user=message.user)


def _env_message(env: Mapping[str, str]) -> dict[str, bytes]:
    return {name: _kernel_bytes(f"environment variable {name!r}", value) for name, value in env.items()}


def _env_of(env: Mapping[str, bytes]) -> dict[str, str]:
    return {name: os.fsdecode(value) for name, value in env.items()}


def spec_message(spec: SandboxSpec) -> pb.SandboxSpec:
    """What a sandbox is made of.  InvalidArgumentError for a number or a text that no message can hold."""
    scalars: dict[str, Any] = {name: getattr(spec, name) for name in _SPEC_SCALARS}
    try:
        defaults = defaults_message(spec.defaults)
        return pb.SandboxSpec(layers=spec.layers, network=policy_message(spec.network), defaults=defaults, **scalars)
    except (ValueError, TypeError) as error:
        raise InvalidArgumentError(f"a limit or a default of the sandbox: {error}") from error


def spec_of(message: pb.SandboxSpec) -> SandboxSpec:
    """What a sandbox is made of.  InvalidArgumentError for a base that no sandbox has."""
    if message.base not in ("", "host"):
        raise InvalidArgumentError(f"base {message.base!r} is neither 'host' nor empty")
    return SandboxSpec(
        layers=tuple(map(LayerId, message.layers)),
        network=policy_of(message.network),
        defaults=defaults_of(message.defaults),
        **_set_fields(message, *_SPEC_SCALARS),
    )


def create_message(request: CreateRequest) -> pb.CreateRequest:
    """A request for a sandbox.  InvalidArgumentError for what no message can hold."""
    spec = spec_message(request.spec)
    try:
        return pb.CreateRequest(
            spec=spec,
            request_id=request.request_id,
            labels=request.labels,
            owner=request.owner,
            epoch=request.epoch,
            idle_timeout_s=request.idle_timeout_s,
            lifetime_s=request.lifetime_s,
        )
    except ValueError as error:
        raise InvalidArgumentError(f"a text or a number of the request: {error}") from error


def create_of(message: pb.CreateRequest) -> CreateRequest:
    """A request for a sandbox."""
    return CreateRequest(
        spec=spec_of(message.spec),
        request_id=message.request_id,
        labels=dict(message.labels),
        owner=message.owner,
        epoch=message.epoch,
        **_set_fields(message, "idle_timeout_s", "lifetime_s"),
    )


def sandbox_message(view: SandboxView) -> pb.Sandbox:
    """A sandbox as the Edge shows it."""
    return pb.Sandbox(
        id=view.id,
        state=view.state,
        spec=spec_message(view.spec),
        labels=view.labels,
        owner=view.owner,
        epoch=view.epoch,
        created_at_s=view.created_at_s,
        expires_at_s=view.expires_at_s,
        commands_count=view.commands_count,
        reason=view.reason,
    )


def sandbox_of(message: pb.Sandbox) -> SandboxView:
    """A sandbox as the Edge shows it."""
    return SandboxView(
        id=SandboxId(message.id),
        state=message.state,
        spec=spec_of(message.spec),
        labels=dict(message.labels),
        owner=message.owner,
        epoch=message.epoch,
        created_at_s=message.created_at_s,
        commands_count=message.commands_count,
        reason=message.reason,
        **_set_fields(message, "expires_at_s"),
    )


def command_message(command: Command) -> pb.Command:
    """A command.  InvalidArgumentError if a text of it is nothing that a kernel could get."""
    try:
        tty = None if command.tty is None else pb.TtySize(rows=command.tty.rows, columns=command.tty.columns)
        return pb.Command(
            argv=[_kernel_bytes(f"argv[{index}]", text) for index, text in enumerate(command.argv)],
            cwd=_kernel_bytes("cwd", command.cwd),
            env=_env_message(command.env),
            stdin=command.stdin,
            timeout_s=command.timeout_s,
            output_bytes_max=command.output_bytes_max,
            merge_stderr=command.merge_stderr,
            kill_others=command.kill_others,
            user=command.user,
            keep_stdin_open=command.keep_stdin_open,
            tty=tty,
        )
    except ValueError as error:
        raise InvalidArgumentError(
            f"user, a variable's name, output_bytes_max or tty cannot be sent: {error}"
        ) from error


def command_of(message: pb.Command) -> Command:
    """A command.  InvalidArgumentError for more strings than any can have, before any is made."""
    _check_count("arguments and variables", len(message.argv) + len(message.env), ARGS_BYTES_MAX // ARG_BYTES)
    tty = TtySize(rows=message.tty.rows, columns=message.tty.columns) if message.HasField("tty") else None
    return Command(
        argv=tuple(map(os.fsdecode, message.argv)),
        cwd=os.fsdecode(message.cwd),
        env=_env_of(message.env),
        stdin=message.stdin,
        merge_stderr=message.merge_stderr,
        kill_others=message.kill_others,
        user=message.user,
        keep_stdin_open=message.keep_stdin_open,
        tty=tty,
        **_set_fields(message, "timeout_s", "output_bytes_max"),
    )


def result_message(result: ExecResult) -> pb.ExecResult:
    """What came of a command."""
    return pb.ExecResult(
        exit_code=result.exit_code,
        stdout=_output_message(result.stdout),
        stderr=_output_message(result.stderr),
        timed_out=result.timed_out,
        oom_killed=result.oom_killed,
        duration_s=result.duration_s,
    )


def result_of(message: pb.ExecResult) -> ExecResult:
    """What came of a command."""
    return ExecResult(
        exit_code=message.exit_code,
        stdout=_output_of(message.stdout),
        stderr=_output_of(message.stderr),
        timed_out=message.timed_out,
        oom_killed=message.oom_killed,
        duration_s=message.duration_s,
    )


def _output_message(output: Output) -> pb.Output:
    return pb.Output(head=output.head, tail=output.tail, dropped_bytes=output.dropped_bytes)


def _output_of(message: pb.Output) -> Output:
    return Output(head=message.head, tail=message.tail, dropped_bytes=message.dropped_bytes)


def info_message(view: CommandView) -> pb.CommandInfo:
    """A command and its state."""
    return pb.CommandInfo(
        key=view.key,
        number=view.number,
        command=command_message(view.command),
        state=view.state,
        result=None if view.result is None else result_message(view.result),
    )


def info_of(message: pb.CommandInfo) -> CommandView:
    """A command and its state."""
    return CommandView(
        key=message.key,
        number=message.number,
        command=command_of(message.command),
        state=message.state,  # type: ignore[arg-type]  # the server's own words
        result=result_of(message.result) if message.HasField("result") else None,
    )


def layer_message(layer: Layer) -> pb.LayerFacts:
    """A layer as it is shown."""
    return pb.LayerFacts(**msgspec.structs.asdict(layer))


def layer_of(message: pb.LayerFacts) -> Layer:
    """A layer as it is shown."""
    fields = {name: getattr(message, name) for name in Layer.__struct_fields__}
    return Layer(**fields | {"parents": tuple(message.parents)})


def image_message(image: Image) -> pb.Image:
    """A name for layers."""
    return pb.Image(
        name=image.name,
        layers=image.layers,
        base=image.base,
        defaults=defaults_message(image.config.defaults),
        entrypoint=image.config.entrypoint,
        command=image.config.command,
        created_at_s=image.created_at_s,
        source=image.source,
    )


def image_of(message: pb.Image) -> Image:
    """A name for layers."""
    defaults = defaults_of(message.defaults)
    config = ImageConfig(
        env=defaults.env,
        workdir=defaults.cwd or "/",
        user=defaults.user,
        entrypoint=tuple(message.entrypoint),
        command=tuple(message.command),
    )
    return Image(
        name=message.name,
        layers=tuple(map(LayerId, message.layers)),
        base="host" if message.base == "host" else "",
        config=config,
        created_at_s=message.created_at_s,
        source=message.source,
    )


def import_message(options: ImportOptions) -> pb.ImportOptions:
    """How an archive becomes an image.  InvalidArgumentError for what is no text."""
    try:
        return pb.ImportOptions(**msgspec.structs.asdict(options))
    except ValueError as error:
        raise InvalidArgumentError(f"the name of an image or of its archive cannot be sent: {error}") from error


def import_of(message: pb.ImportOptions) -> ImportOptions:
    """How an archive becomes an image."""
    return ImportOptions(**{name: getattr(message, name) for name in ImportOptions.__struct_fields__})


def host_message(view: HostView) -> pb.Host:
    """A host's bounds and what is used of them."""
    return pb.Host(used=view.used, total=view.total, sandboxes=view.sandboxes)


def host_of(message: pb.Host) -> HostView:
    """A host's bounds and what is used of them."""
    return HostView(used=dict(message.used), total=dict(message.total), sandboxes=dict(message.sandboxes))
