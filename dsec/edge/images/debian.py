"""A Debian base image by debootstrap, from the mirror that this host's apt is configured with.

debootstrap runs in mount and process namespaces of its own, so that nothing it mounts or starts outlives
it.  Packages are checked by its keyring; their scripts run as root in the target, as they do in any
installation.

See: debootstrap(8), apt-get(8) "indextargets".
"""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterable
from pathlib import Path

from dsec.edge.images.store import LayerStore, Progress
from dsec.errors import HostUnfitError, InvalidArgumentError
from dsec.images import Image, ImageConfig

PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_PACKAGE = re.compile(r"[a-z0-9][a-z0-9+.-]{1,100}")
_SUITE = re.compile(r"[a-z][a-z0-9-]{0,40}")
_NAMESPACES = ("unshare", "--mount", "--propagation=private", "--pid", "--fork", "--kill-child", "--ipc", "--uts")
_EMPTIED = ("dev", "run", "tmp", "var/cache/apt", "var/cache/debconf", "var/lib/apt/lists", "var/log")
_HOST_FILES = {"etc/hostname": "sandbox\n", "etc/resolv.conf": ""}
_OUTPUT_BYTES_MAX = 4096


async def build_debian(
    store: LayerStore,
    name: str,
    *,
    packages: Iterable[str] = (),
    suite: str = "bookworm",
    mirror: str = "",
    compressed: bool = False,
    report: Callable[[str], None] = lambda _: None,
    progress: Progress | None = None,
) -> Image:
    """A minimal Debian with these packages as an image of one layer; `report` gets debootstrap's lines.

    InvalidArgumentError (a name that is none, or debootstrap refuses it), HostUnfitError, ResourceExhaustedError.
    """
    included = sorted({*packages})
    for package in included:
        if _PACKAGE.fullmatch(package) is None:
            raise InvalidArgumentError(f"no package name: {package!r:.100}")
    if _SUITE.fullmatch(suite) is None:
        raise InvalidArgumentError(f"no suite name: {suite!r:.100}")
    if mirror and "://" not in mirror:
        raise InvalidArgumentError(f"no mirror: {mirror!r:.200}; one is a URL")
    source = mirror or await asyncio.to_thread(apt_mirror, suite)
    with store.staging() as target:
        await _debootstrap(_command(target, suite, source, included), report)
        await asyncio.to_thread(_clean, target)
        made_from = f"debian {suite} {' '.join(included)}".strip()
        layer_id = await store.add_directory(target, made_from=made_from, compressed=compressed, progress=progress)
    config = ImageConfig(env={"PATH": PATH}, command=("/bin/bash",))
    return await store.tag(Image(name=name, layers=(layer_id,), config=config, source=made_from))


def apt_mirror(suite: str) -> str:
    """Where this host's apt gets that suite from, or else its first one.  HostUnfitError if it gets none."""
    try:
        done = subprocess.run(
            ["apt-get", "indextargets", "--format", "$(CODENAME) $(REPO_URI)", "Created-By: Packages"],
            capture_output=True,
            text=True,
            check=False,
        )
    except FileNotFoundError as error:
        raise HostUnfitError("this host has no apt-get: name a mirror") from error
    found = dict(line.split(" ", 1) for line in reversed(done.stdout.splitlines()) if " " in line)
    if not found:
        raise HostUnfitError("apt has no package lists: apt-get update, or name a mirror")
    return found.get(suite) or list(found.values())[-1]


def _command(target: Path, suite: str, mirror: str, packages: list[str]) -> list[str]:
    include = [f"--include={','.join(packages)}"] if packages else []
    return [*_NAMESPACES, "--", "debootstrap", "--variant=minbase", *include, suite, str(target), mirror]


async def _debootstrap(command: list[str], report: Callable[[str], None]) -> None:
    if shutil.which("debootstrap") is None:
        raise HostUnfitError("the program debootstrap is missing (apt-get install debootstrap)")
    environment = {"PATH": PATH, "LC_ALL": "C.UTF-8", "DEBIAN_FRONTEND": "noninteractive"}
    proxies = {name: value for name, value in os.environ.items() if name.lower().endswith("_proxy")}
    process = await asyncio.create_subprocess_exec(
        *command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=environment | proxies,
        limit=1 << 20,
    )
    tail = b""
    try:
        while process.stdout and (line := await process.stdout.readline()):
            report(line.decode(errors="replace").rstrip())
            tail = (tail + line)[-_OUTPUT_BYTES_MAX:]
        code = await process.wait()
    finally:
        if process.returncode is None:
            process.send_signal(signal.SIGKILL)
            await process.wait()
    if code != 0:
        said = [line for line in tail.decode(errors="replace").splitlines() if line.startswith(("E:", "W:"))]
        raise InvalidArgumentError(f"debootstrap ended with {code}: {' '.join(said)[:1000] or tail[-500:]!r}")


def _clean(target: Path) -> None:
    """Take out what is of this host or of the moment; modes stay."""
    for name in _EMPTIED:
        for path in (target / name).iterdir() if (target / name).is_dir() else ():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()
    for name, content in _HOST_FILES.items():
        (target / name).unlink(missing_ok=True)
        (target / name).write_text(content)
