"""Commands for sandboxes of an Edge: `dsec create`, `pause`, `resume`, `snapshot`, `fork`, `network`, `rm`, `ps`.

Every command takes the Edge from DSEC_API_URL and DSEC_API_KEY, else this host's own.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import click
import msgspec

from dsec.client.connection import connect
from dsec.client.images import AsyncImages
from dsec.client.sandbox import AsyncSandbox, CreateOptions, LifeOptions
from dsec.client.substrate import RemoteSandbox
from dsec.images import Image
from dsec.terminal import render_columns, shortened, span_text
from dsec.types import SandboxId, SandboxSpec
from dsec.views import SandboxView

MIB = 1 << 20
JSON_OPTION = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


def example(*lines: str) -> str:
    """The end of a command's help."""
    return "\b\nExample:\n" + "\n".join(f"  {line}" for line in lines)


def _parse_labels(context: click.Context, parameter: click.Parameter, pairs: Sequence[str]) -> dict[str, str]:
    labels = {}
    for pair in pairs:
        name, separator, value = pair.partition("=")
        if not name or not separator:
            raise click.BadParameter(f"{pair!r} is not NAME=VALUE", context, parameter)
        labels[name] = value
    return labels


def _parse_envs(context: click.Context, parameter: click.Parameter, pairs: Sequence[str]) -> dict[str, str]:
    envs = {}
    for pair in pairs:
        name, separator, value = pair.partition("=")
        if not name:
            raise click.BadParameter(f"{pair!r} is not NAME=VALUE or NAME", context, parameter)
        if separator or name in os.environ:
            envs[name] = value if separator else os.environ[name]
    return envs


ENV_OPTION = click.option(
    "-e",
    "--env",
    "envs",
    multiple=True,
    metavar="NAME[=VALUE]",
    callback=_parse_envs,
    help="A variable; NAME alone passes ours on.",
)


def label_option(text: str) -> Callable[[Any], Any]:
    """`--label NAME=VALUE`, any number of times."""
    return click.option("--label", "labels", multiple=True, metavar="NAME=VALUE", callback=_parse_labels, help=text)


async def connected(sandbox_id: str, use: Callable[[AsyncSandbox], Awaitable[Any]]) -> Any:
    """What `use` makes of a sandbox; the connection is closed after.  Whether it lives, the first call says."""
    sandbox = AsyncSandbox(connect(), SandboxId(sandbox_id))
    try:
        return await use(sandbox)
    finally:
        await sandbox.close()


def print_ids(ids: Sequence[str], *, as_json: bool) -> None:
    """One a line, or a JSON list."""
    click.echo(msgspec.json.encode(list(ids)) if as_json else "\n".join(ids))


@click.command(
    short_help="Make a sandbox and print its id.",
    epilog=example("dsec create --memory-mib 1024 --allow api.example.com:443", "id=$(dsec create --label job=7)"),
)
@click.option(
    "--base",
    default="host",
    show_default=True,
    help="`host`, a layer with an operating system, or an image that has one or lies over `host`.",
)
@click.option("--layer", "layers", multiple=True, help="A layer or image over the base; the topmost first.")
@click.option("--memory-mib", type=click.IntRange(16), help="Memory, the disk's pages included  [default: 512]")
@click.option("--disk-mib", type=click.IntRange(1), help="Disk  [default: three quarters of the memory]")
@click.option("--cpus", type=click.FloatRange(0.01, 1024), help="Cores  [default: 1]")
@click.option("--allow", multiple=True, metavar="RULE", help="It may connect to HOST[:PORT], *.HOST or CIDR.")
@ENV_OPTION
@click.option("-w", "--cwd", default="", help="Where commands run  [default: the image's]")
@click.option("-u", "--user", default="", help="Who runs them: USER[:GROUP]  [default: the image's]")
@label_option("To find it by.")
@click.option(
    "--idle-timeout-s", type=float, help="Ends after so long without a command  [default: never; from Python: 1 h]"
)
@click.option("--lifetime-s", type=float, help="Ends after so long  [default: never]")
@click.option("--owner", default="", help="The lease that it lives under.")
@click.option("--epoch", type=click.IntRange(0), default=0, help="Of the lease.")
@click.option("--request-id", default="", help="The same id gives the same sandbox, also after a crash.")
@click.option("--json", "as_json", is_flag=True, help="Print the whole sandbox as one JSON object.")
def create(
    base: str,
    layers: Sequence[str],
    memory_mib: int | None,
    disk_mib: int | None,
    cpus: float | None,
    allow: Sequence[str],
    envs: dict[str, str],
    cwd: str,
    user: str,
    labels: dict[str, str],
    idle_timeout_s: float | None,
    lifetime_s: float | None,
    owner: str,
    epoch: int,
    request_id: str,
    as_json: bool,
) -> None:
    """Make a sandbox and print its id; it lives until `dsec rm`, or as long as the options say.

    What --allow names is reached through a proxy, by http_proxy and its relatives in every command's environment.  A
    name opens public addresses; loopback and private ones need a CIDR (127.0.0.1/32:8765).  https needs certificates,
    which the base `host` brings none of.

    What an image says of variables, directory and user is for every command that does not say otherwise; -e, -w and -u
    go before it.  An image's entry point is not run.
    """
    options = CreateOptions(
        layers=layers,
        network=allow,
        envs=envs,
        cwd=cwd,
        user=user,
        metadata=labels,
        idle_timeout_s=idle_timeout_s,
        timeout_s=lifetime_s,
        owner=owner,
        epoch=epoch,
        request_id=request_id,
    )
    if memory_mib is not None:
        options["memory_bytes"] = memory_mib * MIB
    if disk_mib is not None:
        options["disk_bytes"] = disk_mib * MIB
    if cpus is not None:
        options["cpu"] = cpus

    async def run() -> SandboxView | str:
        sandbox = await AsyncSandbox.create(base, **options)
        try:
            return await sandbox.view() if as_json else sandbox.id
        finally:
            await sandbox.close()

    made = asyncio.run(run())
    click.echo(msgspec.json.encode(made) if isinstance(made, SandboxView) else made)


def _each(ids: Sequence[str], use: Callable[[RemoteSandbox], Awaitable[None]], *, as_json: bool) -> None:
    """Do something with every sandbox, all at once; the first error is raised after all were tried.

    With `as_json` their ids are printed then.
    """

    async def run() -> None:
        async def one(sandbox_id: str) -> None:
            await connected(sandbox_id, lambda sandbox: use(sandbox.remote))

        outcomes = await asyncio.gather(*map(one, ids), return_exceptions=True)
        for outcome in outcomes:
            if outcome is not None:
                raise outcome

    asyncio.run(run())
    if as_json:
        print_ids(ids, as_json=True)


@click.command(short_help="Stop all that runs in a sandbox.", epilog=example("dsec pause ID"))
@click.argument("ids", metavar="ID...", nargs=-1, required=True)
@JSON_OPTION
def pause(ids: Sequence[str], as_json: bool) -> None:
    """Stop every process in a sandbox and give its memory back; the next command resumes it."""
    _each(ids, RemoteSandbox.pause, as_json=as_json)


@click.command(short_help="Let a paused sandbox go on.", epilog=example("dsec resume ID"))
@click.argument("ids", metavar="ID...", nargs=-1, required=True)
@JSON_OPTION
def resume(ids: Sequence[str], as_json: bool) -> None:
    """Let a paused sandbox go on."""
    _each(ids, RemoteSandbox.resume, as_json=as_json)


@click.command(short_help="End sandboxes.", epilog=example("dsec rm ID", "dsec rm $(dsec ps -q)"))
@click.argument("ids", metavar="ID...", nargs=-1, required=True)
@JSON_OPTION
def rm(ids: Sequence[str], as_json: bool) -> None:
    """End sandboxes and all that runs in them; their trajectories stay."""
    _each(ids, RemoteSandbox.destroy, as_json=as_json)


@click.command(
    short_help="Keep what was written in a sandbox, as a layer.",
    epilog=example(
        "layer=$(dsec snapshot ID)",
        "dsec create --layer $layer",
        "dsec snapshot ID --tag agent:3 && dsec create --base agent:3",
    ),
)
@click.argument("sandbox_id", metavar="ID")
@click.option("--tag", default="", help="Name it, and what it lies over, as an image.")
@JSON_OPTION
def snapshot(sandbox_id: str, tag: str, as_json: bool) -> None:
    """Pack what was written in a sandbox as a layer, and print the layer's id.

    Without --tag the layer goes when room is needed.  The image of --tag runs commands as the sandbox does.
    """
    layer = asyncio.run(connected(sandbox_id, lambda sandbox: sandbox.snapshot(tag)))
    click.echo(msgspec.json.encode({"layer": layer}) if as_json else layer)


@click.command(
    short_help="Make sandboxes that go on from another.",
    epilog=example("dsec fork ID", "dsec fork ID --count 8", "dsec fork ID --after KEY"),
)
@click.argument("sandbox_id", metavar="ID")
@click.option("--count", type=click.IntRange(1), default=1, show_default=True, help="How many; all or none.")
@click.option("--after", metavar="KEY", help="Go on from its state after this command; it may have ended since.")
@label_option("To find them by.")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON list of ids.")
def fork(sandbox_id: str, count: int, after: str | None, labels: dict[str, str], as_json: bool) -> None:
    """Make sandboxes that go on from what was written in this one, and print their ids.

    With --after the state is made again: from a snapshot and the commands since, every result compared.
    """

    async def run(sandbox: AsyncSandbox) -> list[str]:
        options = LifeOptions(metadata=labels, idle_timeout_s=None)
        if after is None:
            forks = await sandbox.fork(count, **options)
        else:
            first = await sandbox.branch(after, **options)
            forks = [first, *(await first.fork(count - 1, **options) if count > 1 else ())]
        for made in forks:
            await made.close()
        return [made.id for made in forks]

    print_ids(asyncio.run(connected(sandbox_id, run)), as_json=as_json)


@click.command(
    short_help="Replace a sandbox's network allowlist.",
    epilog=example("dsec network ID --allow api.example.com:443 --allow '*.example.org'", "dsec network ID"),
)
@click.argument("sandbox_id", metavar="ID")
@click.option("--allow", multiple=True, metavar="RULE", help="HOST[:PORT], *.HOST or CIDR; none: nowhere.")
def network(sandbox_id: str, allow: Sequence[str]) -> None:
    """Replace a sandbox's network allowlist; connections that it no longer allows are closed.

    How rules are meant, `dsec create --help` says.
    """
    asyncio.run(connected(sandbox_id, lambda sandbox: sandbox.update_network(allow)))


@click.command(short_help="List sandboxes.", epilog=example("dsec ps", "dsec ps --label job=7 --json"))
@label_option("Only those that have it.")
@click.option("-q", "--quiet", is_flag=True, help="Ids only.")
@click.option("--json", "as_json", is_flag=True, help="One JSON list.")
def ps(labels: dict[str, str], quiet: bool, as_json: bool) -> None:
    """List living sandboxes.

    BASE is the image that a sandbox was made of, and how many layers lie over it; MEMORY is its bound.
    """

    async def look() -> tuple[list[SandboxView], list[Image]]:
        views = await AsyncSandbox.list(labels)
        if as_json or quiet or not any(view.spec.layers for view in views):
            return views, []
        async with AsyncImages() as images:
            return views, await images.images()

    views, images = asyncio.run(look())
    if as_json:
        click.echo(msgspec.json.encode(views))
    elif quiet:
        click.echo("".join(f"{view.id}\n" for view in views), nl=False)
    else:
        head = ("ID", "STATE", "AGE", "BASE", "MEMORY", "COMMANDS", "OWNER", "LABELS")
        click.echo(render_columns(head, [_row(view, images) for view in views]))


def _row(view: SandboxView, images: Sequence[Image]) -> tuple[str, ...]:
    labels = ",".join(f"{shortened(name, 20)}={shortened(value, 20)}" for name, value in sorted(view.labels.items()))
    memory = f"{view.spec.memory_bytes / MIB:.0f}M"
    owner = f"{shortened(view.owner, 20)}/{view.epoch}" if view.owner else ""
    age = span_text(time.time() - view.created_at_s)
    return view.id, view.state, age, _base(view.spec, images), memory, str(view.commands_count), owner, labels


def _base(spec: SandboxSpec, images: Sequence[Image]) -> str:
    """The image whose layers are the lowest ones, else what they lie over."""
    names = {image.layers: image.name for image in images}
    layers = spec.layers
    lowest = next((at for at in range(len(layers)) if layers[at:] in names), len(layers))
    if lowest < len(layers):
        name, over = names[layers[lowest:]], lowest
    elif spec.base:
        name, over = spec.base, len(layers)
    else:
        name, over = layers[-1][:19], len(layers) - 1
    return f"{name}+{over}" if over else name
