"""The C side under the sanitizers: its parser with damaged input, and the whole of it at work."""

import os
import re
import subprocess
from collections import Counter
from pathlib import Path

import pytest

from dsec.conformance import execution, isolation, lifecycle, output, port, processes, terminals, users
from dsec.edge.config import NATIVE_BINARY, SLOTS_COUNT_MAX, SubstrateConfig
from dsec.edge.native_wire import UIDS_PER_SLOT
from dsec.edge.substrates.container import ContainerSubstrate
from dsec.types import SandboxSpec

NATIVE = NATIVE_BINARY.parent
SANITIZE = ["gcc", "-std=c11", "-Wall", "-Wextra", "-Werror", "-g", "-O1", "-fno-sanitize-recover=all",
            "-fsanitize=address,undefined", f"-I{NATIVE}"]  # fmt: skip


TOOLBOX_PARTS = ("toolbox", "toolbox_files", "toolbox_tree", "toolbox_watch")


def test_no_damaged_command_makes_the_parser_read_out_of_bounds(tmp_path: Path) -> None:
    program = tmp_path / "fuzz"
    source = Path(__file__).with_name("native") / "fuzz_wire.c"
    subprocess.run([*SANITIZE, "-o", str(program), str(source), str(NATIVE / "wire.c")], check=True)
    done = subprocess.run([str(program)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_refused_clone_is_the_commands_doing_only_where_their_own_limit_is_reached(tmp_path: Path) -> None:
    program = tmp_path / "crowded"
    parts = ("command", "groups", "supervisor", "wire", "tty", "user", *TOOLBOX_PARTS)
    sources = [Path(__file__).parent / "native/crowded.c", *(NATIVE / f"{part}.c" for part in parts)]
    subprocess.run([*SANITIZE, "-o", str(program), *map(str, sources)], check=True)
    cases: dict[tuple[str, ...], str] = {
        ("64\n", "64\n"): "crowded 1",
        ("64\n", "65\n"): "crowded 1",
        ("0\n", "0\n"): "crowded 1",
        ("64\n", "63\n"): "host 16",
        ("max\n", "9999\n"): "host 16",
        ("", ""): "host 16",
        (): "host 16",
    }
    for number, (files, expected) in enumerate(cases.items()):
        group = tmp_path / str(number)
        group.mkdir()
        for name, text in zip(("pids.max", "pids.current"), files, strict=False):
            (group / name).write_text(text)
        done = subprocess.run([str(program), str(group)], capture_output=True, text=True, check=False)
        assert (done.returncode, done.stdout.strip()) == (0, expected), (files, done.stderr)


def test_users_of_all_slots_are_spread_over_the_lists_of_the_kernel() -> None:
    assert f"\n#define UIDS_PER_SLOT {UIDS_PER_SLOT}u\n" in (NATIVE / "protocol.h").read_text()
    firsts = (0x10000000 + slot * UIDS_PER_SLOT for slot in range(SLOTS_COUNT_MAX))
    lists = Counter(((uid >> 7) + uid) % 128 for uid in firsts)  # __uidhashfn of the kernel's user.c
    assert max(lists.values()) == SLOTS_COUNT_MAX // 128


async def test_no_guest_has_a_table_that_grows_with_the_sandboxes_of_its_host() -> None:
    def mapped_bytes(pid: int) -> int:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")

    substrate = ContainerSubstrate()
    await substrate.open()
    sandbox = await substrate.create(SandboxSpec())
    assert mapped_bytes(substrate.spawner.pid) - mapped_bytes(sandbox.host_pid) > SLOTS_COUNT_MAX * 2048
    await substrate.close()


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The spawner and guest with sanitizers; a wrapper sets what the empty environment cannot."""
    folder = tmp_path_factory.mktemp("native")
    program = folder / "dsec-sandbox"
    options = "detect_leaks=0:abort_on_error=1:handle_segv=0"
    main = folder / "options.c"
    main.write_text(f'const char *__asan_default_options(void) {{ return "{options}:log_path={folder}/report"; }}\n')
    sources = map(str, sorted(NATIVE.glob("*.c")))
    subprocess.run([*SANITIZE, "-o", str(program), *sources, str(main)], check=True)
    return program


async def test_sandboxes_work_under_the_sanitizers(sanitized: Path) -> None:
    substrate = ContainerSubstrate(SubstrateConfig(binary_path=sanitized, warm_count=2))
    await substrate.open()
    for check in (
        *port.CHECKS,
        execution.every_exit_code_comes_back,
        execution.a_missing_program_is_127_and_says_so,
        execution.a_missing_directory_is_refused_by_name,
        execution.a_megabyte_of_arguments_arrives,
        execution.a_timeout_kills_the_whole_tree_before_it_answers,
        execution.zombies_are_reaped,
        execution.commands_run_side_by_side,
        output.stdout_and_stderr_come_apart,
        isolation.dangerous_system_calls_are_refused,
        *processes.CHECKS,
        *terminals.CHECKS,
        *users.CHECKS,
        lifecycle.a_pause_keeps_processes_files_and_pipes,
    ):
        await check.run(substrate)
    await substrate.close()
    assert [report.read_text() for report in sanitized.parent.glob("report*")] == []


def test_the_toolbox_works_under_the_sanitizers(sanitized: Path, tmp_path: Path) -> None:
    toolbox = sanitized.with_name("toolbox")
    toolbox.symlink_to(sanitized)
    tree = tmp_path / "tree"

    def run(*arguments: str | Path, stdin: bytes = b"") -> tuple[int, bytes, bytes]:
        done = subprocess.run([str(toolbox), *map(str, arguments)], input=stdin, capture_output=True, check=False)
        return done.returncode, done.stdout, done.stderr

    data = os.urandom(700_000)
    assert run("write", tree / "a/b/c", "--parents", "--mode", "600", "--bytes", "700000", stdin=data) == (0, b"", b"")
    assert run("write", tree / "a/b/c", "--atomic", "--bytes", "9", stdin=b"short")[0] == 1
    assert run("read", tree / "a/b/c", "7", "100000") == (0, data[7:100_007], b"")
    assert run("--paced", "read", tree / "a/b/c", "0", "-", stdin=b"3\n5\n") == (0, data[:8], b"")
    assert run("--paced", "run", "sh", "-c", "echo out; exit 9", stdin=b"100\n") == (9, b"out\n", b"")
    assert run("list", tree, "128")[1].count(b"\0") == 3 * 8
    deep = tree
    for _ in range(300):
        deep /= "deeper"
    deep.mkdir(parents=True)
    (deep / "link").symlink_to("/")
    assert run("list", tree, "128")[1].count(b"\0") == (3 + 128) * 8
    for arguments in (("read",), ("read", "/", "0", "-"), ("nonsense",), (), ("write", "/dev/full"), ("list", "/", "0"),
                      ("read", tree / "a/b/c", "-1", "9"), ("read", tree / "a/b/c", "9" * 30, "9"),
                      ("rename", "/no/such", "/no/where"), ("--paced", "run", "/no/such")):  # fmt: skip
        code, _, said = run(*arguments)
        assert code in (1, 127), arguments
        assert re.fullmatch(rb"\d+ [^\n]+\n", said), arguments
    assert run("remove", tree, "--recursive") == (0, b"", b"")
    assert not tree.exists()
    assert [report.read_text() for report in sanitized.parent.glob("report*")] == []
