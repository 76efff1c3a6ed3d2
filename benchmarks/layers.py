"""What layers cost: making one, mounting it, starting from it cold, and one image against many.

    python benchmarks/layers.py [--quick] [--json]

The image is this host's programs, libraries and documentation as one layer, made from a tar as `dsec image
import` does; a snapshot of 50 MiB is the other way to make one.  Baselines: `tar -x` and mkfs.erofs for
making, a loop device for mounting, reading the whole file for starting.  Cold is: unmounted, and out of the
page cache; bytes read at start are what of the file is in the page cache afterwards.  Needs root.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from contenders import Figures, Result, Value, rate, render, split

from dsec.archive import Stream
from dsec.edge.config import SubstrateConfig
from dsec.edge.images.archive import read_archive
from dsec.edge.images.erofs import ImageWriter
from dsec.edge.images.store import LayerStore
from dsec.edge.images.tree import Node
from dsec.edge.linux.mounts import mount_image
from dsec.edge.substrates.container import ContainerSubstrate
from dsec.types import Command, LayerId, SandboxSpec

MIB = 1 << 20
ENV = {"PATH": "/usr/bin"}
TRUE = Command(argv=("/usr/bin/true",), env=ENV)
PYTHON = Command(argv=("/usr/bin/python3", "-c", "import asyncio, json, sqlite3"), env=ENV, timeout_s=60)
LINKS = ("bin", "lib", "lib64", "sbin")
LARGE = ("usr/lib64", "usr/bin", "usr/sbin", "usr/lib/python3*", "usr/lib/*-linux-gnu*", "usr/share/doc")
QUICK = (
    "usr/lib64",
    "usr/bin/true",
    "usr/bin/python3*",
    "usr/lib/python3*",
    "usr/lib/*-linux-gnu/l[di]*.so*",
    "usr/share/doc",
)
SMALL = ("usr/bin/true", "usr/bin/bash", "usr/lib/*-linux-gnu/libc.so*", "usr/lib/*-linux-gnu/ld-*", "usr/lib64")
UPPER_MIB = 50
WRITE = f"for i in $(seq {UPPER_MIB}); do head -c 1M /dev/urandom > /srv/$i; done"
IN_FLIGHT = 8


def tar_command(patterns: Sequence[str]) -> list[str]:
    """A program that writes a root of these files of the host."""
    found = sorted({str(path.relative_to("/")) for pattern in patterns for path in Path("/").glob(pattern)})
    links = [name for name in LINKS if Path("/", name).is_symlink()]
    return ["tar", "-c", "--ignore-failed-read", "-C", "/", "--", *links, *found]


async def add(store: LayerStore, patterns: Sequence[str], mark: str = "") -> LayerId:
    """A layer of these files, and a mark that makes it another one."""

    def read(writer: ImageWriter) -> Node:
        with subprocess.Popen(tar_command(patterns), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as tar:
            assert tar.stdout is not None
            root = read_archive(Stream(tar.stdout.read, 1 << 40), writer, is_lowest=True)
        for name in ("proc", "dev", "srv", "tmp", "sys", "run", f"mark{mark}"):
            root.children[name.encode()] = Node(0o040755)
        return root

    return await store.add(read, made_from=f"benchmark {mark}")


def cached_bytes(path: Path) -> int:
    """What of a file is in the page cache."""
    listed = subprocess.run(["fincore", "-bnr", "-o", "RES", path], capture_output=True, text=True, check=True)
    return int(listed.stdout)


def timed(work: Callable[[], object]) -> float:
    """Seconds."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def make_by_hand(patterns: Sequence[str]) -> dict[str, Value]:
    """Unpack and mkfs.erofs, as one would without us."""
    with tempfile.TemporaryDirectory(prefix="dsec-layers-") as place:
        archive = " ".join(map(_quoted, tar_command(patterns)))
        unpacking = timed(
            lambda: subprocess.run(["sh", "-c", f"{archive} 2>/dev/null | tar -x -C {place}"], check=True)
        )
        image = f"{place}.erofs"
        making = timed(lambda: subprocess.run(["mkfs.erofs", "--quiet", image, place], check=True, capture_output=True))
        size = os.stat(image).st_size
        os.unlink(image)
        return {"make_layer_s": unpacking + making, "layer_mib": size / MIB}


def _quoted(word: str) -> str:
    return "'" + word.replace("'", "'\\''") + "'"


def mounting(path: Path, count: int, figures: Figures) -> None:
    """Mount and unmount, in turns with a loop device."""
    fd = os.open(path, os.O_RDONLY)
    with tempfile.TemporaryDirectory(prefix="dsec-layers-") as place:
        for _ in range(count):
            figures.add("dsec", "mount", timed(lambda: os.close(mount_image(fd))))
            loop = ["mount", "-t", "erofs", "-o", "ro,loop", path, place]
            figures.add("loop device", "mount", timed(lambda: subprocess.run(loop, check=True)))  # noqa: B023
            subprocess.run(["umount", place], check=True)
    os.close(fd)


class Host:
    """A store, and a substrate that is another one after every `make_cold`."""

    def __init__(self, directory: Path, count: int) -> None:
        self.store = LayerStore(directory / "layers")
        self._config = SubstrateConfig(sandboxes_count_max=count + 16)
        self.substrate = ContainerSubstrate(self._config, layers=self.store)

    async def open(self) -> None:
        """Start."""
        await self.store.open()
        await self.substrate.open()

    async def close(self) -> None:
        """Destroy all."""
        await self.substrate.close()
        self.store.close()

    async def make_cold(self, paths: Sequence[Path]) -> None:
        """Out with these layers: unmounted, and out of the page cache."""
        await self.substrate.close()
        for path in paths:
            fd = os.open(path, os.O_RDONLY)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(fd)
        self.substrate = ContainerSubstrate(self._config, layers=self.store)
        await self.substrate.open()

    async def start(self, layer: LayerId, *commands: Command) -> list[float]:
        """Seconds to a sandbox that ran each of the commands, one after the other; it is gone afterwards."""
        started = time.perf_counter()
        sandbox = await self.substrate.create(SandboxSpec(base="", layers=(layer,)))
        passed = []
        for command in commands:
            result = await sandbox.exec(command)
            assert result.exit_code == 0, result
            passed.append(time.perf_counter() - started)
        await sandbox.destroy()
        return passed


async def starting(host: Host, layer: LayerId, count: int, figures: Figures) -> dict[str, Value]:
    """A first command, cold and warm, and how much of the file that took."""
    path = host.store.path(layer)
    size = path.stat().st_size
    read: dict[str, Value] = {}
    for _ in range(count):
        for name, commands in (("true", (TRUE,)), ("python", (PYTHON,))):
            await host.make_cold([path])
            figures.add("dsec", f"start_{name}_cold", (await host.start(layer, *commands))[-1])
            cached = cached_bytes(path)
            read[f"mib_read_at_{name}"] = cached / MIB
            read[f"percent_read_at_{name}"] = 100 * cached / size
            figures.add("dsec", f"start_{name}_warm", (await host.start(layer, *commands))[-1])
        await host.make_cold([path])
        figures.add("reading the whole file", "start_true_cold", timed(path.read_bytes))
    return read


async def one_against_many(host: Host, count: int) -> dict[str, Value]:
    """`count` sandboxes of one image, and of as many images with the same in them."""
    layers = [await add(host.store, SMALL, f"-{number}") for number in range(count)]
    paths = [host.store.path(layer) for layer in layers]
    figures: dict[str, Value] = {"small_image_mib": paths[0].stat().st_size / MIB}
    for name, chosen in (("one", layers[:1] * count), ("many", layers)):
        await host.make_cold(paths)
        figures[f"starts_per_s_of_{name}"] = await rate(count, IN_FLIGHT, lambda n: host.start(chosen[n], TRUE))  # noqa: B023
        figures[f"page_cache_mib_of_{name}"] = sum(map(cached_bytes, paths)) / MIB
    return figures


async def snapshotting(host: Host, count: int, figures: Figures) -> None:
    """A sandbox that wrote 50 MiB becomes a layer."""
    sandbox = await host.substrate.create(SandboxSpec())
    await sandbox.exec(Command(argv=("/bin/bash", "-c", WRITE), env=ENV, timeout_s=60))
    for _ in range(count):
        await figures.time("dsec", f"snapshot_of_{UPPER_MIB}_mib", sandbox.snapshot())
        await host.store.collect()
    await sandbox.destroy()


async def measure(directory: Path, *, quick: bool) -> Result:
    """Everything."""
    patterns, turns, count = (QUICK, 5, 20) if quick else (LARGE, 20, 100)
    figures = Figures()
    host = Host(directory, count)
    await host.open()
    try:
        started = time.perf_counter()
        layer = await add(host.store, patterns)
        values: dict[str, Value] = {"make_layer_s": time.perf_counter() - started}
        facts = host.store.facts(layer)
        values |= {"layer_mib": facts.size_bytes / MIB, "layer_entries": float(facts.entries_count)}
        host.store.acquire([layer])
        baselines: dict[str, dict[str, Value]] = {}
        if shutil.which("mkfs.erofs"):
            baselines["tar -x, mkfs.erofs"] = make_by_hand(patterns)
        mounting(host.store.path(layer), turns * 5, figures)
        values |= await starting(host, layer, turns, figures)
        await snapshotting(host, turns, figures)
        values |= await one_against_many(host, count)
    finally:
        await host.close()
    ours, others = split(figures.summary())
    for name, theirs in others.items():
        baselines.setdefault(name, {}).update(theirs)
    ratios = {}
    if "tar -x, mkfs.erofs" in baselines:
        by_hand = baselines["tar -x, mkfs.erofs"]["make_layer_s"]
        assert isinstance(by_hand, float)
        ratios["make_layer_vs_tar_and_mkfs"] = by_hand / float(values["make_layer_s"])  # type: ignore[arg-type]
    return {
        "figures": values | ours,
        "baselines": baselines,
        "ratios": ratios,
        "facts": {"image": " ".join(patterns), "images": str(count)},
    }


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(
        description="What layers cost.",
        epilog="example: python benchmarks/layers.py --quick --json | python -m json.tool",
    )
    parser.add_argument("--quick", action="store_true", help="under a minute")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="dsec-layers-") as place:
        result = asyncio.run(measure(Path(place), quick=arguments.quick))
    if arguments.json:
        print(json.dumps(result, indent=2))
    else:
        render("layers", result)


if __name__ == "__main__":
    main()
