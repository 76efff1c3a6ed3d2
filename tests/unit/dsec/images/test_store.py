"""The store keeps what is needed, and lets go of the rest in order."""

import asyncio
import hashlib
import os
import subprocess
import threading

import pytest

from dsec.edge.images import quota
from dsec.edge.images.store import LayerStore
from dsec.edge.images.tree import directory
from dsec.errors import (
    HostUnfitError,
    InvalidArgumentError,
    NotFoundError,
    ResourceExhaustedError,
    StateError,
)
from dsec.images import Image, ImageConfig
from dsec.types import Composition, Defaults, LayerId

NOWHERE = LayerId("sha256:" + "0" * 64)


async def layer(store, source, text, size=0, **options):
    return await store.add_directory(source(text, size), **options)


def unfinished(store, tmp_path):
    return list((tmp_path / "store" / "tmp").iterdir())


async def test_a_layers_name_is_the_digest_of_its_file(store, source, tmp_path):
    made = await layer(store, source, "a")
    assert made == f"sha256:{hashlib.sha256(store.path(made).read_bytes()).hexdigest()}"
    assert store.facts(made).size_bytes == store.path(made).stat().st_size
    assert unfinished(store, tmp_path) == []


async def test_the_same_content_is_one_layer(store, source, tmp_path):
    path = source("a")
    first = await store.add_directory(path)
    assert await store.add_directory(path) == first
    assert list(store.layers()) == [first]


async def test_a_directory_can_lie_anywhere_in_a_layer(store, source, mounted):
    made = await layer(store, source, "a", at="/work/space")
    assert (mounted(store.path(made)) / "work/space/file").read_text() == "a"


@pytest.mark.parametrize("name", ["", "sha256:", "sha256:" + "g" * 64, "../x", "sha256:../" + "0" * 61])
async def test_what_is_no_id_reaches_no_file(store, name):
    with pytest.raises(InvalidArgumentError, match="no layer id"):
        store.path(LayerId(name))


async def test_a_layer_that_is_not_there_is_not_found(store):
    for call in (store.path, store.facts, store.resolve, lambda name: store.acquire([name])):
        with pytest.raises(NotFoundError):
            call(NOWHERE)
    with pytest.raises(NotFoundError):
        await store.remove(NOWHERE)


async def test_a_compressed_layer_holds_the_same_in_less(store, source, tmp_path, mounted, show):
    path = source("a")
    (path / "text").write_text("the same again and again " * 20_000)
    plain, small = await store.add_directory(path), await store.add_directory(path, compressed=True)
    assert store.facts(small).size_bytes < store.facts(plain).size_bytes / 3
    assert show(mounted(store.path(small))) == show(mounted(store.path(plain))) == show(path)
    assert unfinished(store, tmp_path) == []


# -- holding -------------------------------------------------------------------------------------


async def test_a_held_layer_stays_until_the_last_release(store, source):
    made = await layer(store, source, "a")
    store.acquire([made, made])
    store.release([made])
    assert await store.collect() == []
    with pytest.raises(StateError, match="uses it"):
        await store.remove(made)
    assert os.fstat(store.descriptor(made)).st_size == store.facts(made).size_bytes
    store.release([made])
    assert await store.collect() == [made]


async def test_what_is_made_or_chosen_in_a_block_stays_until_its_end(store, source):
    old = await layer(store, source, "old")
    with store.holding() as hold, store.holding() as hold_other:
        made = await layer(store, source, "made")
        await hold([old])
        assert await store.collect() == []
        for hold_one in (hold, hold_other):
            with pytest.raises(NotFoundError):
                await hold_one([old, NOWHERE])
        assert await store.collect() == []
    assert set(await store.collect()) == {old, made}


async def test_a_layer_that_was_just_made_is_held_before_its_maker_hears_of_it(store, source, monkeypatch):
    """Another process makes room right after the name appears."""
    put = store.shelf.put

    def put_and_crowd(*arguments):
        put(*arguments)
        crowd.start()

    other = LayerStore(store.shelf._directory)
    crowd = threading.Thread(target=lambda: asyncio.run(other.collect()))
    monkeypatch.setattr(store.shelf, "put", put_and_crowd)
    with store.holding():
        made = await layer(store, source, "made")
        crowd.join()
        assert list(store.layers()) == [made]


async def test_layers_are_held_all_or_none(store, source):
    made = await layer(store, source, "a")
    with pytest.raises(NotFoundError):
        store.acquire([made, NOWHERE])
    assert await store.collect() == [made]


async def test_another_process_cannot_remove_what_is_held_here(store, source, tmp_path):
    made = await layer(store, source, "a")
    store.acquire([made])
    other = LayerStore(tmp_path / "store")
    await other.open()
    assert await other.collect() == []
    copy = os.dup(store.descriptor(made))
    store.close()
    assert await other.collect() == []  # a copy of the descriptor, in whichever process, holds it
    os.close(copy)
    assert await other.collect() == [made]


# -- names ---------------------------------------------------------------------------------------


async def test_images_are_found_by_name_and_lose_it(store, source):
    made = await layer(store, source, "a")
    named = await store.tag(Image(name="team/tools", layers=(made,)))
    assert store.image("team/tools:latest") == store.resolve("team/tools") == named
    assert await store.collect() == []
    with pytest.raises(StateError, match="team/tools:latest"):
        await store.remove(made)
    await store.untag("team/tools")
    with pytest.raises(NotFoundError):
        store.image("team/tools")
    with pytest.raises(NotFoundError):
        await store.untag("team/tools")
    await store.remove(made)


@pytest.mark.parametrize("name", ["", "../x", "A", "a b", "a:b:c", "a/../b", "-a", "x" * 300, NOWHERE, "a\n"])
async def test_a_name_that_is_none_is_refused(store, source, name):
    made = await layer(store, source, "a")
    with pytest.raises(InvalidArgumentError, match="no image name"):
        await store.tag(Image(name=name, layers=(made,)))


async def test_an_image_of_missing_layers_gets_no_name(store):
    with pytest.raises(NotFoundError):
        await store.tag(Image(name="a", layers=(NOWHERE,)))
    assert store.images() == {}


async def test_images_lie_over_each_other(store, source):
    base, tools = await layer(store, source, "base"), await layer(store, source, "tools")
    config = ImageConfig(env={"PATH": "/bin", "A": "1"}, command=("sh",), workdir="/w")
    await store.tag(Image(name="base", layers=(base,), config=config))
    await store.tag(Image(name="tools", layers=(tools,), config=ImageConfig(env={"A": "2"}, user="7")))
    both = store.compose("both", ["tools", "base", base])
    assert both.layers == (tools, base)
    assert both.config == ImageConfig(env={"PATH": "/bin", "A": "2"}, command=("sh",), workdir="/w", user="7")


async def test_an_image_is_looked_up_alone(store, source, tmp_path):
    made = await layer(store, source, "a")
    await store.tag(Image(name="a", layers=(made,), config=ImageConfig(user="7")))
    os.mkfifo(tmp_path / "store/images/slow%3Alatest.json")  # whoever reads this one waits for ever
    assert await store.composed([made, "a"]) == Composition(layers=(made,), defaults=Defaults(user="7"))
    for name in ("b", "a/" * 90 + "a"):
        with pytest.raises(NotFoundError):
            await store.composed([name])


async def test_what_lies_over_something_is_over_what_that_lies_over(store, source):
    low, top = await layer(store, source, "low"), await layer(store, source, "top")
    await store.tag(Image(name="low", layers=(low,), base="host"))
    await store.tag(store.compose("both", [top, "low"]))
    assert await store.composed(["both"]) == Composition(layers=(top, low), base="host")
    assert (await store.composed(["low", top])).base == ""


async def test_a_snapshot_stands_for_what_it_was_made_over(store, source):
    base = await layer(store, source, "base")
    diff = await store.pack(source("diff"), 0, parents=(base,))
    assert store.resolve(diff).layers == (diff, base)
    with pytest.raises(StateError, match="made over it"):
        await store.remove(base)


async def test_a_record_that_cannot_be_read_is_no_layer_and_no_image(store, source, tmp_path):
    made = await layer(store, source, "a")
    await store.tag(Image(name="a", layers=(made,)))
    (tmp_path / "store/images/bad.json").write_text("{")
    (store.path(made).parent / "bad.json").write_text("{")
    assert list(store.images()) == ["a:latest"]
    assert list(store.layers()) == [made]


# -- room ----------------------------------------------------------------------------------------


async def test_the_layer_that_was_used_longest_ago_goes_first(tmp_path, source):
    store = LayerStore(tmp_path / "store", 3_500_000)
    await store.open()
    one, two, three = [await layer(store, source, text, 1_000_000) for text in "123"]
    os.utime(store.path(two).with_suffix(".json"), (1, 1))
    store.acquire([one])
    store.release([one])
    four = await layer(store, source, "4", 1_000_000)
    assert set(store.layers()) == {one, three, four}
    assert store.shelf.used_bytes() <= 3_500_000


async def test_what_is_needed_is_not_evicted_even_if_nothing_new_fits(tmp_path, source):
    store = LayerStore(tmp_path / "store", 3_500_000)
    await store.open()
    held, named, parent = [await layer(store, source, text, 1_000_000) for text in "123"]
    store.acquire([held])
    await store.tag(Image(name="a", layers=(named,)))
    with pytest.raises(ResourceExhaustedError, match="must stay"):
        await store.add_directory(source("4", 1_500_000), parents=(parent,))
    assert set(store.layers()) == {held, named, parent}
    assert unfinished(store, tmp_path) == []
    store.close()


async def test_a_parent_goes_after_its_children(store, source):
    base = await layer(store, source, "base")
    middle = await store.pack(source("middle"), 0, parents=(base,))
    top = await store.pack(source("top"), 0, parents=(middle, base))
    assert await store.collect() == [top, middle, base]


async def test_a_layer_beyond_the_quota_stops_while_it_is_written(tmp_path, source, monkeypatch):
    monkeypatch.setattr(quota, "CHECK_BYTES", 1 << 20)
    store = LayerStore(tmp_path / "store", 2 << 20)
    await store.open()
    written = []
    with pytest.raises(ResourceExhaustedError):
        await store.add_directory(source("a", 64 << 20), progress=written.append)
    assert sum(written) < 8 << 20
    assert unfinished(store, tmp_path) == []


@pytest.fixture
def disk(tmp_path):
    """A small disk of its own."""
    path = tmp_path / "disk"
    path.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "none", path], check=True)
    yield path
    subprocess.run(["umount", path], check=True)


async def test_nothing_is_written_that_leaves_too_little_of_the_disk(disk, source, monkeypatch):
    monkeypatch.setattr(quota, "CHECK_BYTES", 1 << 20)
    store = LayerStore(disk / "store", disk_free_bytes_min=1 << 40)  # a twentieth, then
    await store.open()
    with store.incoming() as (append, path), pytest.raises(ResourceExhaustedError, match="disk_free_bytes_min"):
        append(bytes(62 << 20))
    with pytest.raises(ResourceExhaustedError, match="disk_free_bytes_min"):
        await store.add_directory(source("a", 63 << 20))
    assert not path.exists()
    assert store.shelf.used_bytes() == 0


# -- ends ----------------------------------------------------------------------------------------


async def test_cancelling_waits_until_the_source_is_no_longer_read(store, source, tmp_path):
    reading, go = threading.Event(), threading.Event()

    def read(writer):
        reading.set()
        go.wait()
        raise AssertionError("stopped elsewhere")

    task = asyncio.create_task(store.add(read, made_from="test"))
    await asyncio.to_thread(reading.wait)
    task.cancel()
    done, _ = await asyncio.wait([task], timeout=0)
    assert not done
    go.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert unfinished(store, tmp_path) == []


async def test_a_cancelled_build_stops_at_its_next_step(store, source, tmp_path):
    steps, stepped = [], threading.Event()

    def progress(count):
        steps.append(count)
        stepped.set()

    task = asyncio.create_task(store.add_directory(source("a", 32 << 20), progress=progress))
    await asyncio.to_thread(stepped.wait)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert store.layers() == {}
    assert unfinished(store, tmp_path) == []


async def test_an_image_that_is_not_what_was_meant_gets_no_name(store, tmp_path):
    def lie(writer):
        root = directory()
        written = writer.finish(root)
        writer.finish = lambda _: written
        root.children[b"a"] = directory()
        return root

    with pytest.raises(HostUnfitError, match="differs"):
        await store.add(lie, made_from="test")
    assert store.layers() == {}
    assert unfinished(store, tmp_path) == []


async def test_a_changed_layer_is_found(store, source):
    made = await layer(store, source, "a", 5000)
    await store.check([made])
    store.path(made).chmod(0o600)
    with store.path(made).open("r+b") as file:
        file.seek(5000)
        file.write(b"?")
    with pytest.raises(HostUnfitError, match="was changed"):
        await store.check([made])


async def test_a_place_that_is_none_is_said(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(HostUnfitError, match="does not work"):
        await LayerStore(tmp_path / "file" / "store").open()


async def test_only_root_looks_into_a_store(store, tmp_path):
    assert (tmp_path / "store").stat().st_mode & 0o777 == 0o700
