"""Debian packages that a task's Dockerfile asks for, and whether this host has them.

The base of a sandbox is a read-only view of the host's /usr and sandboxes have no network, so a RUN
that installs packages is not run: its packages must be on the host.  A missing one is told before
anything starts, with the command that installs it.

See: docs/formats/task.md.
"""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from collections.abc import Iterable, Iterator, Sequence

import msgspec

SANDBOX_PATH = "/usr/local/bin:/usr/bin:/bin"
_NAME = re.compile(r"[a-z0-9][a-z0-9+.-]*")
_REQUIREMENT = re.compile(r"([A-Za-z0-9][A-Za-z0-9._-]*)(?:\[[^\]]*\])?(?:==([A-Za-z0-9.+!]+))?")
_APT_IDLE = {"update", "clean", "autoclean", "autoremove"}
_WITH_VALUE = {"-o", "-t", "--target-release", "-i", "--index-url", "--extra-index-url", "--root-user-action"}
_APT_FOLDERS = ("/var/lib/apt/", "/var/cache/apt/")


class Package(msgspec.Struct, frozen=True, order=True):
    """A Debian package, with the start of the version that the task pins ("" for any)."""

    name: str
    version: str = ""


def packages_of(command: str) -> tuple[Package, ...] | None:
    """What a RUN line installs; None if it is no installation (and must be run).

    ValueError if it installs and also does something else, or installs what Debian cannot give.
    """
    if not re.search(r"\b(?:apt-get|apt|pip3?)\b", command):
        return None
    found: list[Package] = []
    installs = other = False
    for words in _simple_commands(command):
        got = _read(words)
        if got is None:
            other = other or words[0] not in ("set", "true")
        else:
            installs = True
            found += got
    if installs and other:
        raise ValueError("a RUN that installs packages is not run here: put its other commands into a RUN of their own")
    return tuple(found) if installs else None


def missing_packages(packages: Iterable[Package]) -> tuple[Package, ...]:
    """Those that this host lacks, sorted: asked of dpkg-query, else a program of that name on the PATH counts."""
    wanted = sorted(set(packages))
    installed = _installed(sorted({package.name for package in wanted}))
    return tuple(package for package in wanted if not _is_there(package, installed))


def _is_there(package: Package, installed: dict[str, str]) -> bool:
    version = installed.get(package.name)
    if version is None:
        return not package.version and shutil.which(package.name, path=SANDBOX_PATH) is not None
    pinned = re.compile(re.escape(package.version) + r"(\Z|[-+~.])")
    without_epoch = version.partition(":")[2] or version
    return not package.version or any(map(pinned.match, (version, without_epoch)))


def _installed(names: Sequence[str]) -> dict[str, str]:
    if not names or shutil.which("dpkg-query") is None:
        return {}
    form = "${Package}\t${db:Status-Status}\t${Version}\n"
    done = subprocess.run(["dpkg-query", "-W", "-f", form, *names], capture_output=True, text=True, check=False)
    rows = (line.split("\t") for line in done.stdout.splitlines())
    return {name: version for name, status, version in rows if status == "installed"}


def _simple_commands(command: str) -> Iterator[list[str]]:
    """The commands of a list joined by `&&` or `;`; another operator stands as a command of its own."""
    lexer = shlex.shlex(command, posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    words: list[str] = []
    for word in (*lexer, ";"):
        if not set(word) <= set("();<>|&"):
            words.append(word)
            continue
        while words and "=" in words[0] and words[0].partition("=")[0].isidentifier():
            del words[0]
        if words:
            yield words
        if word not in ("&&", ";"):
            yield [word]
        words = []


def _read(words: list[str]) -> list[Package] | None:
    """Packages of one simple command; None if it is not about packages."""
    if words[0] == "rm" and all(w.startswith(("-", *_APT_FOLDERS)) for w in words[1:]):
        return []
    if re.fullmatch(r"python3?", words[0]) and words[1:3] == ["-m", "pip"]:
        words = words[2:]
    tool, plain = words[0], list(_without_options(words[1:]))
    if tool in ("apt", "apt-get") and plain[:1] == ["install"]:
        return [_apt(name) for name in plain[1:]]
    if tool in ("apt", "apt-get") and plain and plain[0] in _APT_IDLE:
        return []
    if tool in ("pip", "pip3") and plain[:1] == ["install"]:
        return [_pip(name) for name in plain[1:]]
    return None


def _without_options(words: list[str]) -> Iterator[str]:
    skip = False
    for word in words:
        if skip:
            skip = False
        elif word in ("-r", "--requirement", "-e", "--editable"):
            raise ValueError(f"`pip install {word}` is not supported: name the packages, or ship their files")
        elif word.startswith("-"):
            skip = word in _WITH_VALUE
        else:
            yield word


def _apt(word: str) -> Package:
    name, _, version = word.partition("=")
    if not _NAME.fullmatch(name):
        raise ValueError(f"{word!r} is not the name of a Debian package")
    return Package(name, version)


def _pip(word: str) -> Package:
    match = _REQUIREMENT.fullmatch(word)
    if match is None:
        raise ValueError(f"`pip install {word}` is not supported: give a name, or name==version")
    name = re.sub(r"[._-]+", "-", match[1].lower()).removeprefix("python-")
    return Package(f"python3-{name}", match[2] or "")
