"""A store on a mount that many hosts read: used where it lies, never touched, filled whole or not at all."""

import pytest

from dsec.edge.images.store import LayerStore
from dsec.errors import HostUnfitError, NotFoundError, StateError
from dsec.images import Image


@pytest.fixture
async def shared(tmp_path, source):
    """A store of another host that shares its directory, with one image."""
    made = LayerStore(tmp_path / "shared")
    await made.open()
    await made.tag(Image(name="base", layers=(await made.add_directory(source("base", 5000)),)))
    return made


async def test_shared_layers_are_used_where_they_lie_and_never_touched(shared, tmp_path, source):
    host = LayerStore(tmp_path / "host", 1 << 20, shared=tmp_path / "shared")
    await host.open()
    (base,) = host.image("base").layers
    assert host.path(base) == shared.path(base)
    before = sorted((path, path.stat().st_mtime_ns) for path in (tmp_path / "shared").rglob("*"))
    host.acquire([base])
    top = await host.pack(source("top"), 0, parents=(base,))
    assert host.resolve(top).layers == (top, base)
    assert host.shelf.used_bytes() < 1 << 20
    assert await host.collect() == [top]
    with pytest.raises(NotFoundError):
        await host.remove(base)
    host.close()
    assert sorted((path, path.stat().st_mtime_ns) for path in (tmp_path / "shared").rglob("*")) == before


async def test_what_is_published_is_there_for_every_host(shared, tmp_path, source):
    one, two = (LayerStore(tmp_path / name, shared=tmp_path / "shared") for name in ("one", "two"))
    await one.open()
    await two.open()
    made = await one.add_directory(source("mine", 5000))
    await one.publish(await one.tag(Image(name="mine", layers=(made,))))
    await one.publish(one.resolve(made))
    await one.untag("mine")
    await one.remove(made)
    assert one.image("mine") == two.image("mine")
    await two.check([made])
    assert list((tmp_path / "shared" / "tmp").iterdir()) == []


async def test_there_must_be_a_place_to_publish_to(store, source):
    with pytest.raises(StateError, match="no shared directory"):
        await store.publish(store.resolve(await store.add_directory(source("a"))))


async def test_a_damaged_layer_is_not_published(shared, tmp_path, source):
    host = LayerStore(tmp_path / "host", shared=tmp_path / "shared")
    await host.open()
    made = await host.add_directory(source("mine", 5000))
    host.path(made).chmod(0o600)
    host.path(made).write_bytes(b"x" * 5000)
    with pytest.raises(HostUnfitError, match="did not arrive"):
        await host.publish(host.resolve(made))
    assert made not in shared.layers()
    assert list((tmp_path / "shared" / "tmp").iterdir()) == []
