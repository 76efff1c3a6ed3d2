"""The C engine under sanitizers and under other instruction sets: clean, and the same bits."""

import platform
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
ENGINE = ROOT / "rollout/engines/embedded"
HARNESS = Path(__file__).with_suffix(".c")
STRICT = ["-std=c11", "-Wall", "-Wextra", "-Werror", "-ffp-contract=off", "-fno-math-errno", f"-I{ENGINE}"]
SANITIZED = ["-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
VECTORS = ["-march=x86-64-v3"] if platform.machine() == "x86_64" else []


def build(folder: Path, *flags: str) -> Path:
    program = folder / "engine"
    sources = [*map(str, sorted(ENGINE.glob("*.c"))), str(HARNESS)]
    subprocess.run(["gcc", *STRICT, *flags, "-pthread", "-o", str(program), *sources, "-lm"], check=True)
    return program


def run(program: Path, threads_count: int = 1) -> str:
    done = subprocess.run([program, str(threads_count)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def shipped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("shipped"), "-O3", *VECTORS)


@pytest.fixture(scope="module")
def shipped_digest(shipped: Path) -> str:
    return run(shipped)


def test_every_path_is_clean_under_address_and_undefined_behaviour_sanitizers(
    tmp_path: Path, shipped_digest: str
) -> None:
    assert run(build(tmp_path, *SANITIZED, *VECTORS), threads_count=3) == shipped_digest


def test_a_build_without_vector_instructions_computes_the_same_bits(tmp_path: Path, shipped_digest: str) -> None:
    assert run(build(tmp_path, "-O1", "-DV4_PORTABLE")) == shipped_digest


def test_vectors_of_eight_and_of_sixteen_compute_the_same_bits(tmp_path: Path, shipped_digest: str) -> None:
    """The shipped build takes the widest the processor has; here it is held to eight."""
    assert run(build(tmp_path, "-O3", *VECTORS, "-DV4_NARROW")) == shipped_digest


@pytest.mark.parametrize("threads_count", [2, 3, 16])
def test_any_number_of_threads_computes_the_same_bits(shipped: Path, shipped_digest: str, threads_count: int) -> None:
    assert run(shipped, threads_count) == shipped_digest


def test_the_threads_are_clean_under_the_thread_sanitizer(tmp_path: Path, shipped_digest: str) -> None:
    assert run(build(tmp_path, "-O1", "-g", "-fsanitize=thread", *VECTORS), threads_count=3) == shipped_digest
