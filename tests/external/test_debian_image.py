"""A Debian image by debootstrap, from the mirror of this host's apt, and a sandbox on it.

Needs root, debootstrap and that mirror.
"""

from __future__ import annotations

from pathlib import Path

from dsec.edge.images.debian import build_debian
from dsec.edge.images.store import LayerStore
from dsec.edge.substrates.container import ContainerSubstrate
from dsec.types import Command, SandboxSpec


async def test_a_debian_image_runs_what_was_asked_for(tmp_path: Path) -> None:
    store = LayerStore(tmp_path / "store")
    await store.open()
    said: list[str] = []
    image = await build_debian(store, "small", packages=["jq"], report=said.append)
    assert any("jq" in line for line in said)
    assert list((tmp_path / "store" / "tmp").iterdir()) == []
    substrate = ContainerSubstrate(layers=store)
    await substrate.open()
    try:
        sandbox = await substrate.create(SandboxSpec(base="", layers=image.layers))
        line = "jq -n 1+1; cat /etc/hostname; ls /var/lib/apt/lists /var/cache/apt; . /etc/os-release; echo $ID"
        result = await sandbox.exec(Command(argv=("/bin/sh", "-c", line), env=image.config.env))
        assert (result.exit_code, result.stderr.data) == (0, b"")
        assert result.stdout.data == b"2\nsandbox\n/var/cache/apt:\n\n/var/lib/apt/lists:\ndebian\n"
    finally:
        await substrate.close()
        store.close()
