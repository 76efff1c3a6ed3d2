"""Container images on the disk: an OCI image layout or what `docker save` wrote, as a directory or a tar.

Layers are read where they lie.  Every digest that the image states is checked: of manifests,
configuration and compressed layers before they are used, of unpacked layers (`diff_id`) before they get
a name.

See: docs/formats/layers.md, "Images"; the OCI image specification (image-layout.md, manifest.md, config.md).
"""

from __future__ import annotations

import contextlib
import functools
import os
import platform
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import msgspec

from dsec.archive import FILE, LINK, Stream, members, parts
from dsec.edge.images.quota import Incoming
from dsec.edge.images.streams import Section, unpacked
from dsec.errors import InvalidArgumentError, NotFoundError
from dsec.images import ImageConfig

DOCUMENT_BYTES_MAX = 8 << 20
LAYERS_COUNT_MAX = 64
_INDEXES_DEEP_MAX = 4
_FILES_COUNT_MAX = 10_000
_PATH_BYTES_MAX = 1024
_ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64"}
_REFERENCE = "org.opencontainers.image.ref.name"
_INDEX_KINDS = {
    "application/vnd.oci.image.index.v1+json",
    "application/vnd.docker.distribution.manifest.list.v2+json",
}
T = TypeVar("T")


class _Platform(msgspec.Struct, frozen=True):
    architecture: str = ""
    os: str = ""


class _Descriptor(msgspec.Struct, frozen=True, rename="camel"):
    digest: str
    size: int = -1
    media_type: str = ""
    platform: _Platform | None = None
    annotations: dict[str, str] | None = None


class _Index(msgspec.Struct, frozen=True):
    manifests: list[_Descriptor]


class _Manifest(msgspec.Struct, frozen=True):
    config: _Descriptor
    layers: list[_Descriptor]


class RunConfig(msgspec.Struct, frozen=True, rename="pascal"):
    """What an image's configuration says of its commands."""

    env: list[str] | None = None
    working_dir: str | None = None
    user: str | None = None
    entrypoint: list[str] | None = None
    cmd: list[str] | None = None

    def config(self) -> ImageConfig:
        """The same as stores of layers keep it."""
        return ImageConfig(
            env=dict(line.split("=", 1) for line in self.env or () if "=" in line),
            workdir=self.working_dir or "/",
            user=self.user or "",
            entrypoint=tuple(self.entrypoint or ()),
            command=tuple(self.cmd or ()),
        )


class _RootFs(msgspec.Struct, frozen=True):
    diff_ids: list[str]


class _Config(msgspec.Struct, frozen=True):
    rootfs: _RootFs
    config: RunConfig | None = None


class _Saved(msgspec.Struct, frozen=True, rename="pascal"):
    config: str
    layers: list[str]
    repo_tags: list[str] | None = None


class Blob(msgspec.Struct, frozen=True):
    """A layer of an image: its tar, compressed or not, and the sha256 of the tar (`diff_id`)."""

    section: Callable[[], Section]
    diff_id: str


class FoundImage(msgspec.Struct, frozen=True):
    """An image in a layout: its layers, the lowest first, and the name it has there, if any."""

    layers: list[Blob]
    config: ImageConfig
    name: str


class _Layout:
    """The files of a layout by path: in a directory, or stretches of one tar file."""

    def __init__(
        self, root: Path, stack: contextlib.ExitStack, bytes_max: int, incoming: Callable[[], Incoming], name: str
    ) -> None:
        self._root = root
        self._name = name
        self._incoming = incoming
        self._stack = stack
        self._stretches: dict[bytes, tuple[int, int]] | None = None
        self._links: dict[bytes, bytes] = {}
        self._fd = -1
        if not root.is_dir():
            self._index(bytes_max)

    def _index(self, bytes_max: int) -> None:
        self._fd = _open(self._root)
        self._stack.callback(os.close, self._fd)
        with unpacked(Section(self._fd, 0, os.fstat(self._fd).st_size), bytes_max) as stream:
            if stream.is_packed:
                self._unpack(stream)
        self._stretches = {}
        size = os.fstat(self._fd).st_size
        whole = Section(self._fd, 0, size)
        for member in members(Stream(whole.read, size, skip=whole.skip)):
            name = b"/".join(parts(member.path))
            if len(name) + len(member.target) > _PATH_BYTES_MAX:
                raise InvalidArgumentError(
                    f"{self._name} has {member.name!r:.200}, too long a name for an image layout"
                )
            if member.kind == FILE:
                self._stretches[name] = (member.offset, member.size)
            elif member.kind == LINK:
                self._links[name] = os.path.normpath(os.path.join(os.path.dirname(name), member.target))
            if len(self._stretches) + len(self._links) > _FILES_COUNT_MAX:
                raise InvalidArgumentError(f"{self._name} holds more than {_FILES_COUNT_MAX} files: no image layout")

    def _unpack(self, stream: Stream) -> None:
        """A layout that is compressed as a whole is read from a copy that is not."""
        append, path = self._stack.enter_context(self._incoming())
        while block := stream.take(1 << 20):
            append(block)
        self._fd = _open(path)
        self._stack.callback(os.close, self._fd)

    def section(self, name: str) -> Section:
        """A file of the layout.  NotFoundError; InvalidArgumentError for a path that leads out."""
        path = b"/".join(parts(os.fsencode(name)))
        if self._stretches is None:
            place = (self._root / os.fsdecode(path)).resolve()
            if not place.is_relative_to(self._root.resolve()):
                raise InvalidArgumentError(f"{name!r:.200} leads out of {self._name}")
            fd = _open(place)
            self._stack.callback(os.close, fd)
            return Section(fd, 0, os.fstat(fd).st_size)
        stretch = self._stretches.get(self._links.get(path, path))
        if stretch is None:
            raise NotFoundError(f"{self._name} has no {name!r:.200}")
        return Section(self._fd, *stretch)

    def has(self, name: str) -> bool:
        """True if there is such a file."""
        try:
            self.section(name)
        except NotFoundError:
            return False
        return True

    def document(self, section: Section, kind: type[T]) -> T:
        """A JSON file.  InvalidArgumentError unless it is one of that kind."""
        data = Stream(section.read, 1 << 62).take(DOCUMENT_BYTES_MAX + 1)
        if len(data) > DOCUMENT_BYTES_MAX:
            raise InvalidArgumentError(f"a document of more than {DOCUMENT_BYTES_MAX} bytes in {self._name}")
        try:
            return msgspec.json.decode(data, type=kind)
        except (msgspec.DecodeError, UnicodeError) as error:
            raise InvalidArgumentError(f"a document of {self._name} is not what it should be: {error}") from error

    def blob(self, descriptor: _Descriptor) -> Callable[[], Section]:
        """The checked content of a descriptor, as often as it is wanted."""
        algorithm, _, expected = descriptor.digest.partition(":")
        if algorithm not in {"sha256", "sha512"} or not expected.isalnum():
            raise InvalidArgumentError(f"a digest of an unknown kind: {descriptor.digest!r:.100}")
        path = f"blobs/{algorithm}/{expected}"
        if self.section(path).digest(algorithm) != expected:
            raise InvalidArgumentError(f"{path} of {self._name} does not have that digest")
        return lambda: self.section(path)


@contextlib.contextmanager
def open_image(
    path: Path, reference: str, bytes_max: int, incoming: Callable[[], Incoming], name: str = ""
) -> Iterator[FoundImage]:
    """The image at `path`, in errors called `name`; `reference` says which, where there are several.

    `incoming` takes the copy of one that is compressed as a whole (`LayerStore.incoming`).

    NotFoundError, InvalidArgumentError, ResourceExhaustedError (more than `bytes_max`, or no room, for it).
    """
    with contextlib.ExitStack() as stack:
        layout = _Layout(path, stack, bytes_max, incoming, name or str(path))
        if layout.has("manifest.json"):
            yield _saved_image(layout, reference)
        elif layout.has("index.json"):
            yield _oci_image(layout, reference)
        else:
            raise InvalidArgumentError(f"{name or path} has neither index.json nor manifest.json: no image")


def _saved_image(layout: _Layout, reference: str) -> FoundImage:
    saved = layout.document(layout.section("manifest.json"), list[_Saved])
    wanted = [image for image in saved if not reference or reference in (image.repo_tags or ())]
    names = ", ".join(tag for image in saved for tag in image.repo_tags or ())
    image = _only(wanted, names)
    section = layout.section(image.config)
    digest = Path(image.config).name.removesuffix(".json")
    if len(digest) == 64 and section.digest("sha256") != digest:
        raise InvalidArgumentError(f"{image.config!r:.200} does not have that digest")
    config = layout.document(layout.section(image.config), _Config)
    sections: list[Callable[[], Section]] = [functools.partial(layout.section, name) for name in image.layers]
    return _found(sections, config, reference or next(iter(image.repo_tags or ()), ""))


def _oci_image(layout: _Layout, reference: str) -> FoundImage:
    candidates = layout.document(layout.section("index.json"), _Index).manifests
    names = ", ".join(_name(candidate) for candidate in candidates)
    chosen = _only([one for one in candidates if not reference or _name(one) == reference], names)
    name = reference or _name(chosen)
    for _ in range(_INDEXES_DEEP_MAX):
        section = layout.blob(chosen)()
        if chosen.media_type not in _INDEX_KINDS:
            manifest = layout.document(section, _Manifest)
            config = layout.document(layout.blob(manifest.config)(), _Config)
            return _found([layout.blob(layer) for layer in manifest.layers], config, name)
        candidates = layout.document(section, _Index).manifests
        chosen = _only([one for one in candidates if _runs_here(one)], "none for this host's architecture")
    raise InvalidArgumentError("an index of indexes of indexes")


def _only(candidates: list[T], names: str) -> T:
    if len(candidates) != 1:
        what = "no such image" if not candidates else "several images: say which"
        raise InvalidArgumentError(f"{what} ({names:.500})")
    return candidates[0]


def _name(descriptor: _Descriptor) -> str:
    annotations = descriptor.annotations or {}
    return annotations.get("io.containerd.image.name") or annotations.get(_REFERENCE, "")


def _runs_here(descriptor: _Descriptor) -> bool:
    here = _Platform(_ARCHITECTURES.get(platform.machine(), platform.machine()), "linux")
    return descriptor.platform is None or descriptor.platform == here


def _found(sections: list[Callable[[], Section]], config: _Config, name: str) -> FoundImage:
    diff_ids = config.rootfs.diff_ids
    if len(diff_ids) != len(sections) or not 0 < len(sections) <= LAYERS_COUNT_MAX:
        raise InvalidArgumentError(f"an image of {len(sections)} layers and {len(diff_ids)} digests")
    blobs = [Blob(section, diff_id) for section, diff_id in zip(sections, diff_ids, strict=True)]
    return FoundImage(blobs, (config.config or RunConfig()).config(), name)


def _open(path: Path) -> int:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise NotFoundError(f"there is no {path}") from error
    except OSError as error:
        raise InvalidArgumentError(f"{path}: {error.strerror}") from error
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise NotFoundError(f"{path} is no file")
    return fd
