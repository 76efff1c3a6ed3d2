"""Checking commands and limits before anything runs, and laying a command out for the guest.

Everything the kernel would refuse for its size is refused here with a name and a number instead.
"""

from __future__ import annotations

import math
import os
import re
import secrets
from collections.abc import Mapping

import msgspec

from dsec.edge.config import SANDBOX_LAYERS_COUNT_MAX
from dsec.edge.native_wire import encode_exec_body
from dsec.edge.network.rules import Allowlist
from dsec.errors import InvalidArgumentError
from dsec.images import ImageConfig
from dsec.types import (
    ARG_BYTES,
    ARGS_BYTES_MAX,
    PATH,
    STDIN_BYTES_MAX,
    Command,
    Defaults,
    SandboxId,
    SandboxSpec,
    TtySize,
)

ARG_BYTES_MAX = 131_071  # MAX_ARG_STRLEN less its zero byte
TIMEOUT_S_MAX = 7 * 86_400.0
OUTPUT_BYTES_MAX_MAX = 64 << 20
MEMORY_BYTES_MIN = 16 << 20
DISK_BYTES_MIN = 1 << 20
TTY_SIDE_MAX = 0xFFFF
CPU_WEIGHT_MAX = 10_000
CONFIG_BYTES_MAX = 256 << 10
_SANDBOX_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_HOSTNAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")


def _encode(what: str, text: str) -> bytes:
    try:
        data = os.fsencode(text)
    except UnicodeEncodeError as error:
        raise InvalidArgumentError(f"{what} cannot be encoded: {error.reason}") from error
    if b"\0" in data:
        raise InvalidArgumentError(f"{what} contains a zero byte")
    if len(data) > ARG_BYTES_MAX:
        raise InvalidArgumentError(
            f"{what} has {len(data)} bytes, more than the kernel's {ARG_BYTES_MAX} for one string: send it by stdin"
        )
    return data


def completed(command: Command, defaults: Defaults, network: Mapping[str, str]) -> Command:
    """The command with what it leaves out, and the variables of its network; logs have the one that was asked for."""
    user = command.user or defaults.user
    env = {"PATH": PATH, "LANG": "C.UTF-8", "HOME": _home_of(user), **network, **defaults.env, **command.env}
    return msgspec.structs.replace(command, cwd=command.cwd or defaults.cwd, env=env, user=user)


def _home_of(user: str) -> str:
    name = user.partition(":")[0]
    if name in ("", "root", "0"):
        return "/root"
    return "/" if name.isdigit() else f"/home/{name}"


def encode_command(command: Command) -> bytes:
    """The body of EXEC.  InvalidArgumentError names what is wrong with the command."""
    if not command.argv:
        raise InvalidArgumentError("argv is empty")
    if not (math.isfinite(command.timeout_s) and 0 < command.timeout_s <= TIMEOUT_S_MAX):
        raise InvalidArgumentError(f"timeout_s {command.timeout_s} is not in (0, {TIMEOUT_S_MAX}]")
    if not 0 <= command.output_bytes_max <= OUTPUT_BYTES_MAX_MAX:
        raise InvalidArgumentError(f"output_bytes_max {command.output_bytes_max} is not in [0, {OUTPUT_BYTES_MAX_MAX}]")
    if len(command.stdin) > STDIN_BYTES_MAX:
        raise InvalidArgumentError(f"stdin has {len(command.stdin)} bytes, more than {STDIN_BYTES_MAX}")
    where = command.cwd or "/"
    if not where.startswith("/"):
        raise InvalidArgumentError(f"cwd {where!r} is not an absolute path")
    for name in command.env:
        if not name or "=" in name:
            raise InvalidArgumentError(f"{name!r} cannot be the name of an environment variable")
    argv = [_encode(f"argv[{index}]", text) for index, text in enumerate(command.argv)]
    env = [_encode(f"environment variable {name}", f"{name}={value}") for name, value in command.env.items()]
    total = sum(len(data) + ARG_BYTES for data in argv + env)
    if total > ARGS_BYTES_MAX:
        raise InvalidArgumentError(f"argv and env need {total} bytes, more than {ARGS_BYTES_MAX}")
    size = command.tty or TtySize()
    check_tty_size(size.rows, size.columns)
    cwd, user = _encode("cwd", where), _encode("user", command.user)
    return encode_exec_body(math.ceil(command.timeout_s * 1000), (size.rows, size.columns), cwd, user, argv, env)


def check_tty_size(rows: int, columns: int) -> None:
    """InvalidArgumentError if no terminal can have this size."""
    if not (0 < rows <= TTY_SIDE_MAX and 0 < columns <= TTY_SIDE_MAX):
        raise InvalidArgumentError(f"a terminal of {rows} x {columns} is not within 1..{TTY_SIDE_MAX} each way")


def name_sandbox(sandbox_id: SandboxId | None) -> SandboxId:
    """The caller's id, or a fresh one.  InvalidArgumentError for what cannot be one."""
    name = SandboxId(f"sb-{secrets.token_hex(8)}") if sandbox_id is None else sandbox_id
    if not _SANDBOX_ID.fullmatch(name):
        raise InvalidArgumentError(f"{name[:200]!r} cannot be the id of a sandbox")
    return name


def check_spec(spec: SandboxSpec) -> None:
    """InvalidArgumentError if no sandbox can have these limits."""
    if spec.memory_bytes < MEMORY_BYTES_MIN:
        raise InvalidArgumentError(f"memory_bytes {spec.memory_bytes} is below {MEMORY_BYTES_MIN}")
    if not DISK_BYTES_MIN <= spec.disk_bytes < spec.memory_bytes:
        raise InvalidArgumentError(
            f"disk_bytes {spec.disk_bytes} is not in [{DISK_BYTES_MIN}, memory_bytes {spec.memory_bytes}): "
            "the disk is held in the sandbox's memory, and a full disk must not be an OOM"
        )
    if spec.pids_count_max < 1:
        raise InvalidArgumentError(f"pids_count_max {spec.pids_count_max} is below 1")
    if not (math.isfinite(spec.cpu_cores) and 0.01 <= spec.cpu_cores <= 1024):
        raise InvalidArgumentError(f"cpu_cores {spec.cpu_cores} is not in [0.01, 1024]")
    if not 1 <= spec.cpu_weight <= CPU_WEIGHT_MAX:
        raise InvalidArgumentError(f"cpu_weight {spec.cpu_weight} is not in [1, {CPU_WEIGHT_MAX}]")
    if not _HOSTNAME.fullmatch(spec.hostname):
        raise InvalidArgumentError(f"hostname {spec.hostname!r} is not a lower case host name")
    if not spec.layers and not spec.base:
        raise InvalidArgumentError("with neither a base nor a layer there would be nothing to run")
    if len(spec.layers) > SANDBOX_LAYERS_COUNT_MAX or len(set(spec.layers)) != len(spec.layers):
        raise InvalidArgumentError(f"{len(spec.layers)} layers: at most {SANDBOX_LAYERS_COUNT_MAX}, and each once")
    Allowlist(spec.network)
    _check_defaults(spec.defaults)


def check_config(config: ImageConfig) -> None:
    """InvalidArgumentError if no sandbox can run its commands as this image says."""
    size = len(msgspec.msgpack.encode(config))
    if size > CONFIG_BYTES_MAX:
        raise InvalidArgumentError(
            f"what the image says of its commands has {size} bytes, more than {CONFIG_BYTES_MAX}"
        )
    _check_defaults(config.defaults)


def _check_defaults(defaults: Defaults) -> None:
    if defaults == Defaults():
        return
    try:
        encode_command(completed(Command(argv=("/",)), defaults, {}))
    except InvalidArgumentError as error:
        raise InvalidArgumentError(f"how commands of this sandbox or image run: {error}") from error
