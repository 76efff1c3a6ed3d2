"""A crash while layers are made, named or removed leaves whole layers and nothing else."""

import asyncio
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from dsec.edge.images.store import LayerStore
from dsec.errors import ResourceExhaustedError

# Runs the same work in one child after another, each killed at its next system call of a kind that matters.
KILLED_EVERYWHERE = """
import asyncio, os, signal, sys
from pathlib import Path
from dsec.images import Image
from dsec.edge.images.store import LayerStore

directory, source = Path(sys.argv[1]), Path(sys.argv[2])

async def work():
    store = LayerStore(directory)
    await store.open()
    made = await store.add_directory(source)
    await store.tag(Image(name="a", layers=(made,)))
    await store.untag("a")
    await store.remove(made)

def kill_at(count):
    left = count
    def wrap(call):
        def called(*arguments, **options):
            nonlocal left
            left -= 1
            if left < 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*arguments, **options)
        return called
    for name in ("open", "rename", "unlink", "fsync", "write", "pwrite", "ftruncate", "chmod", "mkdir", "utime"):
        setattr(os, name, wrap(getattr(os, name)))

async def look():
    store = LayerStore(directory)
    await store.open()
    layers = store.layers()
    await store.check(layers)
    await store.check(layer for image in store.images().values() for layer in image.layers)
    names = sorted(path.name for path in directory.rglob("*") if path.is_file())
    allowed = {"lock", "a%3Alatest.json"}
    allowed |= {layer[7:] + suffix for layer in layers for suffix in (".erofs", ".json")}
    left = [name for name in names if name not in allowed and not name.endswith(".record")]
    assert not left, left
    return bool(layers), bool(store.images())

seen, count = set(), 0
while True:
    child = os.fork()
    if child == 0:
        kill_at(count)
        asyncio.run(work())
        os._exit(0)
    killed = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    seen.add(asyncio.run(look()))
    if killed == 0:
        break
    assert killed == -signal.SIGKILL, killed
    count += 1
print(count, sorted(seen))
"""

WRITES_AND_WAITS = """
import asyncio, sys
from pathlib import Path
from dsec.edge.images.store import LayerStore

async def main():
    store = LayerStore(Path(sys.argv[1]))
    await store.open()
    asked = False
    def progress(count):
        nonlocal asked
        if count and not asked:
            asked = True
            print("writing", flush=True)
            sys.stdin.readline()
    print(await store.add_directory(Path(sys.argv[2]), progress=progress))

asyncio.run(main())
"""


def writer(directory: Path, source: Path) -> subprocess.Popen[bytes]:
    """A process in the middle of making a layer; it goes on after a line."""
    process = subprocess.Popen(
        [sys.executable, "-c", WRITES_AND_WAITS, directory, source], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdout.readline() == b"writing\n"
    return process


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "source"
    (path / "d").mkdir(parents=True)
    (path / "d" / "f").write_bytes(b"x" * 100_000)
    return path


def test_a_kill_at_any_call_leaves_whole_layers_or_none(tmp_path, source):
    command = [sys.executable, "-c", KILLED_EVERYWHERE, tmp_path / "store", source]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    count, _, seen = done.stdout.partition(" ")
    assert int(count) > 30
    assert seen.strip() == "[(False, False), (True, False), (True, True)]"


async def test_a_dead_writers_file_goes_and_a_living_ones_stays(tmp_path, source):
    store = LayerStore(tmp_path / "store")
    await store.open()
    unfinished = tmp_path / "store" / "tmp"
    with writer(tmp_path / "store", source) as dead:
        dead.send_signal(signal.SIGKILL)
    assert len(list(unfinished.iterdir())) == 2  # the layer, and what waits for its end
    with writer(tmp_path / "store", source) as living:
        assert await store.collect() == []
        assert len(list(unfinished.iterdir())) == 2
        said, _ = await asyncio.to_thread(living.communicate, b"go on\n")
    assert list(store.layers()) == [said.decode().strip()]
    assert list(unfinished.iterdir()) == []


async def test_a_staging_directory_goes_with_its_maker(tmp_path):
    script = (
        "import os, sys; from pathlib import Path; from dsec.edge.images.shelf import Shelf\n"
        "shelf = Shelf(Path(sys.argv[1])); shelf.make()\n"
        "with shelf.staging() as path:\n    (path / 'd').mkdir(); os.kill(os.getpid(), 9)"
    )
    await asyncio.to_thread(subprocess.run, [sys.executable, "-c", script, tmp_path / "store"], check=False)
    unfinished = tmp_path / "store" / "tmp"
    assert [path for path in unfinished.iterdir() if path.is_dir()]
    await LayerStore(tmp_path / "store").open()
    assert list(unfinished.iterdir()) == []


async def test_a_full_disk_is_said_and_leaves_nothing(tmp_path, source):
    store = LayerStore(tmp_path / "store")
    await store.open()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
    try:
        with pytest.raises(ResourceExhaustedError, match="no room"):
            await store.add_directory(source)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list((tmp_path / "store" / "tmp").iterdir()) == []
    await store.add_directory(source)


async def test_two_processes_make_the_same_layer_at_once(tmp_path, source):
    with writer(tmp_path / "store", source) as one, writer(tmp_path / "store", source) as two:
        said = [(await asyncio.to_thread(process.communicate, b"\n"))[0] for process in (one, two)]
    store = LayerStore(tmp_path / "store")
    assert said[0] == said[1]
    assert [f"{layer}\n".encode() for layer in store.layers()] == said[:1]
    await store.check(store.layers())
    assert not list(Path(tmp_path / "store" / "tmp").iterdir())
