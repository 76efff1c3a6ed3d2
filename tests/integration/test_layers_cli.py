"""`dsec image`, as a person types it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

DSEC = Path(sys.executable).parent / "dsec"


@pytest.fixture
def dsec(tmp_path):
    """Run a command on a store of our own; what it printed, or its exit code and complaint."""

    def call(*arguments: object, shared: Path | None = None) -> str | tuple[int, str]:
        environment = {**os.environ, "DSEC_IMAGES_DIRECTORY": str(tmp_path / "store")}
        if shared is not None:
            environment["DSEC_IMAGES_SHARED"] = str(shared)
        done = subprocess.run(
            [DSEC, "image", *map(str, arguments)], capture_output=True, text=True, check=False, env=environment
        )
        assert "Traceback" not in done.stderr
        return done.stdout if done.returncode == 0 else (done.returncode, done.stderr)

    return call


@pytest.fixture
def tree(tmp_path):
    path = tmp_path / "tree"
    path.mkdir()
    (path / "hello").write_text("hello")
    return path


def test_a_layer_is_made_named_shown_and_removed(dsec, tree, tmp_path):
    layer = dsec("build", "directory", tree).strip()
    assert layer.startswith("sha256:")
    assert layer in dsec("ls")
    made = json.loads(dsec("build", "directory", tree, "--at", "/opt/tree", "--tag", "tree:1", "--json"))
    assert made["name"] == "tree:1"
    assert dsec("tag", "both", "tree:1", layer).split() == ["both:latest", made["layers"][0], layer]
    shown = json.loads(dsec("inspect", "both", "--check"))
    assert [one["id"] for one in shown["layers"]] == [made["layers"][0], layer]
    assert dsec("rm", layer) == (2, f"dsec: layer {layer} must stay: image both:latest is made of it\n")
    dsec("rm", "both", "tree:1")
    assert set(json.loads(dsec("gc", "--json"))) == {layer, made["layers"][0]}
    assert json.loads(dsec("ls", "--json")) == {"images": [], "layers": []}
    assert list((tmp_path / "store" / "tmp").iterdir()) == []


def test_an_archive_is_imported_and_published(dsec, tree, tmp_path):
    layer = tmp_path / "layer.tar"
    with tarfile.open(layer, "w") as archive:
        archive.add(tree / "hello", "hello")
    digest = subprocess.run(["sha256sum", layer], capture_output=True, text=True, check=True).stdout.split()[0]
    root = tmp_path / "saved"
    root.mkdir()
    (root / "config.json").write_text(json.dumps({"rootfs": {"diff_ids": [f"sha256:{digest}"]}}))
    (root / "manifest.json").write_text(
        json.dumps([{"Config": "config.json", "Layers": ["layer.tar"], "RepoTags": ["hi:1"]}])
    )
    layer.rename(root / "layer.tar")
    assert dsec("import", root, "--compress").startswith("hi:1\nsha256:")
    assert dsec("publish", "hi:1") == (2, "dsec: there is no shared directory to publish to (DSEC_IMAGES_SHARED)\n")
    shared = tmp_path / "shared"
    assert dsec("publish", "hi:1", shared=shared) == ""
    dsec("rm", "hi:1")
    dsec("gc")
    assert "hi:1" not in dsec("ls")
    assert "hi:1" in dsec("ls", shared=shared)


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("import", "/dev/null"), "neither|no file|not a tar"),
        (("inspect", "nothing"), "no image nothing"),
        (("rm", "sha256:" + "0" * 64), "no layer"),
        (("tag", "../x", "y"), "no image"),
        (("build", "debian", "--packages", "a;b"), "no package name"),
        (("build", "debian", "--suite", "../x"), "no suite name"),
        (("build", "debian", "--mirror", "--help"), "no mirror"),
        (("build", "directory", "/dev"), "mount point"),
    ],
)
def test_what_cannot_be_is_said_in_a_line(dsec, arguments, complaint):
    code, said = dsec(*arguments)
    assert code == 2
    assert any(part in said for part in complaint.split("|")), said
    assert len(said.splitlines()) == 1


def test_a_directory_that_is_no_operating_system_is_said_to_lie_over_one(tree: Path, tmp_path: Path) -> None:
    for at, told in (("/workspace", True), ("/", False)):
        done = subprocess.run(
            [DSEC, "image", "build", "directory", tree, "--at", at, "--tag", "repo:7"],
            env={**os.environ, "DSEC_IMAGES_DIRECTORY": str(tmp_path / "store")},
            capture_output=True,
            text=True,
            check=True,
        )
        assert ("dsec create --layer repo:7\n" in done.stderr) == told
