"""Task folders: what loads, what is refused, and how the refusal reads."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

import wal
from dsec.edge.commands import encode_command
from rollout import journal
from rollout.bench.archive import TaskFile
from rollout.bench.packages import Package, missing_packages, packages_of
from rollout.bench.tasks import (
    FILES_COUNT_MAX,
    TASK_BYTES_MAX,
    TOML_BYTES_MAX,
    Task,
    check_packages,
    load_task,
    load_tasks,
    setup_commands,
    task_from_files,
)
from rollout.errors import TaskError
from rollout.events import TaskAdmitted
from rollout.rewards.tests import solution_commands, verify_commands
from wal.testing import FaultyStorage

FILES = {
    "task.toml": b'schema_version = "1.4"\n',
    "instruction.md": b"Count the lines.\n",
    "environment/Dockerfile": b"FROM debian:bookworm-slim\nWORKDIR /app\nCOPY files/ /app/\n",
    "environment/files/a.txt": b"one\n",
    "tests/test.sh": b"#!/bin/bash\necho 1 > /logs/verifier/reward.txt\n",
    "solution/solve.sh": b"#!/bin/bash\ntrue\n",
}


def write(folder: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        path.chmod(0o755 if name.endswith(".sh") else 0o644)
    return folder


def without(*names: str) -> dict[str, bytes]:
    return {name: data for name, data in FILES.items() if name not in names}


def with_toml(text: str) -> Task:
    return task_from_files("t", {**FILES, "task.toml": text.encode()})


def test_a_folder_and_the_same_files_sent_inline_give_one_task(tmp_path: Path) -> None:
    assert load_task(write(tmp_path / "sum-1", FILES)) == task_from_files("sum-1", FILES)


def test_the_instruction_loses_only_its_trailing_newlines() -> None:
    files = {**FILES, "instruction.md": b"Create a.txt:\n one\n\n"}
    assert task_from_files("t", files).instruction == "Create a.txt:\n one"


@pytest.mark.parametrize("name", sorted(FILES))
def test_the_digest_depends_on_every_file(name: str) -> None:
    changed = task_from_files("t", {**FILES, name: FILES[name] + b"\n"})
    assert changed.digest != task_from_files("t", FILES).digest


def test_the_digest_depends_on_the_executable_bit(tmp_path: Path) -> None:
    before = load_task(write(tmp_path / "t", FILES)).digest
    (tmp_path / "t/solution/solve.sh").chmod(0o644)
    assert load_task(tmp_path / "t").digest != before


def test_files_beside_the_format_are_not_part_of_the_task(tmp_path: Path) -> None:
    before = load_task(write(tmp_path / "t", FILES))
    write(tmp_path / "t", {"README.md": b"notes\n", ".git/HEAD": b"x\n"})
    assert load_task(tmp_path / "t") == before


def test_limits_times_and_variables_come_from_task_toml() -> None:
    task = with_toml(
        "[verifier]\ntimeout_sec = 60\nenv = {A = '1'}\n[agent]\ntimeout_sec = 5.5\n"
        "[environment]\ncpus = 2\nmemory_mb = 64\nstorage_mb = 32\nworkdir = '/srv'\nenv = {B = '2'}\n"
        "[solution]\nenv = {C = '3'}\n"
    )
    assert (task.verifier_timeout_s, task.agent_timeout_s, task.workdir) == (60, 5.5, "/srv")
    sandbox = task.sandbox
    assert (sandbox.cpu_cores, sandbox.memory_bytes, sandbox.disk_bytes) == (2.0, 64 << 20, 32 << 20)
    assert (task.env["B"], task.verifier_env, task.solution_env) == ("2", {"A": "1"}, {"C": "3"})
    assert task.env["PATH"] == "/usr/local/bin:/usr/bin:/bin"
    assert "/srv" in setup_commands(task)[-1].argv


def test_unknown_keys_of_task_toml_are_let_through() -> None:
    assert with_toml("[new_table]\nx = 1\n[agent]\nnew_key = true\n").agent_timeout_s > 0


@pytest.mark.parametrize(
    ("toml", "says"),
    [
        ("[verifier]\ntimeout_sec = 'soon'\n", "verifier.timeout_sec"),
        ("[verifier]\ntimeout_sec = 0\n", "greater than 0"),
        ("[verifier]\ntimeout_sec = nan\n", "verifier.timeout_sec"),
        ("[environment]\nmemory_mb = 1.5\n", "environment.memory_mb"),
        ("[agent]\nallowed_hosts = ['a.example']\n", 'without network_mode = "allowlist"'),
        ("[verifier]\nnetwork_mode = 'public'\nallowed_hosts = []\n", "verifier.allowed_hosts"),
        ("[agent]\nnetwork_mode = 'allowlist'\nallowed_hosts = ['a example']\n", "neither a host name nor an address"),
        ("[agent]\nnetwork_mode = 'allowlist'\nallowed_hosts = ['a.example:0']\n", "no network rule"),
        ("[agent]\nnetwork_mode = 'allowlist'\nallowed_hosts = 'a.example'\n", "agent.allowed_hosts"),
        ("[environment]\nnetwork_mode = 'mesh'\n", "not one of"),
        ("[agent]\nuser = 'alice'\n", "root of the sandbox only"),
        ("[environment]\ndocker_image = 'x:1'\n", "environment/Dockerfile"),
        ("[environment]\ngpus = 1\n", "no GPUs"),
        ("[verifier]\nenv = {KEY = '${SECRET}'}\n", "host's environment"),
        ("[[steps]]\nname = 'a'\n", "several steps"),
        ("[environment\n", "not TOML"),
        ("x = " + "[" * 50_000, "nested too deeply"),
    ],
)
def test_a_bad_task_toml_is_told_with_its_key_and_the_way_out(toml: str, says: str) -> None:
    with pytest.raises(TaskError, match=r"t: task\.toml: ") as why:
        with_toml(toml)
    assert says in str(why.value)


@pytest.mark.parametrize("name", ["task.toml", "instruction.md", "tests/test.sh"])
def test_a_missing_file_is_named(name: str) -> None:
    with pytest.raises(TaskError, match=f"t: {name}: missing: a task is a folder with"):
        task_from_files("t", without(name))


def test_a_task_without_an_environment_is_refused() -> None:
    with pytest.raises(TaskError, match=r"environment/: missing or empty: add environment/Dockerfile"):
        task_from_files("t", without("environment/Dockerfile", "environment/files/a.txt"))


def test_every_broken_rule_of_a_task_is_told_at_once() -> None:
    with pytest.raises(TaskError) as why:
        task_from_files("t", {**without("tests/test.sh"), "instruction.md": b" \n", "task.toml": b"x = "})
    assert str(why.value).count("\n") == 2


@pytest.mark.parametrize("name", ["../x", "/etc/x", "tests/../../x", "tests//x", "tests/a\\b", "tests/a\nb", "."])
def test_a_name_that_could_leave_the_folder_is_refused(name: str) -> None:
    with pytest.raises(TaskError, match="not a plain relative path"):
        task_from_files("t", {**FILES, name: b""})


def test_a_name_below_a_file_is_refused() -> None:
    with pytest.raises(TaskError, match="lies below a name that is a file"):
        task_from_files("t", {**FILES, "tests/test.sh/more": b""})


@pytest.mark.parametrize("name", ["../t", "t\n", "", "a" * 129])
def test_a_task_name_that_is_no_plain_name_is_refused(name: str) -> None:
    with pytest.raises(TaskError, match="use letters, digits"):
        task_from_files(name, FILES)


def test_too_many_and_too_large_files_are_refused() -> None:
    with pytest.raises(TaskError, match="pack them into a tar"):
        task_from_files("t", {**FILES, **{f"tests/{i}": b"" for i in range(FILES_COUNT_MAX)}})
    third = bytes(TASK_BYTES_MAX // 3)
    with pytest.raises(TaskError, match="bytes of files: at most"):
        task_from_files("t", {**FILES, **{f"tests/{i}": third for i in range(3)}})
    with pytest.raises(TaskError, match=r"task\.toml: 262145 bytes: at most 262144"):
        task_from_files("t", {**FILES, "task.toml": b"\n" * (TOML_BYTES_MAX + 1)})


@pytest.mark.parametrize(
    ("toml", "says"),
    [
        (f"[environment]\nworkdir = '/{'x' * 5000}'\n", "workdir: a path has at most 4095 bytes"),
        (f"[verifier.env]\nA = '{'x' * 140_000}'\n", "verifier.env: A is longer than 131071 bytes"),
        (f"[solution.env]\nA = '{'x' * 140_000}'\n", "solution.env: A is longer than 131071 bytes"),
    ],
)
def test_what_no_command_could_be_started_with_is_refused_when_the_task_loads(toml: str, says: str) -> None:
    with pytest.raises(TaskError) as why:
        with_toml(toml)
    assert says in str(why.value)


def largest_task() -> Task:
    """A task at its bounds: one file copied until the setup is full, and all the rest of the room as tests."""
    variables = "".join(f"ENV V{i}={'x' * 12_000}\n" for i in range(8))
    packages = "RUN apt-get install " + " ".join(f"p{i}" for i in range(4_000)) + "\n"
    copies = "".join(f"COPY big /{i}/\n" for i in range(31))
    docker = f"FROM debian\n{copies}{packages}{variables}RUN true\n".encode()
    named = {f"tests/{i:04}-{'n' * 490}": b"" for i in range(9_000)}
    room = TASK_BYTES_MAX - sum(len(n) + len(d) for n, d in named.items()) - 70_000 - len(docker)
    big = 1 << 20
    files = {**FILES, "environment/Dockerfile": docker, "environment/big": bytes(big), **named}
    env = "\n".join(f"A{i} = '{'y' * 50_000}'" for i in range(5))
    files["task.toml"] = f"[verifier.env]\n{env}\n".encode()
    files["tests/rest"] = bytes(room - big - 300_000)
    return task_from_files("t", files)


def test_a_task_at_its_bounds_is_one_record_of_the_log_and_commands_that_the_sandbox_takes() -> None:
    task = largest_task()
    kind, payload = journal.encode(TaskAdmitted(task))
    log = wal.Log.open(Path("/log"), storage=FaultyStorage())
    log.append(kind, payload)
    log.close()
    assert len(payload) > 54 << 20, "near the bound, or this shows nothing"
    named = [c for _, c in (*verify_commands(task, "x"), *solution_commands(task))]
    for command in (*setup_commands(task), *named):
        assert encode_command(command)


def test_a_folder_larger_than_the_bound_is_refused_before_it_is_read(tmp_path: Path) -> None:
    folder = write(tmp_path / "t", FILES)
    with (folder / "tests/big").open("wb") as sparse:
        sparse.truncate(1 << 40)
    with pytest.raises(TaskError, match="at tests/big"):
        load_task(folder)


@pytest.mark.parametrize("link", ["tests/link", "environment", "solution"])
def test_a_symlink_is_refused_and_not_followed(tmp_path: Path, link: str) -> None:
    kept = {name: data for name, data in FILES.items() if not name.startswith(f"{link}/")}
    folder = write(tmp_path / "t", kept)
    (folder / link).symlink_to("/etc")
    with pytest.raises(TaskError, match=f"{link}: is a symlink"):
        load_task(folder)


def test_a_fifo_in_a_task_is_refused_and_not_opened(tmp_path: Path) -> None:
    folder = write(tmp_path / "t", FILES)
    os.mkfifo(folder / "tests/pipe")
    with pytest.raises(TaskError, match="neither a file nor a folder"):
        load_task(folder)


def test_a_root_gives_its_tasks_sorted_and_may_itself_be_one(tmp_path: Path) -> None:
    for name in ("b", "a", "_drafts", ".git"):
        write(tmp_path / name, FILES)
    assert [task.name for task in load_tasks(tmp_path)] == ["a", "b"]
    assert [task.name for task in load_tasks(tmp_path / "a")] == ["a"]


def test_the_errors_of_all_tasks_of_a_root_come_together(tmp_path: Path) -> None:
    write(tmp_path / "a", without("task.toml"))
    write(tmp_path / "b", FILES)
    write(tmp_path / "c", without("tests/test.sh"))
    with pytest.raises(TaskError) as why:
        load_tasks(tmp_path)
    assert [line.split(": ")[1] for line in str(why.value).split("\n")] == ["task.toml", "tests/test.sh"]


def test_an_empty_or_missing_root_says_what_a_task_is(tmp_path: Path) -> None:
    with pytest.raises(TaskError, match="no task in this folder: a task is a folder with"):
        load_tasks(tmp_path)
    with pytest.raises(TaskError, match="no such folder"):
        load_tasks(tmp_path / "nowhere")


def test_packages_that_the_host_lacks_are_told_with_the_command_that_installs_them() -> None:
    docker = b"FROM debian\nRUN apt-get update && apt-get install -y bash no-such-package-here\n"
    task = task_from_files("t", {**FILES, "environment/Dockerfile": docker})
    with pytest.raises(TaskError) as why:
        check_packages([task])
    assert str(why.value) == (
        "t: needs no-such-package-here on this host\ninstall what is missing: apt-get install no-such-package-here"
    )


def test_a_package_with_another_version_than_pinned_is_missing() -> None:
    assert missing_packages([Package("bash"), Package("bash", "0.1")]) == (Package("bash", "0.1"),)


@pytest.mark.parametrize(
    ("command", "names"),
    [
        ("apt-get update && apt-get install -y --no-install-recommends git python3", ["git", "python3"]),
        ("DEBIAN_FRONTEND=noninteractive apt install -t stable jq; rm -rf /var/lib/apt/lists/*", ["jq"]),
        ("set -eux; pip3 install -q -i http://x PyYAML pytest[dev]==8.1", ["python3-pyyaml", "python3-pytest"]),
        ("python3 -m pip install attrs", ["python3-attrs"]),
        ("apt-get update", []),
    ],
)
def test_installations_are_read_out_of_run_lines(command: str, names: list[str]) -> None:
    found = packages_of(command)
    assert found is not None
    assert [package.name for package in found] == names


def test_a_pip_pin_is_kept_as_the_version() -> None:
    assert packages_of("pip install pytest==8.1") == (Package("python3-pytest", "8.1"),)


@pytest.mark.parametrize("command", ["echo apt-get", "git init -q", "cp /usr/bin/pip /x"])
def test_a_run_line_that_installs_nothing_is_run(command: str) -> None:
    assert packages_of(command) is None


@pytest.mark.parametrize(
    "command",
    [
        "apt-get install -y git && git init",
        "apt-get update | tee log",
        "pip install -r need.txt",
        "pip install ./x",
        "pip install 'a>=2'",
        "pip install 'a\n'",
        "apt-get install 'a\n'",
    ],
)
def test_an_installation_that_cannot_be_stood_in_for_is_refused(command: str) -> None:
    with pytest.raises(ValueError, match=r"RUN of their own|not supported|not the name of a Debian package"):
        packages_of(command)


def test_a_file_sent_inline_is_executable_by_its_name_or_its_first_line() -> None:
    task = task_from_files("t", {**FILES, "tests/tool": b"#!/usr/bin/python3\n", "tests/data": b"x"})
    assert [task.tests[n].is_executable for n in ("test.sh", "tool", "data")] == [True, True, False]
    assert task.tests["data"] == TaskFile(b"x", is_executable=False)


def test_what_python_leaves_beside_its_sources_is_no_part_of_the_task(tmp_path: Path) -> None:
    folder = write(tmp_path / "t", FILES)
    before = load_task(folder)
    write(folder, {"tests/__pycache__/a.cpython-311.pyc": b"\0", "environment/files/__pycache__/b.pyc": b"\0"})
    assert load_task(folder) == before
    assert task_from_files("t", {**FILES, "tests/__pycache__/a.pyc": b"\0"}) == task_from_files("t", FILES)


def test_limits_in_the_older_spelling_are_refused_with_the_newer_one() -> None:
    with pytest.raises(TaskError, match="memory_mb"):
        with_toml('[environment]\nmemory = "2G"\n')
    with pytest.raises(TaskError, match="storage_mb"):
        with_toml('[environment]\nstorage = "10G"\n')
