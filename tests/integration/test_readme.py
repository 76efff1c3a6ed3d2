"""Every block of the README, docs/python.md and docs/training.md runs as it stands; the README's beside a `.venv`."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from dsec.client.commands import RunOptions
from dsec.client.sandbox import CreateOptions

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()
FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
BLOCKS = FENCED.findall(README)
SHELL = [text for language, text in BLOCKS if not language and text.startswith((".venv/bin/", "make "))]
PYTHON = [text for language, text in BLOCKS if language == "python"]

# What the README's seconds are for, however slow this host is.
UNTIL_MUCH_IS_LOGGED = (
    "while kill -0 $! && [ $(cat runs/kill/wal/*.wal | tr -d '\\0' | wc -c) -lt 200000 ]; "
    "do sleep 0.1; done 2> /dev/null"
)
UNTIL_IT_LISTENS = (
    "while kill -0 $! && ! [ -s told ]; do sleep 0.1; done; read -r _ _ address _ < told; cat told; rm told"
)


def patient(block: str) -> str:
    """The block, with what it starts waited for."""
    patient, count = re.subn(r"& sleep 3$", f"> told & {UNTIL_IT_LISTENS}", block, flags=re.MULTILINE)
    assert count == block.count("sleep 3") > 0
    return patient


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """What a user sees after `make`: the commands in `.venv/bin`, and no run yet."""
    (tmp_path / ".venv").symlink_to(Path(sys.prefix))
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    return tmp_path


def test_every_block_is_a_picture_or_is_run_here() -> None:
    pictures = [text for _, text in BLOCKS if text not in SHELL + PYTHON]
    assert [text for text in pictures if "──" not in text] == []
    assert (len(SHELL), len(PYTHON)) == (4, 1)


def test_every_make_line_names_a_target() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"^make ([a-z-]+)|`make ([a-z-]+)`", README, re.MULTILINE))
    assert {"run", "test"} <= {one or other for one, other in named} <= targets


@pytest.mark.parametrize("block", [text for text in SHELL if "dsec run --resume" in text], ids=["kill it"])
def test_a_run_that_is_killed_as_the_readme_says_is_finished_as_it_says(dsec: Any, place: Path, block: str) -> None:
    cores = ",".join(map(str, sorted(os.sched_getaffinity(0))[:2]))  # on a big machine it would end before the kill
    assert block.count("sleep 3;") == 1
    block = block.replace("sleep 3;", f"{UNTIL_MUCH_IS_LOGGED};")
    ran = dsec("-c", cores, "bash", "-c", block, command="taskset", cwd=place)
    assert ran.code == 0, ran.out + ran.err
    repaired = r"[-\d:, ]+ WARNING .* cut \d+ bytes of an unfinished write .*\n"
    assert re.fullmatch(rf"(bash: .*Killed.*\n|{repaired})*", ran.err)
    assert ran.out.count("64 of 64 rollouts (100.0%)") == 1  # the killed run said nothing, the resume finished it
    assert re.findall(r"(\d+) tokens regenerated, (\d+) commands run twice", ran.out) == [("0", "0")]
    (resumed,) = re.findall(r"(\d+) rollouts resumed", ran.out)
    assert int(resumed) > 0
    assert "bug-1-000" in ran.out


@pytest.mark.parametrize("block", [text for text in SHELL if "dsec edge serve" in text], ids=["sandboxes"])
def test_a_sandbox_outlives_its_edge_as_the_readme_says(dsec: Any, place: Path, block: str) -> None:
    assert block.count("kill -9 $!; sleep 1 ") == 1
    block = patient(block).replace("kill -9 $!; sleep 1 ", "kill -9 $!; wait $! ")
    ran = dsec("-c", block, command="bash", cwd=place)
    assert ran.code == 0, ran.out + ran.err
    lines = ran.out.splitlines()
    assert "0 sandboxes taken up" in lines[0]
    assert re.fullmatch(r"\d+", lines[1])
    assert lines[1] == lines[2] == lines[4]  # it ran once, and its file is there after the kill
    assert "1 sandbox taken up" in lines[3]
    original, copy = re.findall(r"^(\S+) +running +\S+ +host", ran.out, re.MULTILINE)
    assert lines[5] in (original, copy)
    assert re.search(r"^1 +build +finished +0 .* bash -c ", ran.out, re.MULTILINE)


@pytest.mark.parametrize("block", [text for text in SHELL if "dsec serve" in text], ids=["a trainer"])
def test_a_trainer_gets_groups_from_a_service_as_the_readme_says(dsec: Any, place: Path, block: str) -> None:
    assert block.count("127.0.0.1:7710") == 2
    block = patient(block).replace("--listen 127.0.0.1:7710", "--listen 127.0.0.1:0")  # the port may be somebody's here
    block = block.replace("127.0.0.1:7710", "${address%,}")
    ran = dsec("-c", block, command="bash", cwd=place)
    assert ran.code == 0, ran.out + ran.err
    members = re.findall(r"^grpo-step-1/(\S+)\.(\d) [+-]\d\.\d\d \d+ of \d+ tokens$", ran.out, re.MULTILINE)
    assert sorted(members) == [(name, str(n)) for name in ("copy-1-000", "sort-1-000") for n in range(8)]
    assert len(re.findall(r"^grpo-step-1/\S+ mean \d\.\d\d whole$", ran.out, re.MULTILINE)) == 2


@pytest.mark.parametrize("block", PYTHON, ids=["the trainer's program"])
def test_the_program_of_the_readme_is_the_example(block: str) -> None:
    assert (ROOT / "examples" / "grpo_group.py").read_text().endswith(f'"""\n\n{block}')


def test_the_page_about_training_is_one_program(dsec: Any, tmp_path: Path) -> None:
    blocks = FENCED.findall((ROOT / "docs" / "training.md").read_text())
    assert {language for language, _ in blocks} == {"python"}
    server = dsec.start("serve", "--out", tmp_path / "server", "--listen", "127.0.0.1:0")
    try:
        address = server.stdout.readline().split()[2].rstrip(",")
        program = tmp_path / "program.py"
        program.write_text(f"ADDRESS = {address!r}\n" + "".join(text for _, text in blocks))
        lines = dsec.done(program, command=sys.executable).out.splitlines()
    finally:
        server.terminate()
        server.communicate(timeout=120)
    assert sorted(line.split()[0] for line in lines[:2]) == ["step-1/copy-1-000", "step-1/sort-1-000"]
    assert re.fullmatch(r"\d+ step-2/count-1-000\.0 \d+ tokens", lines[2])
    assert re.fullmatch(r"STOP [01]\.0 \d+", lines[3])
    assert re.fullmatch(r"\d+ tokens, of which the last has logprob -\d.*", lines[4])
    assert [line.split()[0] for line in lines[5:8]] == ["action", "domain", "read_url"]
    assert sorted(lines[8:]) == [f"step-1/{name}.{n} ended" for name in ("copy-1-000", "sort-1-000") for n in range(4)]


def test_the_page_about_python_is_one_program_and_names_every_option(
    dsec: Any, edge_process: Any, tmp_path: Path
) -> None:
    page = (ROOT / "docs" / "python.md").read_text()
    blocks = FENCED.findall(page)
    assert {language for language, _ in blocks} == {"python"}
    program = tmp_path / "program.py"
    program.write_text("".join(text for _, text in blocks))
    edge = edge_process(dsec, tmp_path)
    try:
        ran = dsec.done(program, command=sys.executable, env=edge.env)
        assert edge.done("ps", "-q") == ""
    finally:
        edge.stop()
    lines = [line for line in ran.out.splitlines() if line]
    assert lines[:5] == ["HELLO", "0 b'42\\n' False False", "streamed got a", "0", "True"]
    assert lines[-1].startswith("'bash -c make' ended with 2: make: ")
    names = {*CreateOptions.__annotations__, *RunOptions.__annotations__}
    assert [name for name in sorted(names) if f"`{name}`" not in page] == []
