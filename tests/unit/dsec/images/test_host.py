"""What layers need is tried, and said with its way out."""

import os
from pathlib import Path

import pytest

from dsec.edge.images.config import ImagesConfig
from dsec.edge.images.debian import apt_mirror
from dsec.edge.images.host import check_images
from dsec.edge.linux.mounts import mount_image
from dsec.errors import HostUnfitError


def test_this_host_can_mount_layers_and_nothing_is_left(tmp_path):
    found = {finding.name: finding for finding in check_images(ImagesConfig(directory=tmp_path / "not" / "yet"))}
    assert found["layers"].ok, found["layers"]
    assert list(tmp_path.iterdir()) == []
    assert [finding for finding in found.values() if not finding.optional] == []


def test_a_store_where_layers_cannot_be_mounted_is_told_of():
    (found,) = (one for one in check_images(ImagesConfig(directory=Path("/dev/shm/none"))) if one.name == "layers")
    assert not found.ok
    assert "not on tmpfs" in found.remedy


def test_programs_that_are_missing_are_told_of_with_their_package(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    found = {finding.name: finding for finding in check_images(ImagesConfig(directory=tmp_path))}
    assert [found[name].ok for name in ("debootstrap", "mkfs.erofs", "zstd")] == [False] * 3
    assert "erofs-utils" in found["mkfs.erofs"].remedy
    with pytest.raises(HostUnfitError, match="no apt-get"):
        apt_mirror("bookworm")


def test_what_is_no_image_does_not_mount(tmp_path):
    path = tmp_path / "no image"
    path.write_bytes(bytes(8192))
    fd = os.open(path, os.O_RDONLY)
    try:
        with pytest.raises(OSError, match="Invalid argument"):
            mount_image(fd)
    finally:
        os.close(fd)


@pytest.mark.parametrize(
    ("printed", "suite", "mirror"),
    [
        ("bookworm http://a/\nbookworm-updates http://a/\nbookworm http://b/\n", "bookworm", "http://a/"),
        ("bookworm http://a/\nother http://b/\n", "trixie", "http://a/"),
    ],
)
def test_the_mirror_is_the_one_that_apt_has(tmp_path, monkeypatch, printed, suite, mirror):
    program = tmp_path / "apt-get"
    program.write_text(f"#!/bin/sh\nprintf '%s' '{printed}'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin")
    assert apt_mirror(suite) == mirror


def test_a_host_whose_apt_knows_no_mirror_is_told_so(tmp_path, monkeypatch):
    (tmp_path / "apt-get").write_text("#!/bin/sh\n")
    (tmp_path / "apt-get").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin")
    with pytest.raises(HostUnfitError, match="apt-get update"):
        apt_mirror("bookworm")
