"""`dsec engine`: engines that run as processes of their own."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import click
import msgspec

from dsec.listen import TOKEN_BYTES_MIN, read_token
from dsec.terminal import visible
from rollout.engines.vllm.launch import (
    PRESETS,
    VLLM_VERSION,
    Device,
    Launch,
    Offload,
    Preset,
    folder_preset,
    make_launch,
    tiny_preset,
)
from rollout.engines.vllm.tiny import CONTEXT_TOKENS_MAX, write_tiny_model
from rollout.errors import RequestError

TINY = "tiny"
_LOOPBACK = {"127.0.0.1", "::1", "localhost"}
_EXAMPLE = (
    "\b\nExamples:\n  dsec engine serve-vllm v4-flash\n"
    "  dsec engine serve-vllm v4-pro --host 10.0.0.5 --api-key-file /etc/dsec/engine --offload /nvme/kv\n"
    "  dsec engine serve-vllm tiny --run --python .venv-vllm/bin/python --port 8000\n"
    "  dsec serve --engine http://127.0.0.1:8000"
)


@click.group(short_help="Engines in processes of their own.", epilog=_EXAMPLE)
def engine() -> None:
    """Engines that are no part of the service's process: what starts them."""


class _PassingOn(click.Command):
    """A command of which only what stands after `--` is another program's: `more`."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """As every command's, up to the `--`."""
        own_count = args.index("--") if "--" in args else len(args)
        rest = super().parse_args(ctx, args[:own_count])
        ctx.params["more"] = tuple(args[own_count + 1 :])
        return rest

    def collect_usage_pieces(self, ctx: click.Context) -> list[str]:
        """With what may be passed on."""
        return [*super().collect_usage_pieces(ctx), "[-- FLAG ...]"]


@engine.command(cls=_PassingOn, short_help="Print or run the command that serves a model with vLLM.", epilog=_EXAMPLE)
@click.argument("model")
@click.option("--run", "runs", is_flag=True, help="Become that process, rather than print the command.")
@click.option(
    "--json", "as_json", is_flag=True, help="Print one JSON object: environment, arguments, service, api_key_file."
)
@click.option("--python", default="python3", show_default=True, help="The Python that has vLLM installed.")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on; see the warning above.")
@click.option("--port", type=click.IntRange(1, 65535), default=8000, show_default=True, help="Port to listen on.")
@click.option("--device", type=click.Choice(["cuda", "cpu"]), help="What computes.  [default: cuda; cpu for tiny]")
@click.option(
    "--gpus", type=click.IntRange(1, 64), help="Data-parallel ranks.  CUDA only.  [default: 4 of v4-flash, 8 of v4-pro]"
)
@click.option("--context-tokens", type=click.IntRange(16), help="Longest context.  [default: the model's]")
@click.option(
    "--memory-gib",
    type=click.IntRange(1, 1 << 14),
    help="Host memory for KV: all KV with --device cpu, else what --offload passes through.  [default: 10; 1 of tiny]",
)
@click.option(
    "--offload",
    type=click.Path(path_type=Path, file_okay=False),
    help="Keep KV below this directory too, so that it outlives the process.  CUDA only.  Nothing bounds it.",
)
@click.option(
    "--weight-version",
    default="0",
    show_default=True,
    help="Name of the weights: their KV has this directory below --offload, and no other weights may use it.",
)
@click.option(
    "--routes", is_flag=True, help="Tell which experts each token went through, to jobs that ask.  CUDA only."
)
@click.option("--masks", is_flag=True, help="Tell what top-k and top-p kept, to jobs that ask.  CUDA only.")
@click.option(
    "--api-key-file",
    type=click.Path(path_type=Path, dir_okay=False),
    help="What callers of /v1 and /inference must show; 16 bytes at least.",
)
@click.option(
    "--tiny-dir",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("runs/vllm-tiny"),
    show_default=True,
    help="Where the model `tiny` is written: a new or an empty folder, or its own.",
)
def serve_vllm(
    model: str,
    more: tuple[str, ...],
    runs: bool,
    as_json: bool,
    python: str,
    host: str,
    port: int,
    device: Device | None,
    gpus: int | None,
    context_tokens: int | None,
    memory_gib: int | None,
    offload: Path | None,
    weight_version: str,
    routes: bool,
    masks: bool,
    api_key_file: Path | None,
    tiny_dir: Path,
) -> None:
    """Print the command, and its environment, that serves MODEL with vLLM, and the `dsec serve` that draws with it.

    MODEL is v4-flash or v4-pro (weights from Hugging Face, or from a directory: -- --model=DIR), tiny (random weights
    in the service's vocabulary, written here; it needs no GPU), or a directory with a model of yours.  Arguments after
    -- are passed on to vLLM, and win; the `dsec serve` that is printed knows nothing of them: with another port, host
    or model there, change it likewise.

    Who reaches the port can pause this engine and change its weights: vLLM asks for its key under /v1 and /inference
    only.  Let it listen where nobody but the service can connect.
    """
    if as_json and runs:
        raise RequestError("--json prints what --run would become: give one of them")
    if model == TINY and (context_tokens or 0) > CONTEXT_TOKENS_MAX:
        raise RequestError(f"--context-tokens {context_tokens}: a context of {TINY} holds {CONTEXT_TOKENS_MAX} tokens")
    device = device or ("cpu" if model == TINY else "cuda")
    for given, option in ((offload, "--offload"), (gpus, "--gpus"), (routes, "--routes"), (masks, "--masks")):
        if given and device == "cpu":
            raise RequestError(f"{option} needs a GPU, and --device is cpu")
    if memory_gib and device == "cuda" and offload is None:
        raise RequestError("--memory-gib bounds what --offload passes through: give --offload, or leave it out")
    memory_gib = memory_gib or (1 if model == TINY else 10)
    launch = make_launch(
        _preset(model, tiny_dir),
        device=device,
        host=host,
        port=port,
        python=python,
        gpus_count=gpus or 0,
        context_tokens_count=context_tokens or 0,
        memory_gib=memory_gib,
        offload=_offload(offload, weight_version, memory_gib),
        returns_routes=routes,
        returns_masks=masks,
        api_key_file=str(api_key_file or ""),
        more=more,
    )
    key = read_token(api_key_file, "") if api_key_file else ""
    if host not in _LOOPBACK:
        if len(key.encode()) < TOKEN_BYTES_MIN:
            raise RequestError(f"--host {host} needs --api-key-file, with a key of at least {TOKEN_BYTES_MIN} bytes")
        click.echo(f"dsec: whoever reaches {host}:{port} can pause and change this engine, key or not", err=True)
    if as_json:
        click.echo(msgspec.json.encode(launch))
    elif runs:
        if not any(flag.startswith(("--host", "--port", "--uds")) for flag in more):
            _check_free(host, port)
        click.echo(f"dsec: rollouts over it: {launch.render_service()}", err=True)
        _become(launch, key)
    else:
        click.echo(f"# for vLLM {VLLM_VERSION}; rollouts over it: {launch.render_service()}")
        click.echo(launch.render())


def _preset(model: str, tiny_dir: Path) -> Preset:
    """The preset of that name, or one for a directory; RequestError if there is neither."""
    if model == TINY:
        return tiny_preset(write_tiny_model(tiny_dir))
    if model in PRESETS:
        return PRESETS[model]
    folder = Path(model)
    if not (folder / "config.json").is_file():
        names = ", ".join([*PRESETS, TINY])
        raise RequestError(f"MODEL {model!r} is none of {names}, and no directory with a config.json")
    return folder_preset(folder)


def _offload(folder: Path | None, weight_version: str, memory_gib: int) -> Offload | None:
    if folder is None:
        return None
    if not weight_version or "/" in weight_version or weight_version in {".", ".."}:
        raise RequestError(f"--weight-version {weight_version!r} must be the name of a directory below --offload")
    return Offload(folder=folder.absolute(), weight_version=weight_version, memory_gib=memory_gib)


def _check_free(host: str, port: int) -> None:
    """RequestError if nobody can listen there now: vLLM says so only after it has loaded, and others may answer."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        with socket.socket(family, kind, protocol) as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as vLLM: what has ended is no hindrance
            listener.bind(address)
            listener.listen(1)
    except (OSError, UnicodeError) as error:
        why = getattr(error, "strerror", None) or error
        raise RequestError(f"vLLM cannot listen on {visible(host)}, port {port}: {why}") from error


def _become(launch: Launch, key: str) -> None:
    environment = os.environ | launch.environment | ({"VLLM_API_KEY": key} if key else {})
    try:
        os.execvpe(launch.arguments[0], launch.arguments, environment)  # noqa: S606 - no shell is the point
    except OSError as error:
        raise RequestError(f"--python {visible(launch.arguments[0])}: {error.strerror}") from error
