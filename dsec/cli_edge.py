"""Commands for the Edge of this host: `dsec edge serve` and `dsec edge status`."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path

import click
import msgspec

from dsec.address import default_directory, default_url
from dsec.cli_sandbox import JSON_OPTION, example
from dsec.terminal import counted, render_columns

GIB = 1 << 30
GARBAGE_COUNT = 10_000
"""Objects between two looks for cycles, of which commands leave hardly any; 700, the default, cost 2 % of the time.

It is set for a whole process: only where that is an Edge and nothing else, so not in `dsec run`.
"""
BOUNDS = {
    "disk_bytes": "disk",
    "memory_bytes": "memory, promised",
    "pids_count": "processes, promised",
    "sandboxes_count": "sandboxes",
}
"""How people are told of an Edge's bounds."""


@click.group(short_help="The host agent: serve it, or look at it.", epilog=example("dsec edge serve"))
def edge() -> None:
    """The host agent that makes sandboxes, keeps their log, and is there again after a crash."""


@edge.command(
    short_help="Serve this host's sandboxes over gRPC.",
    epilog=example(
        "dsec edge serve",
        "dsec edge serve --directory /srv/dsec --listen unix:/run/dsec/edge.sock \\",
        "    --listen tls:0.0.0.0:7700 --token-file token --tls-cert edge.pem --tls-key edge.key",
    ),
)
@click.option("--directory", type=click.Path(path_type=Path), help=f"Its state  [default: {default_directory()}]")
@click.option(
    "--listen",
    "urls",
    multiple=True,
    metavar="URL",
    help=f"unix:PATH, tcp:HOST:PORT or tls:HOST:PORT, any number  [default: {default_url()}]",
)
@click.option("--token-file", type=click.Path(path_type=Path), help="What tcp and tls ask for  [default: DSEC_API_KEY]")
@click.option("--tls-cert", type=click.Path(path_type=Path), help="The certificate and its chain, PEM.")
@click.option("--tls-key", type=click.Path(path_type=Path), help="Its private key, PEM.")
@click.option(
    "--substrate",
    type=click.Choice(["container", "docker"]),
    default="container",
    show_default=True,
    help="Who makes the sandboxes: dsec itself, or this host's Docker Engine.",
)
@click.option("--destroy-on-exit", is_flag=True, help="End the sandboxes too, when a signal ends the Edge.")
@click.option("--json", "as_json", is_flag=True, help="Say that it is ready as one JSON object.")
def serve(
    directory: Path | None,
    urls: Sequence[str],
    token_file: Path | None,
    tls_cert: Path | None,
    tls_key: Path | None,
    substrate: str,
    destroy_on_exit: bool,
    as_json: bool,
) -> None:
    """Serve this host's sandboxes (dsec.pb.v1.Edge, health, reflection) until SIGINT or SIGTERM comes.

    Its sandboxes live on then, as after a crash, and the next `dsec edge serve` takes them up; with nobody there for
    a while they end.  Without sandboxes nothing is left.  A unix socket is for our own user only; tcp and tls ask for
    a token.
    """
    import gc

    import uvloop

    from dsec import listen
    from dsec.edge import main

    gc.set_threshold(GARBAGE_COUNT)
    options = main.ServeOptions(
        directory=directory or default_directory(),
        urls=tuple(urls) or (default_url(),),
        token=listen.read_token(token_file),
        certificate=listen.read_certificate(tls_cert, tls_key),
        substrate=substrate,
        destroys_on_exit=destroy_on_exit,
    )

    def tell(ready: main.Ready) -> None:
        if as_json:
            click.echo(msgspec.json.encode(ready))
        else:
            taken_up = f"{counted(ready.adopted, 'sandbox')} taken up"
            click.echo(f"dsec: serving {', '.join(ready.urls)}; state in {ready.directory}; {taken_up}")

    def tell_left(count: int) -> None:
        lives = "lives" if count == 1 else "live"
        alive = f"{counted(count, 'sandbox')} {lives} on for DSEC_EDGE_KEEP_S; the next `dsec edge serve` takes them up"
        what = alive if count else "nothing is left"
        click.echo(f"dsec: {what}", err=True)

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main.serve(options, tell, tell_left))


@edge.command(short_help="What the host has, and what of it is used.", epilog=example("dsec edge status --json"))
@JSON_OPTION
def status(as_json: bool) -> None:
    """What the host of an Edge has, and what of it is used.

    Memory and processes are promised, not used: a sandbox seldom takes all that it may, so an Edge promises what the
    host has several times over (DSEC_EDGE_MEMORY_OVERCOMMIT, DSEC_EDGE_PIDS_OVERCOMMIT).  Disk is what is full.
    """
    from dsec.client.host import host_view

    view = asyncio.run(host_view())
    if as_json:
        whole = {kind: {name: int(amount) for name, amount in amounts.items()}
                 for kind, amounts in (("used", view.used), ("total", view.total))}  # fmt: skip
        click.echo(msgspec.json.encode(whole | {"sandboxes": view.sandboxes}))
        return
    rows = [
        (BOUNDS.get(name, name), _amount(name, view.used.get(name, 0)), _amount(name, total))
        for name, total in sorted(view.total.items())
    ]
    rows += [(f"sandboxes {state}", str(count), "") for state, count in sorted(view.sandboxes.items())]
    click.echo(render_columns(("WHAT", "USED", "OF"), rows))


def _amount(name: str, amount: float) -> str:
    return f"{amount / GIB:,.1f} GiB" if name.endswith("_bytes") else f"{amount:,.0f}"
