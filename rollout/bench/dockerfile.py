"""A subset of Dockerfile as ordered setup commands on the default base.

There is no image builder: FROM names the base that the default base (a view of the host's Debian)
stands for, COPY and ADD become tar uploads, RUN becomes `/bin/sh -c` inside the sandbox, and a RUN
that installs packages becomes a list of packages that the host must have.  What cannot be given
faithfully is an error with its line, never left out silently.

Invariants:
1. The same files give the same commands, byte for byte.
2. Nothing here touches the host: archives are unpacked by the sandbox's own tar.
3. What is built is bounded before it is built: a line can repeat a variable or a whole tree.

See: docs/formats/task.md; Docker's Dockerfile reference for the meaning of each instruction.
"""

from __future__ import annotations

import fnmatch
import json
import posixpath
import re
import shlex
from collections import ChainMap
from collections.abc import Callable, Iterable, Iterator, Mapping

import msgspec

from dsec.edge.commands import ARG_BYTES_MAX, encode_command
from dsec.errors import InvalidArgumentError
from dsec.types import Command
from rollout.bench.archive import TaskFile, make_folders, packed_bytes_min, setup_command, unpack, upload
from rollout.bench.packages import SANDBOX_PATH, Package, packages_of

DOCKERFILE_BYTES_MAX = 128 << 10
STEPS_COUNT_MAX = 200
"""Instructions of a Dockerfile, and commands that they become."""
VARIABLES_BYTES_MAX = 1 << 20
SETUP_BYTES_MAX = 32 << 20
"""Everything that the commands hold together: stdin, arguments and variables of each."""
PATH_BYTES_MAX = 4095
BASE_IMAGE = "debian"
WORKDIR_DEFAULT = "/app"
BASE_ENV = {
    "PATH": SANDBOX_PATH,
    "LC_ALL": "C",
    "HOME": "/tmp",  # noqa: S108 - a path inside the sandbox
    "PYTHONDONTWRITEBYTECODE": "1",
    "PYTHONHASHSEED": "0",
}
_STRING_ROOM_BYTES = 16
_ARCHIVE_ENDS = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz")
_IGNORED = {"CMD", "ENTRYPOINT", "LABEL", "EXPOSE", "MAINTAINER"}
_BASES = re.compile(r"(?:docker\.io/)?(?:library/)?(debian|buildpack-deps|python)(:[\w.-]+)?(@sha256:[0-9a-f]+)?")
_VARIABLE = re.compile(r"\$(?:(\w+)|\{(\w+)(?:(:[-+])([^}$]*))?\})")


class Image(msgspec.Struct, frozen=True):
    """What environment/ comes to: where commands run, with which variables, and how to get there.

    `env` is whole (BASE_ENV and every ENV); `commands` are to be run in order, each must exit 0.
    """

    base: str
    workdir: str
    env: dict[str, str]
    packages: tuple[Package, ...]
    commands: tuple[Command, ...]


def build(files: Mapping[str, TaskFile]) -> Image:
    """Turn the files of environment/ (names relative to it) into setup commands.

    Without a Dockerfile every file is copied to /app.  ValueError names the line and the rule.
    """
    for name in (".dockerignore", "docker-compose.yaml", "docker-compose.yml", "compose.yaml"):
        if name in files:
            raise ValueError(f"{name} is not supported: describe one container in a Dockerfile, copying files by name")
    builder = _Builder(files)
    if "Dockerfile" not in files:
        builder.set_workdir(WORKDIR_DEFAULT)
        builder.add_files(files, WORKDIR_DEFAULT)
        return builder.image()
    text = files["Dockerfile"].data
    if len(text) > DOCKERFILE_BYTES_MAX:
        raise ValueError(f"{len(text)} bytes: at most {DOCKERFILE_BYTES_MAX}; put data into files and COPY them")
    for count, (line, word, rest) in enumerate(_instructions(text.decode()), 1):
        try:
            if count > STEPS_COUNT_MAX:
                raise ValueError(f"more than {STEPS_COUNT_MAX} instructions: join some, or RUN a script")
            builder.apply(word, rest)
        except ValueError as why:
            raise ValueError(f"line {line}: {word}: {why}") from why
    if not builder.base:
        raise ValueError("no FROM: start with `FROM debian:bookworm-slim`")
    return builder.image()


def _instructions(text: str) -> Iterator[tuple[int, str, str]]:
    """(line number from 1, instruction in upper case, arguments); comments dropped, continued lines joined."""
    start, parts = 0, list[str]()
    for number, raw in enumerate(text.splitlines(), 1):
        line = raw.strip() if not parts else raw.rstrip()
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        start = start if parts else number
        parts.append(line.removesuffix("\\"))
        if not line.endswith("\\"):
            yield _split(start, parts)
            parts = []
    if parts:
        yield _split(start, parts)


def _split(start: int, parts: list[str]) -> tuple[int, str, str]:
    word, _, rest = "".join(parts).strip().partition(" ")
    return start, word.upper(), rest.strip()


class _Builder:
    """The state of a build, one instruction after another."""

    def __init__(self, files: Mapping[str, TaskFile]) -> None:
        self.files = files
        self.base = ""
        self.workdir = "/"
        self.env = dict(BASE_ENV)
        self.args: dict[str, str] = {}
        self.folders = {"/"}
        self.packages: list[Package] = []
        self.commands: list[Command] = []
        self.setup_bytes = 0
        self.room_bytes = ARG_BYTES_MAX
        self.handlers: dict[str, Callable[[str], None]] = {
            "FROM": self._from,
            "ARG": self._arg,
            "ENV": self._env,
            "WORKDIR": lambda rest: self.set_workdir(self._expand(rest)),
            "COPY": lambda rest: self._copy(rest, extracts=False),
            "ADD": lambda rest: self._copy(rest, extracts=True),
            "RUN": self._run,
            "USER": self._user,
        }

    def image(self) -> Image:
        return Image(
            base=self.base or BASE_IMAGE,
            workdir=self.workdir,
            env=self.env,
            packages=tuple(sorted(set(self.packages))),
            commands=tuple(self.commands),
        )

    def apply(self, word: str, rest: str) -> None:
        if word in _IGNORED:
            return
        if word not in self.handlers:
            raise ValueError("this instruction is not supported")
        if not rest:
            raise ValueError("its argument is missing")
        if not self.base and word not in ("FROM", "ARG"):
            raise ValueError("FROM must come first")
        self.room_bytes = ARG_BYTES_MAX
        self.handlers[word](rest)

    def set_workdir(self, path: str) -> None:
        self.workdir = self._absolute(path)
        self._make(self.workdir)

    def add(self, commands: Iterable[Command]) -> None:
        """Append commands while they keep to STEPS_COUNT_MAX and SETUP_BYTES_MAX; ValueError at the first beyond."""
        for command in commands:
            if len(self.commands) == STEPS_COUNT_MAX:
                raise ValueError(f"more than {STEPS_COUNT_MAX} commands: join some, or RUN a script")
            try:
                encode_command(command)
            except InvalidArgumentError as why:
                raise ValueError(str(why)) from why
            self._check_room(command_bytes(command))
            self.setup_bytes += command_bytes(command)
            self.commands.append(command)

    def add_files(self, files: Mapping[str, TaskFile], folder: str) -> None:
        """Append the commands that upload files; their size is checked before they are packed."""
        self._check_room(packed_bytes_min(files))
        self.add(upload(files, folder, self.env))

    def _check_room(self, needed_bytes: int) -> None:
        if self.setup_bytes + needed_bytes > SETUP_BYTES_MAX:
            raise ValueError(
                f"the files, arguments and variables of all commands up to here are more than {SETUP_BYTES_MAX} bytes: "
                "COPY each file once, and ADD large trees as a tar.gz"
            )

    def _from(self, rest: str) -> None:
        words = [w for w in self._expand(rest).split() if not w.startswith("--platform=")]
        if self.base:
            raise ValueError("a build of several stages is not supported")
        if len(words) not in (1, 3) or not _BASES.fullmatch(words[0]) or "alpine" in words[0]:
            raise ValueError(f"{words[:1]}: only Debian images have a stand-in here, such as debian:bookworm-slim")
        self.base = words[0]

    def _arg(self, rest: str) -> None:
        for word in shlex.split(rest):
            name, _, value = word.partition("=")
            self.args[name] = self._expand(value)
        check_variables({**self.args, **self.env})

    def _env(self, rest: str) -> None:
        if "\\$" in rest or ("'" in rest and "$" in rest):
            raise ValueError("a quoted $ is not supported: write the value out")
        name, _, value = rest.partition(" ")
        pairs = [w.partition("=") for w in shlex.split(rest)] if "=" in name else [(name, "=", value.strip())]
        new = {}
        for key, equals, text in pairs:
            if not equals or not re.fullmatch(r"[A-Za-z_]\w*", key):
                raise ValueError(f"{key!r}: write NAME=value")
            new[key] = self._expand(text)
        self.env.update(new)
        check_variables({**self.args, **self.env})

    def _user(self, rest: str) -> None:
        if rest.partition(":")[0] not in ("root", "0"):
            raise ValueError(f"{rest}: commands run as root of the sandbox only")

    def _run(self, rest: str) -> None:
        if rest.startswith("--"):
            raise ValueError(f"the option {rest.partition(' ')[0]} is not supported")
        if re.search(r"<<-?['\"]?\w", rest):
            raise ValueError("a here-document is not supported: COPY a script and run it")
        argv = _json_array(rest) or ("/bin/sh", "-c", rest)
        installed = packages_of(rest if argv[0] == "/bin/sh" else shlex.join(argv))
        if installed is not None:
            self.packages += installed
            return
        self.add([setup_command({**self.args, **self.env}, argv, cwd=self.workdir)])

    def _copy(self, rest: str, *, extracts: bool) -> None:
        while rest.startswith("--"):
            option, _, rest = rest.partition(" ")
            if not re.fullmatch(r"--chown=(root|0)(:(root|0))?|--link", option):
                raise ValueError(f"the option {option} is not supported")
        words = [self._expand(w) for w in _json_array(rest) or shlex.split(rest)]
        if not 2 <= len(words) <= STEPS_COUNT_MAX:
            raise ValueError(f"write 1 to {STEPS_COUNT_MAX - 1} sources and a target")
        *sources, target = words
        folder = self._absolute(target)
        found = [_select(self.files, source) for source in sources]
        is_folder = len(sources) > 1 or target.endswith(("/", "/.")) or target == "." or folder in self.folders
        for source, (files, is_file) in zip(sources, found, strict=True):
            if extracts and is_file and source.endswith(_ARCHIVE_ENDS):
                self._make(folder)
                self.add(unpack(file.data, folder, self.env) for file in files.values())
            elif is_file and len(files) == 1 and not is_folder:
                self._make(posixpath.dirname(folder))
                renamed = {posixpath.basename(folder): file for file in files.values()}
                self.add_files(renamed, posixpath.dirname(folder))
            else:
                self._make(folder)
                self.add_files(files, folder)

    def _make(self, path: str) -> None:
        if path not in self.folders:
            self.add([make_folders(self.env, path)])
            self.folders.add(path)

    def _absolute(self, path: str) -> str:
        joined = "/" + posixpath.normpath(posixpath.join(self.workdir, path)).lstrip("/")
        if len(joined.encode()) > PATH_BYTES_MAX:
            raise ValueError(f"{joined[:80]}...: a path has at most {PATH_BYTES_MAX} bytes")
        return joined

    def _expand(self, text: str) -> str:
        """`text` with its variables replaced; ValueError as soon as those of one instruction are too long."""
        if "${" in _VARIABLE.sub(" ", text):
            raise ValueError("a variable in braces is ${V}, ${V:-x} or ${V:+x}, with no $ in x")
        known = ChainMap(self.env, self.args)

        def value(match: re.Match[str]) -> str:
            found = known.get(match[1] or match[2], "")
            if match[3] == ":-":
                found = found or match[4]
            elif match[3] == ":+":
                found = match[4] if found else ""
            self.room_bytes -= len(found.encode())
            if self.room_bytes < 0:
                raise ValueError(f"its variables come to more than {ARG_BYTES_MAX} bytes")
            return found

        return _VARIABLE.sub(value, text)


def check_variables(variables: Mapping[str, str]) -> None:
    """ValueError if variables are more than a program can be started with."""
    for name, value in variables.items():
        if len(f"{name}={value}".encode()) > ARG_BYTES_MAX:
            raise ValueError(f"{name} is longer than {ARG_BYTES_MAX} bytes, the most that one variable can hold")
    total = sum(_string_bytes(name) + _string_bytes(value) for name, value in variables.items())
    if total > VARIABLES_BYTES_MAX:
        raise ValueError(f"the variables need {total} bytes together, more than {VARIABLES_BYTES_MAX}")


def command_bytes(command: Command) -> int:
    """Bytes that a command holds, and that logging it takes, rounded up."""
    strings = (*command.argv, *command.env, *command.env.values(), command.cwd)
    return len(command.stdin) + sum(map(_string_bytes, strings))


def _string_bytes(text: str) -> int:
    return len(text.encode()) + _STRING_ROOM_BYTES


def _json_array(text: str) -> tuple[str, ...] | None:
    """The strings of a JSON-array form; None if `text` is the shell form."""
    if not text.startswith("["):
        return None
    try:
        words = json.loads(text)
    except ValueError:
        return None
    except RecursionError:
        raise ValueError("the array is nested too deeply: it takes one or more strings") from None
    if not (isinstance(words, list) and words and all(isinstance(w, str) for w in words)):
        raise ValueError("the array form takes one or more strings")
    return tuple(words)


def _select(files: Mapping[str, TaskFile], source: str) -> tuple[dict[str, TaskFile], bool]:
    """Files that a COPY source names, by their name below the target, and whether it named files (no folder)."""
    if re.match(r"\w+://|git@", source):
        raise ValueError(f"{source}: there is no network; put the file into environment/")
    path = posixpath.normpath(source.lstrip("/") or ".")
    if path.startswith(".."):
        raise ValueError(f"{source} lies outside environment/")
    if path == ".":
        return dict(files), False
    found, is_file = dict[str, TaskFile](), True
    pattern = path.split("/")
    for name, file in files.items():
        parts = name.split("/")
        if len(parts) >= len(pattern) and all(map(fnmatch.fnmatchcase, parts, pattern)):
            is_file = is_file and len(parts) == len(pattern)
            found["/".join(parts[len(pattern) :]) or parts[-1]] = file
    if not found:
        raise ValueError(f"{source}: no such file in environment/")
    return found, is_file
