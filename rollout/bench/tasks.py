"""A task: a folder in Harbor's format, checked and frozen.

A task comes from a folder on disk or, over the wire, as a mapping of file names to bytes; both go
through the same checks.  Loading reads, it runs nothing: what a sandbox needs is kept as commands
(`setup_commands`) that the Runner executes under the log's rules.  Errors name the folder, the
file, the rule and the way out, and those of all tasks of a root come together.

Invariants:
1. Equal files give an equal `Task`, digest included, on every machine.
2. No symlink is followed and no name leaves the task's folder.
3. A task that loads fits one record of the log, and each of its commands one command of the sandbox.

See: docs/formats/task.md.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import msgspec

from dsec.types import Command, SandboxSpec
from rollout.bench.archive import TaskFile, make_folders
from rollout.bench.dockerfile import PATH_BYTES_MAX, Image, build, check_variables
from rollout.bench.packages import missing_packages
from rollout.bench.task_toml import EnvironmentTable, TaskToml, parse_task_toml
from rollout.environment.network import Networks, refusals
from rollout.errors import TaskError

FILES_COUNT_MAX = 10_000
TASK_BYTES_MAX = 24 << 20
"""Names and contents of all files.  With SETUP_BYTES_MAX and the variables it stays below a record's 64 MiB, and
below a command's STDIN_BYTES_MAX, so that a file need not be split."""
TOML_BYTES_MAX = 256 << 10
NAME_BYTES_MAX = 512
INSTRUCTION_BYTES_MAX = 64 << 10
ERRORS_SHOWN_MAX = 20
LOG_FOLDERS = ("/logs/agent", "/logs/verifier", "/logs/artifacts")
BUNDLED = Path(__file__).parent / "bundled"
CACHE_FOLDER = "__pycache__"
"""What Python leaves beside sources that it ran is no part of a task."""
_PARTS = ("task.toml", "instruction.md", "environment", "tests", "solution")
_TASK_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_WAY_OUT = "a task is a folder with task.toml, instruction.md, environment/Dockerfile and tests/test.sh"


class Task(msgspec.Struct, frozen=True, kw_only=True):
    """One task.  `env` is the whole environment of the agent's commands; `verifier_env` and
    `solution_env` are added to it for test.sh and solve.sh; times in seconds.  Processes that the
    agent left running are killed before the tests, unless `keep_processes`.
    """

    name: str
    digest: str
    instruction: str
    workdir: str
    image: Image
    env: dict[str, str]
    verifier_env: dict[str, str]
    solution_env: dict[str, str]
    verifier_timeout_s: float
    agent_timeout_s: float
    keep_processes: bool
    sandbox: SandboxSpec
    tests: dict[str, TaskFile]
    solution: dict[str, TaskFile]
    network: Networks = Networks()

    @property
    def verifier_digest(self) -> str:
        """sha256 of tests/: two rewards with the same digest were given by the same tests."""
        return digest_files(self.tests)


def setup_commands(task: Task) -> tuple[Command, ...]:
    """What makes a fresh sandbox ready for the agent; in order, each must exit 0."""
    return (*task.image.commands, make_folders(task.image.env, task.workdir, *LOG_FOLDERS))


def load_task(folder: Path) -> Task:
    """Load one task folder.  TaskError."""
    name = folder.resolve().name
    if not folder.is_dir():
        raise TaskError(f"{folder}: no such folder: {_WAY_OUT}")
    return _make_task(name, str(folder), _read_folder(folder))


def load_tasks(root: Path) -> list[Task]:
    """Load every task folder of `root`, sorted by name, or `root` itself if it is one.

    Folders whose name begins with `.` or `_` are passed over.  TaskError tells all that is wrong.
    """
    if not root.is_dir():
        raise TaskError(f"{root}: no such folder: name a task folder, or a folder of task folders")
    if (root / "task.toml").exists():
        return [load_task(root)]
    folders = sorted(p for p in root.iterdir() if p.is_dir() and p.name[0] not in "._")
    if not folders:
        raise TaskError(f"{root}: no task in this folder: {_WAY_OUT}")
    tasks, errors = list[Task](), list[str]()
    for folder in folders:
        try:
            tasks.append(load_task(folder))
        except TaskError as why:
            errors.append(str(why))
    _raise_all(errors)
    return tasks


def task_from_files(name: str, files: Mapping[str, bytes]) -> Task:
    """Make a task of files that a client sent.  TaskError.

    Names are relative to the task's folder (`tests/test.sh`); a file is executable if its name ends
    in `.sh` or it begins with `#!`.
    """
    return _make_task(name, name, {k: TaskFile(v, k.endswith(".sh") or v[:2] == b"#!") for k, v in files.items()})


def check_packages(tasks: Iterable[Task]) -> None:
    """TaskError if this host lacks packages that the tasks' Dockerfiles install; asks dpkg-query."""
    wanted = {package: task.name for task in reversed(list(tasks)) for package in task.image.packages}
    missing = missing_packages(wanted)
    if missing:
        lines = [f"{wanted[p]}: needs {p.name} {p.version}".rstrip() + " on this host" for p in missing]
        install = " ".join(dict.fromkeys(p.name for p in missing))
        raise TaskError("\n".join([*lines, f"install what is missing: apt-get install {install}"]))


def check_networks(tasks: Iterable[Task], allowed: Networks) -> None:
    """TaskError if a task asks for a network that the operator does not allow in that phase."""
    _raise_all([f"{task.name}: {refusal}" for task in tasks for refusal in refusals(task.network, allowed)])


def digest_files(files: Mapping[str, TaskFile]) -> str:
    """sha256, in hex, over sorted names, executable bits, sizes and contents."""
    total = hashlib.sha256()
    for name in sorted(files):
        file = files[name]
        total.update(f"{name}\0{int(file.is_executable)}\0{len(file.data)}\0".encode())
        total.update(file.data)
    return total.hexdigest()


def _raise_all(errors: list[str]) -> None:
    if errors:
        more = len(errors) - ERRORS_SHOWN_MAX
        shown = [*errors[:ERRORS_SHOWN_MAX], *([f"and {more} more"] if more > 0 else [])]
        raise TaskError("\n".join(shown))


def _make_task(name: str, where: str, found: Mapping[str, TaskFile]) -> Task:
    files = {path: file for path, file in found.items() if CACHE_FOLDER not in path.split("/")}
    problems = list(_problems(name, files))
    toml, image = TaskToml(), build({})
    try:
        if "task.toml" in files and len(files["task.toml"].data) <= TOML_BYTES_MAX:
            toml = parse_task_toml(files["task.toml"].data)
    except ValueError as why:
        problems.append(f"task.toml: {why}")
    try:
        image = build(_below(files, "environment/"))
    except UnicodeDecodeError:
        problems.append("environment/Dockerfile: not UTF-8: save it as UTF-8")
    except ValueError as why:
        problems.append(f"environment/Dockerfile: {why}")
    table = toml.environment
    env = {**image.env, **table.env}
    problems += _bad_environment(table.workdir or image.workdir, env, toml)
    _raise_all([f"{where}: {problem}" for problem in problems])
    return Task(
        name=name,
        digest=digest_files(files),
        instruction=files["instruction.md"].data.decode().rstrip("\n"),
        workdir=table.workdir or image.workdir,
        image=image,
        env=env,
        verifier_env=toml.verifier.env,
        solution_env=toml.solution.env,
        verifier_timeout_s=toml.verifier.timeout_sec,
        agent_timeout_s=toml.agent.timeout_sec,
        keep_processes=toml.metadata.keep_processes,
        sandbox=_limits(table),
        tests=_below(files, "tests/"),
        solution=_below(files, "solution/"),
        network=toml.networks,
    )


def _limits(table: EnvironmentTable) -> SandboxSpec:
    """The sandbox's bounds.  Its disk is held in its memory, so it gets at most three quarters of that."""
    default = SandboxSpec()
    memory_bytes = default.memory_bytes if table.memory_mb is None else table.memory_mb << 20
    asked = default.disk_bytes if table.storage_mb is None else table.storage_mb << 20
    cpu_cores = default.cpu_cores if table.cpus is None else table.cpus
    return SandboxSpec(memory_bytes=memory_bytes, disk_bytes=min(asked, memory_bytes * 3 // 4), cpu_cores=cpu_cores)


def _below(files: Mapping[str, TaskFile], folder: str) -> dict[str, TaskFile]:
    return {name.removeprefix(folder): file for name, file in files.items() if name.startswith(folder)}


def _problems(name: str, files: Mapping[str, TaskFile]) -> Iterator[str]:
    """Each rule that the set of files breaks, as `file: rule: way out`."""
    if not _TASK_NAME.fullmatch(name):
        yield f"the name {name!r}: use letters, digits, `.`, `_` and `-`, at most 128, a letter or digit first"
    for needed in ("task.toml", "instruction.md", "tests/test.sh"):
        if needed not in files:
            yield f"{needed}: missing: {_WAY_OUT}"
    if not any(n.startswith("environment/") for n in files):
        yield "environment/: missing or empty: add environment/Dockerfile (`FROM debian:bookworm-slim`, `WORKDIR /app`)"
    if any(n.startswith("solution/") for n in files) and "solution/solve.sh" not in files:
        yield "solution/solve.sh: missing, though there is a solution/"
    yield from _bad_names(files)
    yield from _bad_sizes(files)
    if "instruction.md" in files:
        try:
            text = files["instruction.md"].data.decode()
        except UnicodeDecodeError:
            yield "instruction.md: not UTF-8: save it as UTF-8"
        else:
            if not text.strip():
                yield "instruction.md: empty: say what the agent shall do"


def _bad_names(files: Mapping[str, TaskFile]) -> Iterator[str]:
    for name in sorted(files):
        parts = name.split("/")
        if not set(parts).isdisjoint(("", ".", "..")) or "\\" in name or not name.isprintable():
            yield f"{name!r}: not a plain relative path: no `..`, no leading `/`, no backslash, no control characters"
        elif len(name.encode(errors="replace")) > NAME_BYTES_MAX:
            yield f"{name[:80]}...: the name is longer than {NAME_BYTES_MAX} bytes"
        elif any("/".join(parts[:i]) in files for i in range(1, len(parts))):
            yield f"{name}: lies below a name that is a file"


def _bad_environment(workdir: str, env: Mapping[str, str], toml: TaskToml) -> Iterator[str]:
    if len(workdir.encode()) > PATH_BYTES_MAX:
        yield f"task.toml: environment.workdir: a path has at most {PATH_BYTES_MAX} bytes"
    for name, more in (("verifier", toml.verifier.env), ("solution", toml.solution.env)):
        try:
            check_variables({**env, **more})
        except ValueError as why:
            yield f"task.toml: environment.env and {name}.env: {why}"


def _bad_sizes(files: Mapping[str, TaskFile]) -> Iterator[str]:
    if len(files) > FILES_COUNT_MAX:
        yield f"{len(files)} files: at most {FILES_COUNT_MAX}; pack them into a tar.gz and ADD it"
    total = sum(len(name.encode(errors="replace")) + len(file.data) for name, file in files.items())
    if total > TASK_BYTES_MAX:
        yield f"{total} bytes of files: at most {TASK_BYTES_MAX}; large trees belong into a compressed archive"
    for name, limit in (("instruction.md", INSTRUCTION_BYTES_MAX), ("task.toml", TOML_BYTES_MAX)):
        if name in files and len(files[name].data) > limit:
            yield f"{name}: {len(files[name].data)} bytes: at most {limit}"


def _read_folder(folder: Path) -> dict[str, TaskFile]:
    """The files of a task folder that the format names; what else lies there is not part of the task."""
    files: dict[str, TaskFile] = {}
    total = 0
    for path in _walk(folder, folder):
        name = path.relative_to(folder).as_posix()
        try:
            with path.open("rb") as file:
                status = os.fstat(file.fileno())
                total += status.st_size + len(os.fsencode(name))
                if len(files) >= FILES_COUNT_MAX or total > TASK_BYTES_MAX:
                    raise TaskError(f"{folder}: over {FILES_COUNT_MAX} files or {TASK_BYTES_MAX} bytes at {name}")
                files[name] = TaskFile(file.read(), bool(status.st_mode & 0o100))
        except OSError as why:
            raise TaskError(f"{folder}: {name}: cannot be read: {why.strerror}") from why
    return files


def _walk(folder: Path, top: Path) -> Iterator[Path]:
    for entry in sorted(folder.iterdir()):
        if (folder == top and entry.name not in _PARTS) or entry.name == CACHE_FOLDER:
            continue
        if entry.is_symlink():
            raise TaskError(f"{top}: {entry.relative_to(top)}: is a symlink: put the file itself there")
        if entry.is_dir():
            yield from _walk(entry, top)
        elif entry.is_file():
            yield entry
        else:
            raise TaskError(f"{top}: {entry.relative_to(top)}: is neither a file nor a folder: remove it")
