"""The Dockerfile subset: what becomes commands, and what is refused with its line."""

from __future__ import annotations

import io
import tarfile
import tracemalloc

import pytest

from dsec.edge.commands import encode_command
from dsec.types import STDIN_BYTES_MAX, Command
from rollout.bench.archive import TaskFile, pack, upload
from rollout.bench.dockerfile import (
    BASE_ENV,
    DOCKERFILE_BYTES_MAX,
    SETUP_BYTES_MAX,
    STEPS_COUNT_MAX,
    Image,
    build,
    command_bytes,
)
from rollout.bench.packages import Package


def image(dockerfile: str, **files: bytes) -> Image:
    named = {name.replace("__", "/").replace("_dot_", "."): TaskFile(data) for name, data in files.items()}
    return build({"Dockerfile": TaskFile(f"FROM debian:bookworm-slim\n{dockerfile}".encode()), **named})


def uploads(built: Image) -> dict[str, bytes]:
    """Absolute name -> contents of everything that the commands upload as our own tars."""
    found = {}
    for command in built.commands:
        if command.argv[0] == "tar" and command.stdin[257:262] == b"ustar":
            with tarfile.open(fileobj=io.BytesIO(command.stdin)) as tar:
                for member in tar:
                    body = tar.extractfile(member)
                    assert body is not None
                    found[f"{command.argv[-1]}/{member.name}".replace("//", "/")] = body.read()
    return found


def runs(built: Image) -> list[Command]:
    return [c for c in built.commands if c.argv[0] not in ("tar", "mkdir")]


def test_without_a_dockerfile_every_file_is_copied_to_app() -> None:
    built = build({"a.txt": TaskFile(b"1"), "b/c": TaskFile(b"2")})
    assert (built.workdir, uploads(built)) == ("/app", {"/app/a.txt": b"1", "/app/b/c": b"2"})


def test_a_real_bug_fix_task_becomes_an_unpacked_archive_and_a_commit() -> None:
    built = image(
        "RUN apt-get update && apt-get install -y git python3-pytest \\\n    && rm -rf /var/lib/apt/lists/*\n"
        "ADD repo.tar.gz /app/\nWORKDIR /app\nENV PYTHONPATH=/app/src\nRUN git init -q && git add -A -f\n",
        repo_dot_tar_dot_gz=b"\x1f\x8bgzip",
    )
    assert built.packages == (Package("git"), Package("python3-pytest"))
    assert built.env == {**BASE_ENV, "PYTHONPATH": "/app/src"}
    assert [c.argv for c in built.commands] == [
        ("mkdir", "-p", "--", "/app"),
        ("tar", "-x", "-z", "--no-same-owner", "-C", "/app"),
        ("/bin/sh", "-c", "git init -q && git add -A -f"),
    ]
    assert (built.commands[1].stdin, built.commands[2].cwd) == (b"\x1f\x8bgzip", "/app")


def test_equal_files_give_equal_commands_whatever_their_order() -> None:
    files = {name: TaskFile(name.encode()) for name in ("b", "a", "c/d")}
    assert build(files) == build(dict(reversed(files.items())))


def test_workdir_is_relative_to_the_one_before() -> None:
    assert image("WORKDIR /a\nWORKDIR b/../c\n").workdir == "/a/c"


def test_an_executable_file_stays_executable() -> None:
    with tarfile.open(fileobj=io.BytesIO(pack({"x": TaskFile(b"", is_executable=True), "y": TaskFile(b"")}))) as tar:
        assert [(m.name, m.mode, m.mtime, m.uid) for m in tar] == [("x", 0o755, 0, 0), ("y", 0o644, 0, 0)]


@pytest.mark.parametrize(
    ("line", "wanted"),
    [
        ("COPY d/ /x/", {"/x/f.txt": b"2"}),
        ("COPY d /x", {"/x/f.txt": b"2"}),
        ("COPY d/f.txt /x/g.txt", {"/x/g.txt": b"2"}),
        ("COPY d/f.txt /x/", {"/x/f.txt": b"2"}),
        ("COPY a.txt d/f.txt sub/", {"/sub/a.txt": b"1", "/sub/f.txt": b"2"}),
        ('COPY ["a.txt", "/with space/"]', {"/with space/a.txt": b"1"}),
        ("COPY *.txt /x/", {"/x/a.txt": b"1"}),
        ("COPY --chown=root:root a.txt .", {"/a.txt": b"1"}),
        ("ADD a.txt /x/", {"/x/a.txt": b"1"}),
        ("ENV T=/y\nCOPY a.txt ${T}/b/", {"/y/b/a.txt": b"1"}),
        ("ARG T=/y\nCOPY a.txt $T/", {"/y/a.txt": b"1"}),
        ("WORKDIR /w\nCOPY a.txt /w", {"/w/a.txt": b"1"}),
    ],
)
def test_copy_puts_files_where_docker_would(line: str, wanted: dict[str, bytes]) -> None:
    assert uploads(image(line, a_dot_txt=b"1", d__f_dot_txt=b"2")) == wanted


@pytest.mark.parametrize(
    ("line", "env"),
    [
        ("ENV A=1 B='two words'", {"A": "1", "B": "two words"}),
        ("ENV A two words", {"A": "two words"}),
        ("ENV PATH=/opt/bin:$PATH", {"PATH": f"/opt/bin:{BASE_ENV['PATH']}"}),
        ("ENV A=${MISSING:-x}${HOME:+y}", {"A": "xy"}),
    ],
)
def test_env_sets_variables(line: str, env: dict[str, str]) -> None:
    assert image(line).env == {**BASE_ENV, **env}


def test_run_sees_folder_and_variables_of_its_place() -> None:
    first, second = runs(image('ARG V=1\nRUN one\nWORKDIR /w\nENV A=2\nRUN ["two", "x y"]\n'))
    assert (first.argv, first.cwd, first.env["V"], "A" in first.env) == (("/bin/sh", "-c", "one"), "/", "1", False)
    assert (second.argv, second.cwd, second.env["A"], second.timeout_s) == (("two", "x y"), "/w", "2", 600)


def test_comments_and_continued_lines_are_joined_as_docker_joins_them() -> None:
    (run,) = runs(image("# a comment\nRUN one && \\\n# inside\n\n  two\n"))
    assert run.argv[-1] == "one &&   two"


def test_instructions_that_change_nothing_here_are_accepted() -> None:
    assert image("LABEL a=b\nEXPOSE 80\nUSER root\nCMD ['x']\nENTRYPOINT y\nARG unused\n").commands == ()


@pytest.mark.parametrize(
    ("dockerfile", "says"),
    [
        ("RUN x\n", "line 1: RUN: FROM must come first"),
        ("FROM alpine:3\n", "line 1: FROM: .*only Debian images"),
        ("FROM debian\nFROM debian\n", "line 2: FROM: a build of several stages"),
        ("FROM debian\n\n# c\nVOLUME /x\n", "line 4: VOLUME: this instruction is not supported"),
        ("FROM debian\nRUN a \\\n  b\nUSER alice\n", "line 4: USER: alice: commands run as root"),
        ("FROM debian\nCOPY missing /x/\n", "line 2: COPY: missing: no such file in environment/"),
        ("FROM debian\nCOPY ../x /x/\n", "lies outside environment/"),
        ("FROM debian\nCOPY --from=b x /x/\n", "the option --from=b is not supported"),
        ("FROM debian\nADD https://a/b /x/\n", "there is no network"),
        ("FROM debian\nRUN --mount=type=cache x\n", "the option --mount=type=cache"),
        ("FROM debian\nRUN <<EOF\nx\nEOF\n", "here-document is not supported"),
        ("FROM debian\nRUN apt-get install -y git && git init\n", "line 2: RUN: a RUN that installs packages"),
        ("FROM debian\nENV A='$B'\n", "a quoted \\$"),
        ("FROM debian\nENV A=${B:-$C}\n", "line 2: ENV: a variable in braces is"),
        (f"FROM debian\nENV A={'${B:-' * 20_000}\n", "line 2: ENV: a variable in braces is"),
        ("FROM debian\nENV 1A=2\n", "write NAME=value"),
        (f"FROM debian\nRUN {'[' * 50_000}\n", "line 2: RUN: the array is nested too deeply"),
        (f"FROM debian\nCOPY {'[' * 50_000}\n", "line 2: COPY: the array is nested too deeply"),
        ("FROM debian\nWORKDIR\n", "its argument is missing"),
        ("\n", "no FROM"),
    ],
)
def test_what_cannot_be_given_is_refused_with_its_line(dockerfile: str, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        build({"Dockerfile": TaskFile(dockerfile.encode())})


@pytest.mark.parametrize("name", [".dockerignore", "docker-compose.yaml"])
def test_files_that_would_change_the_build_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="is not supported: describe one container"):
        build({"Dockerfile": TaskFile(b"FROM debian\n"), name: TaskFile(b"")})


def test_a_tree_larger_than_one_command_takes_is_split_over_several() -> None:
    third = TaskFile(bytes(STDIN_BYTES_MAX // 3))
    commands = list(upload({str(i): third for i in range(4)}, "/x", {}))
    assert len(commands) == 2
    assert [command for command in commands if len(command.stdin) > STDIN_BYTES_MAX] == []


@pytest.mark.parametrize(
    ("dockerfile", "says"),
    [
        ("ENV A=xxxxxxxx\n" + "ENV A=$A$A$A$A$A$A$A$A\n" * 11, r"line 7: ENV: its variables come to more than 131071"),
        ("ARG A=xxxxxxxx\n" + "ARG A=$A$A$A$A$A$A$A$A\n" * 11, r"line 7: ARG: its variables come to more than 131071"),
        (f"ENV A={'x' * 100}\nWORKDIR /{'$A' * 100}\n", "line 3: WORKDIR: /x*...: a path has at most 4095 bytes"),
        (f"ENV A={'x' * 60_000}\nENV B=$A$A\nENV C=$B$A\n", "line 4: ENV: its variables come to more than 131071"),
        ("".join(f"ENV A{i}={'x' * 100}\n" for i in range(100)) + "RUN a\0b\n", r"line 102: RUN: .* zero byte"),
        ('RUN ["\\ud800"]\n', "line 2: RUN: .*can(no|')t be? ?encode"),
        ("RUN x\n" * STEPS_COUNT_MAX, f"line {STEPS_COUNT_MAX + 1}: RUN: more than {STEPS_COUNT_MAX} instructions"),
        ("WORKDIR /a/b/c\nRUN x\n" * 99 + f"COPY {'a.txt ' * 150}/x/\n", "line 200: COPY: more than 200 commands"),
        (f"COPY {'a.txt ' * STEPS_COUNT_MAX}/x/\n", "line 2: COPY: write 1 to 199 sources and a target"),
        ("#" * DOCKERFILE_BYTES_MAX, f"bytes: at most {DOCKERFILE_BYTES_MAX}; put data into files"),
    ],
    ids=range(10),
)
def test_a_small_dockerfile_that_grows_without_bound_is_refused_with_its_line(dockerfile: str, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        image(dockerfile, a_dot_txt=b"1")


def test_variables_that_no_program_can_be_started_with_are_refused() -> None:
    lines = f"ENV A={'x' * 60_000}\n" + "".join(f"ENV B{i}=$A$A\n" for i in range(9))
    with pytest.raises(ValueError, match="line 11: ENV: the variables need 1140585 bytes together, more than 1048576"):
        image(lines)


def test_a_tree_copied_again_and_again_is_refused_before_it_is_packed() -> None:
    tree = {f"f{i}": bytes(1 << 20) for i in range(9)}
    tracemalloc.start()
    with pytest.raises(ValueError, match=r"line 5: COPY: the files, .* more than 33554432 bytes: COPY each file once"):
        image("".join(f"COPY . /a{i}\n" for i in range(100)), **tree)
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak_bytes < 2 * SETUP_BYTES_MAX


def test_a_tree_of_tiny_files_counts_by_what_its_archive_holds() -> None:
    """A file of one byte takes a header and a block; a bound that added up contents would let this through."""
    tree = {f"f{i}": b"x" for i in range(9_000)}
    with pytest.raises(ValueError, match="line 5: COPY: the files"):
        image("".join(f"COPY . /a{i}\n" for i in range(5)), **tree)


def test_what_is_built_keeps_to_the_bounds_that_the_sandbox_and_the_log_have() -> None:
    built = image(f"ENV A={'x' * 100_000}\n" + "RUN true\n" * 150 + "COPY . /x\n", f=bytes(8 << 20))
    assert sum(map(command_bytes, built.commands)) <= SETUP_BYTES_MAX
    assert [command for command in built.commands if not encode_command(command)] == []
