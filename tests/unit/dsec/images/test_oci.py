"""Images come in four shapes, and every digest in them is checked."""

import gzip
import hashlib
import json
import platform
import shutil
import subprocess
import tarfile

import pytest

from dsec.edge.images import oci
from dsec.edge.images.importer import import_image
from dsec.edge.images.oci import open_image
from dsec.edge.images.store import LayerStore
from dsec.errors import InvalidArgumentError, NotFoundError, ResourceExhaustedError
from dsec.views import ImportOptions

MANIFEST = "application/vnd.oci.image.manifest.v1+json"
INDEX = "application/vnd.oci.image.index.v1+json"
HERE = {"x86_64": "amd64", "aarch64": "arm64"}[platform.machine()]


def nowhere():
    raise AssertionError("nothing is copied")


def sha256(data):
    return hashlib.sha256(data).hexdigest()


class Layout:
    """An image on the disk, in any of the shapes."""

    def __init__(self, root, tars, pack=lambda data: data):
        self.root = root
        self.tars = tars
        self.blobs = root / "blobs" / "sha256"
        self.blobs.mkdir(parents=True)
        self.layers = [pack(data) for data in tars]
        config = {
            "architecture": HERE, "os": "linux",
            "config": {"Env": ["PATH=/bin", "A=b=c"], "Cmd": ["sh"], "WorkingDir": "/w", "User": "7"},
            "rootfs": {"type": "layers", "diff_ids": [f"sha256:{sha256(data)}" for data in tars]},
        }  # fmt: skip
        self.config = json.dumps(config).encode()

    def put(self, data, kind=""):
        (self.blobs / sha256(data)).write_bytes(data)
        return {"digest": f"sha256:{sha256(data)}", "size": len(data), "mediaType": kind}

    def manifest(self):
        made = {"config": self.put(self.config), "layers": [self.put(layer) for layer in self.layers]}
        return self.put(json.dumps(made).encode(), MANIFEST)

    def oci(self, *others, name="example.com/base:1", nested=False):
        first = self.manifest()
        if nested:
            alien = dict(first, platform={"architecture": "s390x", "os": "linux"})
            note = dict(first, platform={"architecture": "unknown", "os": "unknown"})
            mine = dict(first, platform={"architecture": HERE, "os": "linux"})
            first = self.put(json.dumps({"manifests": [alien, mine, note]}).encode(), INDEX)
        first["annotations"] = {"org.opencontainers.image.ref.name": name}
        (self.root / "oci-layout").write_text('{"imageLayoutVersion":"1.0.0"}')
        (self.root / "index.json").write_text(json.dumps({"manifests": [first, *others]}))
        return self.root

    def saved(self, *, links=False):
        shutil.rmtree(self.root / "blobs")
        (self.root / f"{sha256(self.config)}.json").write_bytes(self.config)
        names = []
        for number, layer in enumerate(self.layers):
            place = self.root / f"{number:064d}"
            place.mkdir()
            if links and layer in self.layers[:number]:
                (place / "layer.tar").symlink_to(f"../{self.layers.index(layer):064d}/layer.tar")
            else:
                (place / "layer.tar").write_bytes(layer)
            names.append(f"{number:064d}/layer.tar")
        listed = [{"Config": f"{sha256(self.config)}.json", "RepoTags": ["base:1"], "Layers": names}]
        (self.root / "manifest.json").write_text(json.dumps(listed))
        return self.root


def as_tar(root, target, *options):
    subprocess.run(["tar", "-c", *options, "-f", target, "-C", root, "."], check=True)
    return target


@pytest.fixture
def tars(tar):
    lower = tar().add("bin/sh", b"#!", mode=0o755).add("etc/old", b"1").add("etc/keep", b"2").bytes()
    upper = tar().add("etc/.wh.old").add("etc/new", b"3").bytes()
    return [lower, upper]


@pytest.fixture
def layout(tmp_path, tars):
    return Layout(tmp_path / "layout", tars)


SHAPES = {
    "OCI directory": lambda layout, tmp: layout.oci(),
    "OCI directory of indexes": lambda layout, tmp: layout.oci(nested=True),
    "OCI tar": lambda layout, tmp: as_tar(layout.oci(), tmp / "a.tar"),
    "OCI tar.gz": lambda layout, tmp: as_tar(layout.oci(), tmp / "a.tgz", "-z"),
    "docker save directory": lambda layout, tmp: layout.saved(),
    "docker save tar": lambda layout, tmp: as_tar(layout.saved(), tmp / "a.tar"),
    "docker save tar.zst": lambda layout, tmp: as_tar(layout.saved(), tmp / "a.zst", "--zstd"),
}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
async def test_an_image_of_every_shape_becomes_the_same_layers(layout, tmp_path, store, mounted, show, shape):
    image = await import_image(store, shape(layout, tmp_path), ImportOptions(name="base"))
    assert image.name == "base:latest"
    assert image.config.env == {"PATH": "/bin", "A": "b=c"}
    assert (image.config.workdir, image.config.user, image.config.command) == ("/w", "7", ("sh",))
    upper, lower = (show(mounted(store.path(layer))) for layer in image.layers)
    assert lower["bin/sh"] == ("-rwxr-xr-x", 0, 0, b"#!")
    assert upper["etc/old"][0][0] == "c"
    assert upper["etc/new"][3] == b"3"
    assert store.image("base") == image


@pytest.mark.parametrize("tool", ["gzip", "zstd"])
async def test_packed_layers_are_unpacked(tmp_path, tars, store, tool):
    def pack(data):
        return subprocess.run([tool, "-cq"], input=data, capture_output=True, check=True).stdout

    plain = await import_image(store, Layout(tmp_path / "plain", tars).oci(), ImportOptions(name="plain"))
    packed = await import_image(store, Layout(tmp_path / "packed", tars, pack).oci(), ImportOptions(name="packed"))
    assert packed.layers == plain.layers


async def test_a_layer_that_is_there_is_not_made_again(layout, tmp_path, tars, store):
    first = await import_image(store, layout.oci())
    other = await import_image(
        store, Layout(tmp_path / "other", [*tars, tars[1]]).saved(links=True), ImportOptions(name="other")
    )
    assert other.layers[1:] == first.layers
    assert other.layers[0] == first.layers[0]
    assert len(store.layers()) == 2


async def test_links_between_saved_layers_are_followed_inside_the_archive(tmp_path, tars, store):
    root = Layout(tmp_path / "linked", [*tars, tars[1]]).saved(links=True)
    image = await import_image(store, as_tar(root, tmp_path / "linked.tar"))
    assert image.name == "base:1"
    assert len(image.layers) == 3


async def test_the_name_is_that_of_the_image_unless_another_is_given(layout, store):
    image = await import_image(store, layout.oci(name="docker.io/library/debian:12"))
    assert image.name == "debian:12"


def test_of_several_images_one_must_be_named(layout):
    other = dict(layout.manifest(), annotations={"org.opencontainers.image.ref.name": "b:2"})
    root = layout.oci(other, name="a:1")
    with pytest.raises(InvalidArgumentError, match=r"a:1, b:2"), open_image(root, "", 1 << 30, nowhere):
        pass
    with pytest.raises(InvalidArgumentError, match="no such image"), open_image(root, "c:3", 1 << 30, nowhere):
        pass
    with open_image(root, "b:2", 1 << 30, nowhere) as found:
        assert found.name == "b:2"


@pytest.mark.parametrize("which", ["config", "manifest", "layer"])
async def test_a_blob_without_its_digest_is_refused(layout, store, which):
    root = layout.oci()
    index = json.loads((root / "index.json").read_text())
    manifest = index["manifests"][0]["digest"][7:]
    described = json.loads((layout.blobs / manifest).read_text())
    broken = {"manifest": manifest, "config": described["config"]["digest"][7:],
              "layer": described["layers"][1]["digest"][7:]}[which]  # fmt: skip
    (layout.blobs / broken).write_bytes((layout.blobs / broken).read_bytes() + b" ")
    with pytest.raises(InvalidArgumentError, match="digest"):
        await import_image(store, root)
    assert store.images() == {}


async def test_a_layer_that_is_not_its_diff_id_gets_no_name(layout, tar, store):
    layout.layers[1] = tar().add("etc/evil", b"").bytes()
    with pytest.raises(InvalidArgumentError, match="layer 1 is not sha256:"):
        await import_image(store, layout.saved())
    assert len(store.layers()) == 1
    assert store.images() == {}


@pytest.mark.parametrize("target", ["/etc/passwd", "../../outside"])
async def test_a_layout_leads_to_no_file_outside_of_it(layout, tmp_path, store, target):
    (tmp_path / "outside").write_text("x")
    root = layout.saved()
    place = next(root.glob("0*/layer.tar"))
    place.unlink()
    place.symlink_to(target)
    with pytest.raises((InvalidArgumentError, NotFoundError)):
        await import_image(store, root)
    with pytest.raises(NotFoundError):
        await import_image(store, as_tar(root, tmp_path / "a.tar"))


@pytest.mark.parametrize(
    "document", [b"", b"[]", b"{", b'{"manifests":[{}]}', b'{"manifests":[]}', b"\xff", b'{"manifests":' * 5000]
)
def test_a_document_that_is_none_is_refused(tmp_path, document):
    (tmp_path / "index.json").write_bytes(document)
    with pytest.raises(InvalidArgumentError), open_image(tmp_path, "", 1 << 30, nowhere):
        pass


def test_an_endless_document_is_refused(tmp_path):
    with (tmp_path / "index.json").open("wb") as file:
        file.truncate(oci.DOCUMENT_BYTES_MAX + 1)
    with pytest.raises(InvalidArgumentError, match="more than"), open_image(tmp_path, "", 1 << 30, nowhere):
        pass


def test_an_index_of_itself_ends(tmp_path, layout):
    for _ in range(6):
        inner = layout.manifest() if not (layout.root / "index.json").exists() else json.loads(
            (layout.root / "index.json").read_text())["manifests"][0]  # fmt: skip
        data = json.dumps({"manifests": [inner]}).encode()
        (layout.root / "index.json").write_text(json.dumps({"manifests": [layout.put(data, INDEX)]}))
    with pytest.raises(InvalidArgumentError, match="index of indexes"), open_image(layout.root, "", 1 << 30, nowhere):
        pass


@pytest.mark.parametrize("digest", ["md5:" + "0" * 32, "sha256:../../../etc/passwd", "sha256", "sha256:" + "0" * 64])
def test_an_odd_digest_is_refused(layout, digest):
    (layout.root / "index.json").write_text(json.dumps({"manifests": [{"digest": digest}]}))
    with pytest.raises((InvalidArgumentError, NotFoundError)), open_image(layout.root, "", 1 << 30, nowhere):
        pass


def test_what_is_no_layout_is_refused(tmp_path):
    for path in (tmp_path, tmp_path / "missing"):
        with pytest.raises((InvalidArgumentError, NotFoundError)), open_image(path, "", 1 << 30, nowhere):
            pass


async def test_a_bomb_in_a_layer_goes_off_at_the_bound(tmp_path, tar, store):
    bomb = tar().add("zeros", bytes(40 << 20)).bytes()
    root = Layout(tmp_path / "bomb", [bomb], gzip.compress).oci()
    with pytest.raises(ResourceExhaustedError, match="unpacks"):
        await import_image(store, root, unpacked_bytes_max=10 << 20)
    packed = as_tar(root, tmp_path / "bomb.tar")
    with pytest.raises(ResourceExhaustedError, match="unpacks"):
        await import_image(store, packed, unpacked_bytes_max=10 << 20)


async def test_the_bound_is_one_for_all_layers_of_an_image(tmp_path, tar, store):
    layers = [tar().add(name, bytes(8 << 20)).bytes() for name in "ab"]
    root = Layout(tmp_path / "two", layers, gzip.compress).oci()
    with pytest.raises(ResourceExhaustedError, match="unpacks"):
        await import_image(store, root, unpacked_bytes_max=10 << 20)
    assert store.images() == {}
    await import_image(store, root, unpacked_bytes_max=10 << 20)  # one of them is here


async def test_what_is_copied_and_what_waits_in_between_is_counted(tmp_path, tar):
    store = LayerStore(tmp_path / "small", 24 << 20)
    await store.open()
    bomb = tmp_path / "bomb.tar.gz"
    bomb.write_bytes(gzip.compress(tar().add("index.json", bytes(100 << 20)).bytes()))
    with pytest.raises(ResourceExhaustedError, match="raise the quota"):
        await import_image(store, bomb)
    small = tar()
    for number in range(20_000):
        small.add(f"{number}", bytes(2048))
    root = Layout(tmp_path / "small-files", [small.bytes()], gzip.compress).oci()
    with pytest.raises(ResourceExhaustedError, match="raise the quota"):
        await import_image(store, root)
    assert (store.shelf.used_bytes(), list(store.shelf.scratch.iterdir())) == (0, [])


async def test_a_hostile_layer_makes_nothing_on_the_host(layout, tar, store, tmp_path):
    layout.tars[1] = layout.layers[1] = tar().add("../../../escaped", b"x").bytes()
    root = Layout(tmp_path / "hostile", layout.tars).oci()
    with pytest.raises(InvalidArgumentError, match="no layer can have"):
        await import_image(store, root)
    assert not list(tmp_path.rglob("escaped"))


def test_tar_members_that_are_no_files_are_no_files_of_a_layout(tmp_path, tar):
    path = tmp_path / "a.tar"
    path.write_bytes(tar().add("index.json", kind=tarfile.CHRTYPE).bytes())
    with pytest.raises(InvalidArgumentError, match="neither"), open_image(path, "", 1 << 30, nowhere):
        pass


@pytest.mark.parametrize(("name", "target"), [("d/" * 250 + "n" * 250, "x" * 300), ("l", "up/" * 400)])
def test_a_name_that_no_layout_has_is_refused(tmp_path, tar, name, target):
    path = tmp_path / "a.tar"
    path.write_bytes(tar().add(name, kind=tarfile.SYMTYPE, linkname=target).bytes())
    with pytest.raises(InvalidArgumentError, match="too long a name"), open_image(path, "", 1 << 30, nowhere):
        pass
