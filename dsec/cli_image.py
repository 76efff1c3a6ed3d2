"""Commands for layers and images: `dsec image build|import|tag|ls|inspect|rm|publish|gc`.

With DSEC_API_URL they ask that Edge; without it they work on this host's store directly (DSEC_IMAGES_DIRECTORY),
beside a running Edge or with none.  What reads and writes more than an archive (build, publish, --check) is always done
on the host of the store.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
from collections.abc import Awaitable, Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

import click
import msgspec
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from dsec.cli_sandbox import JSON_OPTION, MIB, example
from dsec.client.images import AsyncImages
from dsec.edge.edge_config import EdgeConfig
from dsec.edge.images.config import ImagesConfig
from dsec.edge.images.service import Images as LocalImages
from dsec.edge.images.store import LayerStore
from dsec.errors import NotFoundError, UnreachableError
from dsec.images import Image, Layer, check_image_name, is_layer_id
from dsec.terminal import render_columns, visible_line
from dsec.types import LayerId
from dsec.views import ImportOptions

T = TypeVar("T")
COMPRESS_OPTION = click.option(
    "--compress", "compressed", is_flag=True, help="With lz4hc: smaller, slower to make (mkfs.erofs)."
)
TAG_OPTION = click.option("--tag", default="", help="The image's name.")


class Images(Protocol):
    """What `dsec.edge.images.service.Images` and `dsec.client.images.AsyncImages` have in common."""

    async def images(self) -> list[Image]: ...  # noqa: D102  documented there

    async def layers(self) -> list[Layer]: ...  # noqa: D102

    async def tag(self, name: str, references: Sequence[str]) -> Image: ...  # noqa: D102

    async def remove(self, reference: str) -> None: ...  # noqa: D102

    async def collect(self) -> list[LayerId]: ...  # noqa: D102


def _run(use: Callable[[Images], Awaitable[T]]) -> T:
    """What `use` makes of the Edge's images, or without DSEC_API_URL of this host's."""
    if os.environ.get("DSEC_API_URL"):
        return asyncio.run(_ask(use))
    return _run_here(lambda store: use(LocalImages(store)))


async def _ask(use: Callable[[AsyncImages], Awaitable[T]]) -> T:
    async with AsyncImages() as images:
        return await use(images)


def _run_here(use: Callable[[LayerStore], Awaitable[T]]) -> T:
    config = ImagesConfig()

    async def run() -> T:
        store = config.store(EdgeConfig().disk_free_bytes_min)
        await store.open()
        try:
            return await use(store)
        except NotFoundError as error:
            raise NotFoundError(f"{error} (in this host's store {config.directory})") from error
        finally:
            store.close()

    url = os.environ.get("DSEC_API_URL", "unix:")
    if not url.startswith("unix:"):
        raise click.UsageError(
            f"this works on this host's own images, and DSEC_API_URL names {url}: do it there, or unset DSEC_API_URL"
        )
    return asyncio.run(run())


def _tell_place(made: Image) -> None:
    """Say which store has it now, and whether the Edge that DSEC_API_URL names sees it there."""
    place, url = ImagesConfig().directory, os.environ.get("DSEC_API_URL")
    click.echo(f"dsec: in the store {place}", err=True)
    if not url:
        return
    try:
        images, layers = asyncio.run(_ask(_look))
    except UnreachableError:
        return
    named = {(one.name, one.layers) for one in images}
    if made.layers[0] not in layers or (made.name and (made.name, made.layers) not in named):
        way = "build again with DSEC_IMAGES_DIRECTORY as it has it"
        click.echo(f"dsec: warning: the Edge at {url} has another store: {way}", err=True)


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


@click.group(
    short_help="Layers and images that sandboxes are made of.",
    epilog=example(
        "dsec image build debian --tag tools:1", "dsec image ls", "dsec create --base tools:1 --layer repo:7"
    ),
)
def image() -> None:
    """Layers and images of this host: read-only file systems that sandboxes are composed of."""


@image.group(
    epilog=example(
        "dsec image build debian --packages git,python3 --tag tools:1",
        "dsec image build directory ./repo --at /workspace --tag repo:7",
    )
)
def build() -> None:
    """Make an image, or a layer, from scratch."""


@build.command(epilog=example("dsec image build debian --packages git,python3 --tag tools:1"))
@click.option("--packages", default="", help="Names, with commas between them.")
@click.option("--suite", default="bookworm", show_default=True, help="Which release.")
@click.option("--mirror", default="", help="[default: as apt has it]")
@TAG_OPTION
@COMPRESS_OPTION
@JSON_OPTION
def debian(packages: str, suite: str, mirror: str, tag: str, *, compressed: bool, as_json: bool) -> None:
    """A minimal Debian with packages (debootstrap); the tag is `debian` unless told otherwise."""
    from dsec.edge.images.debian import build_debian

    with _progress("building") as (count, report):
        made = _run_here(
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
    _tell_place(made)


@build.command(epilog=example("dsec image build directory ./repo --at /workspace --tag repo:7"))
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
        made = _run_here(make)
    if tag or as_json:
        _print_image(made, as_json=as_json)
    else:
        click.echo(made.layers[0])
    if at.strip("/"):  # so it has no /bin, and as a base would run nothing
        way = f"dsec create --layer {tag or made.layers[0]}"
        click.echo(f"dsec: without an operating system it is no base, and lies over one: {way}", err=True)
    _tell_place(made)


@image.command("import", epilog=example("docker save python:3.12 -o p.tar && dsec image import p.tar"))
@click.argument("path", type=click.Path(exists=True, path_type=Path))
@click.option("--reference", default="", help="Which image, where PATH holds several.")
@TAG_OPTION
@COMPRESS_OPTION
@JSON_OPTION
def import_(path: Path, reference: str, tag: str, *, compressed: bool, as_json: bool) -> None:
    """An image from an OCI layout or what `docker save` wrote (a directory or a tar); the tag is as there."""
    from dsec.edge.images.importer import import_image

    options = ImportOptions(name=tag, reference=reference, compressed=compressed)
    if os.environ.get("DSEC_API_URL"):
        with _progress("sending") as (count, _):
            made = asyncio.run(_ask(lambda images: images.import_archive(path, options, progress=count)))
    else:
        with _progress("importing") as (count, _):
            made = _run_here(lambda store: import_image(store, path, options, progress=count))
    _print_image(made, as_json=as_json)


@image.command(epilog=example("dsec image tag agent:2 toolkit:5 repo:7 debian"))
@click.argument("name")
@click.argument("references", nargs=-1, required=True)
@JSON_OPTION
def tag(name: str, references: tuple[str, ...], *, as_json: bool) -> None:
    """Name what lies over each other, the topmost first: images by name, layers by id."""
    made = _run(lambda images: images.tag(name, references))
    _print_image(made, as_json=as_json)


@image.command(epilog=example("dsec image ls --json"))
@JSON_OPTION
def ls(*, as_json: bool) -> None:
    """Every image, then every layer that no image has."""
    images, layers = _run(_look)
    if as_json:
        listed: Any = {"images": images, "layers": list(layers.values())}
        click.echo(msgspec.json.encode(listed))
        return
    named = {layer_id for made in images for layer_id in made.layers}
    rows = [(one.name, str(len(one.layers)), _size(one.layers, layers), one.source) for one in images]
    rows += [(layer_id, "1", _size([layer_id], layers), layer.made_from) for layer_id, layer in layers.items()
             if layer_id not in named]  # fmt: skip
    click.echo(render_columns(("IMAGE", "LAYERS", "MIB", "FROM"), rows))


@image.command(epilog=example("dsec image inspect debian"))
@click.argument("reference")
@click.option("--check", is_flag=True, help="Read every layer again and compare its digest.")
def inspect(reference: str, *, check: bool) -> None:
    """One image or layer, all that is known of it, as JSON."""
    images, layers = _run(_look)
    if is_layer_id(reference):
        found = Image(name="", layers=(LayerId(reference), *_known(layers, reference).parents))
    else:
        name = check_image_name(reference)
        matches = [one for one in images if one.name == name]
        if not matches:
            raise NotFoundError(f"there is no image {reference}; dsec image ls names them")
        found = matches[0]
    if check:
        _run_here(lambda store: store.check(found.layers))
    shown = {"image": found, "layers": [_known(layers, layer_id) for layer_id in found.layers]}
    click.echo(msgspec.json.format(msgspec.json.encode(shown)))


@image.command(epilog=example("dsec image rm tools:1"))
@click.argument("references", nargs=-1, required=True)
def rm(references: tuple[str, ...]) -> None:
    """Forget images by name (their layers go when the room is needed, or with `gc`), or remove layers by id."""

    async def remove(images: Images) -> None:
        for reference in references:
            await images.remove(reference)

    _run(remove)


@image.command(epilog=example("dsec image gc"))
@JSON_OPTION
def gc(*, as_json: bool) -> None:
    """Remove every layer that no image, no other layer and no sandbox needs."""
    removed = _run(lambda images: images.collect())
    click.echo(msgspec.json.encode(removed) if as_json else "\n".join(removed), nl=as_json or bool(removed))
    if not as_json:
        click.echo(f"removed {len(removed)} layers", file=sys.stderr)


@image.command(epilog=example("dsec image publish debian"))
@click.argument("references", nargs=-1, required=True)
def publish(references: tuple[str, ...]) -> None:
    """Copy images and layers to the shared directory (DSEC_IMAGES_SHARED), for every host that reads it."""

    async def copy(store: LayerStore) -> None:
        for reference in references:
            await store.publish(store.resolve(reference))

    _run_here(copy)


async def _look(images: Images) -> tuple[list[Image], dict[LayerId, Layer]]:
    return await images.images(), {layer.id: layer for layer in await images.layers()}


def _known(layers: dict[LayerId, Layer], reference: str) -> Layer:
    if (found := layers.get(LayerId(reference))) is None:
        raise NotFoundError(f"there is no layer {reference}")
    return found


def _size(layer_ids: Any, layers: dict[LayerId, Layer]) -> str:
    return f"{sum(layers[one].size_bytes for one in layer_ids if one in layers) / MIB:,.1f}"
