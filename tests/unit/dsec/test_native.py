"""The C side under the sanitizers: its parser with damaged input, and the whole of it at work."""

import subprocess
from pathlib import Path

import pytest

from dsec.conformance import execution, isolation, output, port
from dsec.edge.config import NATIVE_BINARY, SubstrateConfig
from dsec.edge.substrates.container import ContainerSubstrate

NATIVE = NATIVE_BINARY.parent
SANITIZE = ["gcc", "-std=c11", "-Wall", "-Wextra", "-Werror", "-g", "-O1", "-fno-sanitize-recover=all",
            "-fsanitize=address,undefined", f"-I{NATIVE}"]  # fmt: skip


def test_no_damaged_command_makes_the_parser_read_out_of_bounds(tmp_path: Path) -> None:
    program = tmp_path / "fuzz"
    source = Path(__file__).with_name("native") / "fuzz_wire.c"
    subprocess.run([*SANITIZE, "-o", str(program), str(source), str(NATIVE / "wire.c")], check=True)
    done = subprocess.run([str(program)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_refused_clone_is_the_commands_doing_only_where_their_own_limit_is_reached(tmp_path: Path) -> None:
    program = tmp_path / "crowded"
    sources = [Path(__file__).parent / "native/crowded.c", NATIVE / "command.c", NATIVE / "groups.c"]
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
    substrate = ContainerSubstrate(SubstrateConfig(binary_path=sanitized))
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
    ):
        await check.run(substrate)
    await substrate.close()
    assert [report.read_text() for report in sanitized.parent.glob("report*")] == []
