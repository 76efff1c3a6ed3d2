"""Commands for layers and images: `dsec image build|import|tag|ls|inspect|rm|publish|gc`.

They work on this host's store directly (DSEC_IMAGES_DIRECTORY), beside a running Edge or without one.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import click
import msgspec
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from dsec.edge.images.config import ImagesConfig
from dsec.edge.images.facts import Image, LayerFacts, is_layer_id
from dsec.edge.images.store import LayerStore
from dsec.terminal import render_columns, visible_line
from dsec.types import LayerId

MIB = 1 << 20
T = TypeVar("T")
JSON_OPTION = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
COMPRESS_OPTION = click.option(
    "--compress", "compressed", is_flag=True, help="With lz4hc: smaller, slower to make (mkfs.erofs)."
)
TAG_OPTION = click.option("--tag", default="", help="The image's name.")


class Layer(LayerFacts, frozen=True, kw_only=True):
    """A layer as the commands print it."""

    id: LayerId


def _example(*lines: str) -> str:
    return "\b\nExample:\n" + "\n".join(f"  {line}" for line in lines)


def _run(use: Callable[[LayerStore], Awaitable[T]]) -> T:
    async def run() -> T:
        store = ImagesConfig().store()
        await store.open()
        try:
            return await use(store)
        finally:
            store.close()

    return asyncio.run(run())


@contextlib.contextmanager
def _progress(what: str) -> Iterator[tuple[Callable[[int], None], Callable[[str], None]]]:
    """Bytes written and the last line of whoever works, on a terminal's stderr; else nothing."""
    console = Console(stderr=True)
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TextColumn("{task.fields[said]}", markup=False),
               TimeElapsedColumn())  # fmt: skip
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(what, said="")
        total = 0

        def count(written: int) -> None:
            nonlocal total
            total += written
            bar.update(task, said=f"{total / MIB:,.0f} MiB")

        yield count, lambda line: bar.update(task, said=visible_line(line)[:100])


def _print_image(made: Image, *, as_json: bool) -> None:
    click.echo(msgspec.json.encode(made) if as_json else "\n".join((made.name, *made.layers)))


@click.group(short_help="Layers and images that sandboxes are made of.")
def image() -> None:
    """Layers and images of this host: read-only file systems that sandboxes are composed of."""


@image.group()
def build() -> None:
    """Make an image, or a layer, from scratch."""


@build.command(epilog=_example("dsec image build debian --packages git,python3 --tag tools:1"))
@click.option("--packages", default="", help="Names, with commas between them.")
@click.option("--suite", default="bookworm", show_default=True)
@click.option("--mirror", default="", help="[default: as apt has it]")
@TAG_OPTION
@COMPRESS_OPTION
@JSON_OPTION
def debian(packages: str, suite: str, mirror: str, tag: str, *, compressed: bool, as_json: bool) -> None:
    """A minimal Debian with packages (debootstrap); the tag is `debian` unless told otherwise."""
    from dsec.edge.images.debian import build_debian

    with _progress("building") as (count, report):
        made = _run(
            lambda store: build_debian(
                store,
                tag or "debian",
                packages=filter(None, packages.split(",")),
                suite=suite,
                mirror=mirror,
                compressed=compressed,
                report=report,
                progress=count,
            )
        )
    _print_image(made, as_json=as_json)


@build.command(epilog=_example("dsec image build directory ./repo --at /workspace --tag repo:7"))
@click.argument("path", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--at", default="/", show_default=True, help="Where it lies in a sandbox.")
@TAG_OPTION
@COMPRESS_OPTION
@JSON_OPTION
def directory(path: Path, at: str, tag: str, *, compressed: bool, as_json: bool) -> None:
    """A layer of a directory's files, owners as they are; without a tag, its id is printed and nothing keeps it."""

    async def make(store: LayerStore) -> Image:
        source = str(path.resolve())
        layer_id = await store.add_directory(
            path, at=at, made_from=f"directory {source}", compressed=compressed, progress=count
        )
        made = Image(name=tag, layers=(layer_id,), source=source)
        return await store.tag(made) if tag else made

    with _progress("building") as (count, _):
        made = _run(make)
    if tag or as_json:
        _print_image(made, as_json=as_json)
    else:
        click.echo(made.layers[0])


@image.command("import", epilog=_example("docker save python:3.12 -o p.tar && dsec image import p.tar"))
@click.argument("path", type=click.Path(exists=True, path_type=Path))
@click.option("--reference", default="", help="Which image, where PATH holds several.")
@TAG_OPTION
@COMPRESS_OPTION
@JSON_OPTION
def import_(path: Path, reference: str, tag: str, *, compressed: bool, as_json: bool) -> None:
    """An image from an OCI layout or what `docker save` wrote (a directory or a tar); the tag is as there."""
    from dsec.edge.images.importer import import_image

    with _progress("importing") as (count, _):
        made = _run(
            lambda store: import_image(
                store, path, name=tag, reference=reference, compressed=compressed, progress=count
            )
        )
    _print_image(made, as_json=as_json)


@image.command(epilog=_example("dsec image tag agent:2 toolkit:5 repo:7 debian"))
@click.argument("name")
@click.argument("references", nargs=-1, required=True)
@JSON_OPTION
def tag(name: str, references: tuple[str, ...], *, as_json: bool) -> None:
    """Name what lies over each other, the topmost first: images by name, layers by id."""
    made = _run(lambda store: store.tag(store.compose(name, references)))
    _print_image(made, as_json=as_json)


@image.command(epilog=_example("dsec image ls --json"))
@JSON_OPTION
def ls(*, as_json: bool) -> None:
    """Every image, then every layer that no image has."""

    async def look(store: LayerStore) -> tuple[list[Image], dict[LayerId, LayerFacts]]:
        return list(store.images().values()), store.layers()

    images, layers = _run(look)
    if as_json:
        listed: Any = {"images": images, "layers": [_layer(layer_id, facts) for layer_id, facts in layers.items()]}
        click.echo(msgspec.json.encode(listed))
        return
    named = {layer_id for made in images for layer_id in made.layers}
    rows = [(one.name, str(len(one.layers)), _size(one.layers, layers), one.source) for one in images]
    rows += [(layer_id, "1", _size([layer_id], layers), facts.made_from) for layer_id, facts in layers.items()
             if layer_id not in named]  # fmt: skip
    click.echo(render_columns(("IMAGE", "LAYERS", "MIB", "FROM"), rows))


@image.command(epilog=_example("dsec image inspect debian"))
@click.argument("reference")
@click.option("--check", is_flag=True, help="Read every layer again and compare its digest.")
def inspect(reference: str, *, check: bool) -> None:
    """One image or layer, all that is known of it, as JSON."""

    async def look(store: LayerStore) -> dict[str, Any]:
        found = store.resolve(reference)
        if check:
            await store.check(found.layers)
        return {"image": found, "layers": [_layer(layer_id, store.facts(layer_id)) for layer_id in found.layers]}

    click.echo(msgspec.json.format(msgspec.json.encode(_run(look))))


@image.command(epilog=_example("dsec image rm tools:1"))
@click.argument("references", nargs=-1, required=True)
def rm(references: tuple[str, ...]) -> None:
    """Forget images by name (their layers go when the room is needed, or with `gc`), or remove layers by id."""

    async def remove(store: LayerStore) -> None:
        for reference in references:
            if is_layer_id(reference):
                await store.remove(LayerId(reference))
            else:
                await store.untag(reference)

    _run(remove)


@image.command(epilog=_example("dsec image gc"))
@JSON_OPTION
def gc(*, as_json: bool) -> None:
    """Remove every layer that no image, no other layer and no sandbox needs."""
    removed = _run(lambda store: store.collect())
    click.echo(msgspec.json.encode(removed) if as_json else "\n".join(removed), nl=as_json or bool(removed))
    if not as_json:
        click.echo(f"removed {len(removed)} layers", file=sys.stderr)


@image.command(epilog=_example("dsec image publish debian"))
@click.argument("references", nargs=-1, required=True)
def publish(references: tuple[str, ...]) -> None:
    """Copy images and layers to the shared directory (DSEC_IMAGES_SHARED), for every host that reads it."""

    async def copy(store: LayerStore) -> None:
        for reference in references:
            await store.publish(store.resolve(reference))

    _run(copy)


def _layer(layer_id: LayerId, facts: LayerFacts) -> Layer:
    return Layer(id=layer_id, **msgspec.structs.asdict(facts))


def _size(layer_ids: Any, layers: dict[LayerId, LayerFacts]) -> str:
    return f"{sum(layers[one].size_bytes for one in layer_ids if one in layers) / MIB:,.1f}"
