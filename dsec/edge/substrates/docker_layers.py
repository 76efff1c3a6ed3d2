"""Docker's images as layers: found by name, put over each other in any order, kept while they are needed.

A snapshot is an image with one layer more than the one its sandbox was made from, and says in its labels what that was.
A spec that asks for just this stack gets that image.  Any other stack becomes an image of its own by `docker load`: its
archive names all layers by their digests, and holds those that Docker has not in that place yet.  So is an image
that has volumes or a health check, which Docker would make and run: of that only the layers are taken.

Snapshots and stacks that nobody named are ours: the oldest make room for new ones.  Docker itself keeps those that a
container or another image needs.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import io
import json
import re
import tarfile
import tempfile
from collections.abc import AsyncIterator, Iterator, Sequence
from datetime import UTC, datetime
from functools import partial
from typing import IO, Any, Literal

import msgspec

from dsec.edge.images.oci import RunConfig
from dsec.edge.substrates.docker_engine import FAILURES, Engine
from dsec.errors import InvalidArgumentError, NotFoundError, ResourceExhaustedError
from dsec.images import Image, check_image_name, check_layer_id, is_layer_id, over_each_other
from dsec.sandbox import Hold
from dsec.types import Composition, LayerId, SandboxSpec

_BELOW = "dsec.below"  # label of a snapshot: what its sandbox was made from, as `_recipe` says it
_BELOW_COUNT = "dsec.below.count"  # of a snapshot: how many of Docker's layers that is
_STACK = "dsec.stack"  # of an image that was put together
_OUR_NAMES = ("dsec-stack:", "dsec-stack@", "<none>")  # what has another is the user's, label or not
_HOST = "host"
_COUNT = re.compile(r"[1-9][0-9]{0,3}", re.ASCII)
_COPY_BYTES = 1 << 20


class _Found(msgspec.Struct, frozen=True):
    """An image.  `below` is None if it is no snapshot; `own` are Docker's layers that it adds to what lies below.

    A snapshot is whatever has labels as ours are, and is bare, as all of ours are: anybody's image can carry them.

    `is_bare`: there is nothing in its configuration that Docker would do to a sandbox.
    """

    id: LayerId
    digests: tuple[str, ...]
    own: tuple[str, ...]
    below: str | None
    is_bare: bool
    platform: dict[str, str]
    run: RunConfig


class DockerLayers:
    """The layers of one daemon; base `host` is the image `host_image`, and of ours at most `count_max` are kept."""

    def __init__(self, engine: Engine, host_image: str, count_max: int) -> None:
        self._engine = engine
        self._host_image = host_image
        self._count_max = count_max
        self._blocks: list[set[str]] = []  # what each block of `holding` holds
        self._stacking = asyncio.Lock()
        self._removing = asyncio.Lock()

    # -- names and holding -----------------------------------------------------------------------

    async def composed(self, references: Sequence[str]) -> Composition:
        """See `dsec.sandbox.Layered`; an id stands for itself, whatever it was made over."""
        found = [
            Image(name="", layers=(LayerId(one),)) if is_layer_id(one) else await self._named(one) for one in references
        ]
        whole = over_each_other(found)
        return Composition(layers=whole.layers, base=whole.base, defaults=whole.config.defaults)

    async def _named(self, name: str) -> Image:
        found = await self._find(check_image_name(name))
        words = (found.below or "").split()
        below = (LayerId(word) for word in words if word != _HOST)
        base: Literal["host", ""] = "host" if _HOST in words else ""
        return Image(name=name, layers=(found.id, *below), base=base, config=found.run.config())

    @contextlib.contextmanager
    def holding(self) -> Iterator[Hold]:
        """See `dsec.sandbox.Layered`."""
        with self._holding() as block:

            async def hold(layer_ids: Sequence[LayerId]) -> None:
                await self._hold(block, *layer_ids)
                for layer_id in layer_ids:
                    await self._find(layer_id)

            yield hold

    @contextlib.contextmanager
    def _holding(self) -> Iterator[set[str]]:
        block: set[str] = set()
        self._blocks.append(block)
        try:
            yield block
        finally:
            self._blocks = [other for other in self._blocks if other is not block]

    async def _hold(self, block: set[str], *references: str) -> None:
        """Those that are there when this returns stay until the end of the block."""
        block.update(references)
        async with self._removing:
            pass

    async def _make_room(self, more: int = 0) -> None:
        """Remove the oldest, so that `more` can be made within the bound.

        Those that are needed Docker refuses to remove; a name it takes away with the image.
        """
        ours: dict[str, dict[str, Any]] = {}
        for label in (_BELOW, _STACK):
            for image in await self._engine.tell(self._engine.api.images, all=True, filters={"label": label}):
                if all(name.startswith(_OUR_NAMES) for name in _names(image)):
                    ours[image["Id"]] = image
        oldest_first = sorted(ours.values(), key=lambda image: image["Created"])
        for image in oldest_first[: max(0, len(ours) + more - self._count_max)]:
            async with self._removing:
                if all(block.isdisjoint((image["Id"], *_names(image))) for block in self._blocks):
                    with contextlib.suppress(*FAILURES):
                        await self._engine.call(self._engine.api.remove_image, image["Id"])

    # -- from a sandbox, and to one --------------------------------------------------------------

    async def commit(self, name: str, spec: SandboxSpec) -> LayerId:
        """What the container of that name wrote.  Docker reads it back, and compares with the digest of what it wrote.

        Docker writes holes out, and a sandbox can make one of exabytes: they count like what was written.
        ResourceExhaustedError.
        """
        tell, api = self._engine.tell, self._engine.api
        found = await tell(api.containers, all=True, size=True, filters={"name": f"^/{name}$"})
        if (size := sum(one.get("SizeRw") or 0 for one in found)) > spec.disk_bytes:
            raise ResourceExhaustedError(
                f"the sandbox's files have {size} bytes, holes included, more than its disk_bytes, {spec.disk_bytes}"
            )
        below = await self._find((await tell(api.inspect_container, name))["Image"])
        labels = {_BELOW: _recipe(spec.base, spec.layers), _BELOW_COUNT: str(len(below.digests))}
        made = LayerId((await tell(api.commit, name, pause=False, conf={"Labels": labels}))["Id"])
        with self._holding():
            for block in self._blocks:
                block.add(made)
            await tell(self._read_back, made)
            await self._make_room()
        return made

    def _read_back(self, image: str) -> None:
        for _ in self._engine.api.get_image(image):
            pass

    @contextlib.asynccontextmanager
    async def image_of(self, spec: SandboxSpec) -> AsyncIterator[str]:
        """The image that is this stack of layers, there until the end of the block.

        NotFoundError, InvalidArgumentError, ResourceExhaustedError.
        """
        if not spec.layers and not spec.base:
            raise InvalidArgumentError('base "" needs a layer that is an operating system')
        with self._holding() as block:
            await self._hold(block, *spec.layers)
            found = [await self._find(check_layer_id(layer)) for layer in spec.layers]
            if found and found[0].below == _recipe(spec.base, spec.layers[1:]):
                yield found[0].id
                return
            if spec.base:
                found.append(await self._find(self._host_image))
            yield found[0].id if len(found) == 1 and found[0].is_bare else await self._stack(found, block)

    async def _stack(self, found: Sequence[_Found], block: set[str]) -> str:
        """An image of these over each other, the topmost first, held by the block; the lowest is taken whole."""
        *above, lowest = found
        digests = [*lowest.digests, *(digest for one in reversed(above) for digest in one.own)]
        name = f"dsec-stack:{hashlib.sha256(' '.join(digests).encode()).hexdigest()[:32]}"
        await self._hold(block, name)
        async with self._stacking:
            if await self._engine.find_image(name) is None:
                await self._make_room(1)
                await self._engine.tell(self._load, name, digests, found)
        return name

    def _load(self, name: str, digests: Sequence[str], found: Sequence[_Found]) -> None:
        """What is in its place already, as in one of `found`, need not be sent: Docker knows it by its digest."""
        there = max(_common(digests, one.digests) for one in found)
        sources = {digest: one.id for one in found for digest in one.own}
        config = {
            **found[-1].platform,
            "created": datetime.now(UTC).isoformat(),  # by which Docker tells which is the oldest
            "config": {"Labels": {_STACK: "1"}},
            "rootfs": {"type": "layers", "diff_ids": digests},
        }
        paths = [f"{index}.tar" for index in range(len(digests))]
        manifest = [{"Config": "config.json", "RepoTags": [name], "Layers": paths}]
        missing: dict[str, dict[str, str]] = {}  # by the image that has them: digests by path
        for path, digest in list(zip(paths, digests, strict=True))[there:]:
            missing.setdefault(sources[digest], {})[path] = digest
        with tempfile.TemporaryFile() as archive:
            with tarfile.open(fileobj=archive, mode="w") as out:
                _add(out, "config.json", json.dumps(config).encode())
                _add(out, "manifest.json", json.dumps(manifest).encode())
                for image, wanted in missing.items():
                    with tempfile.TemporaryFile() as saved:
                        self._copy_layers(image, wanted, saved, out)
            archive.seek(0)
            for _ in self._engine.api.load_image(iter(partial(archive.read, _COPY_BYTES), b"")):
                pass

    def _copy_layers(self, image: str, wanted: dict[str, str], saved: IO[bytes], out: tarfile.TarFile) -> None:
        """Layers, digests by the path to give them, out of what `docker save` writes of an image: all that it has."""
        for piece in self._engine.api.get_image(image, chunk_size=_COPY_BYTES):
            saved.write(piece)
        saved.seek(0)
        with tarfile.open(fileobj=saved) as archive:
            (described,) = json.loads(_read(archive, "manifest.json"))
            digests = json.loads(_read(archive, described["Config"]))["rootfs"]["diff_ids"]
            for path, digest in wanted.items():
                member = archive.getmember(described["Layers"][digests.index(digest)])
                info = tarfile.TarInfo(path)
                info.size = member.size
                out.addfile(info, archive.extractfile(member))

    async def _find(self, reference: str) -> _Found:
        found = await self._engine.find_image(reference)
        if found is None:
            raise NotFoundError(f"Docker has no image {reference}")
        digests = tuple(found["RootFS"].get("Layers") or ())
        labels = found["Config"].get("Labels") or {}
        is_bare = not (found["Config"].get("Volumes") or found["Config"].get("Healthcheck"))
        below, below_count = _below(labels, len(digests)) if is_bare else (None, 0)
        platform = {"architecture": found["Architecture"], "os": found["Os"]}
        run = msgspec.convert(found["Config"], RunConfig)
        return _Found(LayerId(found["Id"]), digests, digests[below_count:], below, is_bare, platform, run)


def _names(image: dict[str, Any]) -> tuple[str, ...]:
    return (*(image["RepoTags"] or ()), *(image["RepoDigests"] or ()))


def _below(labels: dict[str, str], digests_count: int) -> tuple[str | None, int]:
    """What a snapshot was made from, and of how many of its digests that is; nothing of what cannot be our label."""
    below, count = labels.get(_BELOW, ""), labels.get(_BELOW_COUNT, "")
    *layers, lowest = below.split(" ")
    is_recipe = (lowest == _HOST or is_layer_id(lowest)) and all(map(is_layer_id, layers))
    is_ours = is_recipe and _COUNT.fullmatch(count) is not None and int(count) <= digests_count
    return (below, int(count)) if is_ours else (None, 0)


def _recipe(base: str, layers: Sequence[LayerId]) -> str:
    return " ".join((*layers, base)).strip()


def _common(some: Sequence[str], others: Sequence[str]) -> int:
    """How many of the first are the same."""
    count = 0
    while count < min(len(some), len(others)) and some[count] == others[count]:
        count += 1
    return count


def _add(out: tarfile.TarFile, path: str, content: bytes) -> None:
    info = tarfile.TarInfo(path)
    info.size = len(content)
    out.addfile(info, io.BytesIO(content))


def _read(archive: tarfile.TarFile, path: str) -> bytes:
    file: Any = archive.extractfile(path)
    return bytes(file.read())
