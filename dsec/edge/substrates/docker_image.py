"""The image of base "host" for Docker: the skeleton, and programs of this host with what they depend on.

Docker cannot lay a writable layer over the host's own /usr, as the native substrate does, and
copying all of /usr would be gigabytes.  So the image holds the files of a list of Debian packages
and of the packages that they need, as they lie on this host.  It is imported once and found again
by the digest of what went in.

See: dsec/edge/linux/skeleton.py, docs/threat_model.md "Docker".
"""

from __future__ import annotations

import hashlib
import io
import os
import re
import stat
import subprocess
import tarfile
from collections.abc import Iterable
from pathlib import Path

from dsec.edge.linux import skeleton
from dsec.errors import HostUnfitError

PACKAGES = (
    "base-files", "base-passwd", "bash", "bsdutils", "coreutils", "dash", "debianutils", "diffutils", "findutils",
    "gawk", "grep", "gzip", "hostname", "iproute2", "libc-bin", "login", "mawk", "mount", "ncurses-base",
    "ncurses-bin", "passwd", "patch", "perl-base", "procps", "python3", "sed", "tar", "util-linux",
    "util-linux-extra", "xz-utils",
)  # fmt: skip
"""Those of them that this host has; bash, coreutils, python3 and tar it must have."""
_MUST = frozenset({"bash", "coreutils", "python3", "tar"})
_LEFT_OUT = re.compile(r"/usr/share/(doc|man|info|locale|i18n|lintian|bug|doc-base)(/|$)|\.pyc$")


def _installed() -> dict[str, tuple[str, ...]]:
    """Each installed package, and each name that one provides, with the packages it needs (of alternatives: all)."""
    form = "${Package}\t${db:Status-Status}\t${Provides}\t${Pre-Depends},${Depends}\n"
    try:
        told = subprocess.run(["dpkg-query", "-W", "-f", form], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        raise HostUnfitError(
            f"no image can be made of this host ({error}): it is no Debian; name an image (DSEC_DOCKER_IMAGE)"
        ) from error
    needs: dict[str, tuple[str, ...]] = {}
    for entry in told.splitlines():
        name, state, provides, depends = entry.split("\t")
        if state == "installed":
            needs[name] = tuple(re.findall(r"(?:^|[,|])\s*([a-z0-9.+-]+)", depends))
            for provided in re.findall(r"(?:^|,)\s*([a-z0-9.+-]+)", provides):
                needs.setdefault(provided, (name,))
    return needs


def _closure(wanted: Iterable[str], needs: dict[str, tuple[str, ...]]) -> list[str]:
    found: set[str] = set()
    waiting = [name for name in wanted if name in needs]
    while waiting:
        name = waiting.pop()
        if name not in found:
            found.add(name)
            waiting += [other for other in needs[name] if other in needs]
    return sorted(found)


def host_files() -> list[Path]:
    """What of /usr goes in, parents first, by its real path.  HostUnfitError where there is no package list."""
    needs = _installed()
    if missing := _MUST - set(needs):
        raise HostUnfitError(f"no image can be made of this host: it lacks the packages {', '.join(sorted(missing))}")
    listed = subprocess.run(
        ["dpkg-query", "-L", *_closure(PACKAGES, needs)], capture_output=True, text=True, check=False
    ).stdout
    found: set[Path] = set()
    for name in listed.splitlines():
        if not name.startswith("/"):
            continue
        real = Path(os.path.realpath(os.path.dirname(name)), os.path.basename(name))  # /bin is a link to usr/bin
        if real.is_relative_to("/usr") and not _LEFT_OUT.search(str(real)) and os.path.lexists(real):
            found.update([real, *(parent for parent in real.parents if parent != Path("/"))])
    return sorted(found | _alternatives(found))


def _alternatives(found: set[Path]) -> set[Path]:
    """Links such as /usr/bin/awk, which no package owns: those that end at something that goes in."""
    links = {link for folder in ("/usr/bin", "/usr/sbin") for link in Path(folder).iterdir() if link.is_symlink()}
    return {link for link in links if os.readlink(link).startswith("/etc/alternatives/") and link.resolve() in found}


def digest_of(files: list[Path]) -> str:
    """Of the skeleton and of names, sizes and times of the files: 12 hex digits, for a tag."""
    digest = hashlib.sha256(skeleton.encode(skeleton.entries()))
    for path in files:
        status = os.lstat(path)
        digest.update(f"{path} {status.st_mode} {status.st_size} {status.st_mtime_ns}\n".encode())
    return digest.hexdigest()[:12]


def write_archive(files: list[Path], out: io.BufferedIOBase) -> None:
    """The image's tree as a tar: the skeleton, then the files; all owned by who owns them here."""
    with tarfile.open(fileobj=out, mode="w|", format=tarfile.PAX_FORMAT) as archive:
        for entry in skeleton.entries():
            archive.addfile(*_member(entry))
        for path in files:
            if path != Path("/usr") and stat.S_IFMT(os.lstat(path).st_mode) in (
                stat.S_IFREG,
                stat.S_IFDIR,
                stat.S_IFLNK,
            ):
                archive.add(path, arcname=str(path).lstrip("/"), recursive=False)


def _member(entry: skeleton.Entry) -> tuple[tarfile.TarInfo, io.BytesIO]:
    info = tarfile.TarInfo(entry.path)
    info.mode = entry.mode
    content = entry.content.encode()
    if entry.kind == "d":
        info.type, content = tarfile.DIRTYPE, b""
    elif entry.kind == "l":
        info.type, info.linkname, content = tarfile.SYMTYPE, entry.content, b""
    info.size = len(content)
    return info, io.BytesIO(content)
