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
REFUSABLE = ["malloc", "calloc", "realloc", "aligned_alloc", "pthread_create", "pthread_atfork"]
"""What the host may refuse; the harness stands between the engine and the C library there."""
VECTORS = ["-march=x86-64-v3"] if platform.machine() == "x86_64" else []


def build(folder: Path, *flags: str) -> Path:
    program = folder / "engine"
    sources = [*map(str, sorted(ENGINE.glob("*.c"))), str(HARNESS)]
    wraps = [f"-Wl,--wrap={name}" for name in REFUSABLE]
    subprocess.run(["gcc", *STRICT, *flags, *wraps, "-pthread", "-o", str(program), *sources, "-lm"], check=True)
    return program


def run(program: Path, threads_count: int = 1, *lacking: str) -> str:
    done = subprocess.run(
        [program, str(threads_count), *lacking], capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def shipped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("shipped"), "-O3", *VECTORS)


@pytest.fixture(scope="module")
def shipped_digest(shipped: Path) -> str:
    return run(shipped)


@pytest.fixture(scope="module")
def dotted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sanitized, and with pages so tiny that each tensor is an allocation of its own."""
    return build(tmp_path_factory.mktemp("dotted"), *SANITIZED, *VECTORS, "-DV4_PAGE_BYTES=64")


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


@pytest.mark.parametrize("lacking", [("helpers", "0"), ("helpers", "1"), ("unwatched",)], ids=" ".join)
def test_a_host_that_refuses_threads_gets_the_same_bits(
    shipped: Path, shipped_digest: str, lacking: tuple[str, ...]
) -> None:
    assert run(shipped, 3, *lacking) == shipped_digest


def test_where_the_blocks_of_a_model_lie_changes_no_bit(dotted: Path, shipped_digest: str) -> None:
    assert run(dotted, 3) == shipped_digest


@pytest.mark.parametrize("threads_count", [1, 3])
def test_memory_that_ends_anywhere_while_loading_gives_no_model_and_no_leak(dotted: Path, threads_count: int) -> None:
    """Each allocation fails in turn, whatever the kind of the first layer; the leak sanitizer counts the rest."""
    assert run(dotted, threads_count, "short") == ""


def test_a_model_has_as_many_blocks_as_it_needs(dotted: Path) -> None:
    """43 layers of 256 experts are more than 22,000 of them."""
    assert run(dotted, 3, "deep") == ""
