"""Sandboxes of layers: an image imported from an archive, what lies over what, snapshots, and what is held."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import tarfile
from hashlib import sha256
from pathlib import Path

import pytest

from dsec.edge.images.importer import import_image
from dsec.edge.images.store import LayerStore
from dsec.edge.substrates.container import ContainerSubstrate
from dsec.errors import NotFoundError, StateError
from dsec.types import Command, LayerId, SandboxSpec

PASSWD = b"root:x:0:0::/:/bin/sh\njoe:x:1000:1000::/:/bin/sh\n"
PROGRAMS = ("sh", "cat", "ls", "rm", "mkdir", "chown", "id", "dd", "stat", "touch")


def program_files() -> list[Path]:
    """Some programs of this host with the libraries they need."""
    files = {Path(shutil.which(name) or name) for name in PROGRAMS}
    listed = subprocess.run(["ldd", *files], capture_output=True, text=True, check=True).stdout
    return sorted(files | {Path(word) for word in listed.split() if word.startswith("/") and not word.endswith(":")})


def lower_layer() -> bytes:
    """A tar with the programs, a few users, and things to hide."""
    data = io.BytesIO()
    with tarfile.TarFile(fileobj=data, mode="w", dereference=True) as archive:
        for path in program_files():
            archive.add(path, f"bin/{path.name}" if "bin" in path.parts else str(path).removeprefix("/"))
        for name, content in {"etc/passwd": PASSWD, "etc/old": b"",
                              "opaque/below": b"", "deep/a/b/c": b"1", "proc/.keep": b"", "dev/.keep": b"",
                              "tmp/.keep": b""}.items():  # fmt: skip
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return data.getvalue()


def upper_layer() -> bytes:
    data = io.BytesIO()
    with tarfile.TarFile(fileobj=data, mode="w") as archive:
        for name in ("etc/.wh.old", "opaque/.wh..wh..opq", "opaque/above", "deep/a/.wh.b"):
            archive.addfile(tarfile.TarInfo(name))
        member = tarfile.TarInfo("joes")
        member.uid = member.gid = 1000
        archive.addfile(member)
    return data.getvalue()


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `docker save` would write of an image with two layers."""
    root = tmp_path_factory.mktemp("saved")
    tars = [lower_layer(), upper_layer()]
    config = json.dumps({"rootfs": {"diff_ids": [f"sha256:{sha256(data).hexdigest()}" for data in tars]}}).encode()
    name = f"{sha256(config).hexdigest()}.json"
    listed = [{"Config": name, "RepoTags": ["small:1"], "Layers": ["0.tar", "1.tar"]}]
    files = {name: config, "0.tar": tars[0], "1.tar": tars[1], "manifest.json": json.dumps(listed).encode()}
    with tarfile.TarFile(root / "small.tar", mode="w") as archive:
        for path, content in files.items():
            member = tarfile.TarInfo(path)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return root / "small.tar"


@pytest.fixture
async def store(tmp_path):
    made = LayerStore(tmp_path / "store")
    await made.open()
    yield made
    made.close()


@pytest.fixture
async def substrate(store):
    made = ContainerSubstrate(layers=store)
    await made.open()
    yield made
    await made.close()


async def run(sandbox, line, **fields):
    result = await sandbox.exec(Command(argv=("/bin/sh", "-c", line), env={"PATH": "/bin"}, **fields))
    return (result.stdout.data + result.stderr.data).decode()


async def test_an_image_is_a_sandboxs_root_with_its_layers_over_each_other(saved, store, substrate):
    image = await import_image(store, saved)
    sandbox = await substrate.create(SandboxSpec(base="", layers=image.layers))
    assert await run(sandbox, "ls /etc /opaque /deep/a; stat -c %u:%g /joes /etc /") == (
        "/deep/a:\n\n/etc:\npasswd\n\n/opaque:\nabove\n1000:1000\n0:0\n0:0\n"
    )
    assert await run(sandbox, "id -u; stat -c %u /joes", user="joe") == "1000\n1000\n"
    assert await run(sandbox, "cat /usr/bin/python3") == "cat: /usr/bin/python3: No such file or directory\n"


async def test_what_is_written_in_one_sandbox_is_in_no_other(saved, store, substrate):
    image = await import_image(store, saved)
    one, two = [await substrate.create(SandboxSpec(base="", layers=image.layers)) for _ in range(2)]
    await run(one, "echo evil > /bin/sh2; rm /bin/ls; echo x > /etc/passwd")
    assert await run(two, "ls /bin/ls && cat /etc/passwd") == f"/bin/ls\n{PASSWD.decode()}"
    assert "No such file" in await run(two, "ls /bin/sh2")
    await store.check(image.layers)


async def test_a_snapshot_goes_on_with_everything_as_it_was(saved, store, substrate):
    image = await import_image(store, saved)
    sandbox = await substrate.create(SandboxSpec(base="", layers=image.layers))
    await run(sandbox, "rm -r /deep /etc/passwd; mkdir /deep; echo 1 > /deep/new; touch /mine; chown 1000:7 /mine")
    await run(sandbox, "dd if=/dev/zero of=/big bs=1M count=3")
    first = await sandbox.snapshot()
    await run(sandbox, "echo 2 > /deep/new")
    layers = (first, *image.layers)
    for _ in range(3):
        copy = await substrate.create(SandboxSpec(base="", layers=layers))
        shown = await run(copy, "ls /deep; cat /deep/new; stat -c '%u:%g %s' /mine /big; cat /etc/passwd")
        assert shown.splitlines()[:4] == ["new", "1", "1000:7 0", "0:0 3145728"]
        assert "No such file" in shown
        await run(copy, "touch /again")
        layers = (await copy.snapshot(), *layers)
    assert store.facts(layers[0]).parents == layers[1:]
    last = await substrate.create(SandboxSpec(base="", layers=layers))
    assert await run(last, "cat /deep/new") == "1\n"


async def test_layers_over_the_hosts_usr(store, substrate, tmp_path):
    source = tmp_path / "toolkit"
    (source / "usr/local/bin").mkdir(parents=True)
    (source / "usr/local/bin/tool").write_text("#!/bin/sh\necho tool\n")
    (source / "usr/local/bin/tool").chmod(0o755)
    (source / "opt").mkdir()
    (source / "opt/data").write_text("data")
    toolkit = await store.add_directory(source)
    sandbox = await substrate.create(SandboxSpec(layers=(toolkit,)))
    result = await sandbox.exec(Command(argv=("/bin/sh", "-c", "/usr/local/bin/tool; cat /opt/data; rm /usr/bin/tar")))
    assert result.stdout.data == b"tool\ndata"
    copy = await substrate.create(SandboxSpec(layers=(await sandbox.snapshot(), toolkit)))
    result = await copy.exec(Command(argv=("/bin/sh", "-c", "/usr/local/bin/tool; tar --version")))
    assert result.stdout.data == b"tool\n"
    assert result.exit_code == 127


async def test_a_layer_in_use_stays_and_an_unknown_one_is_refused(saved, store, substrate):
    image = await import_image(store, saved)
    await store.untag(image.name)
    sandbox = await substrate.create(SandboxSpec(base="", layers=image.layers))
    assert await store.collect() == []
    for layer in image.layers:
        with pytest.raises(StateError, match="uses it"):
            await store.remove(layer)
    assert await run(sandbox, "ls /opaque") == "above\n"
    with pytest.raises(NotFoundError):
        await substrate.create(SandboxSpec(base="", layers=(LayerId("sha256:" + "0" * 64),)))
    await substrate.close()
    assert set(await store.collect()) == set(image.layers)
