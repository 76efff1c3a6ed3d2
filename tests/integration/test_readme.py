"""Every block of the README and of docs/python.md runs as it stands; the README's beside an installed `.venv`."""

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


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """What a user sees after `make`: the commands in `.venv/bin`, and no run yet."""
    (tmp_path / ".venv").symlink_to(Path(sys.prefix))
    return tmp_path


def test_every_block_is_a_picture_or_is_run_here() -> None:
    pictures = [text for _, text in BLOCKS if text not in SHELL + PYTHON]
    assert all("──" in text for text in pictures)
    assert (len(SHELL), len(PYTHON)) == (3, 1)


def test_every_make_line_names_a_target() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"^make ([a-z-]+)|`make ([a-z-]+)`", README, re.MULTILINE))
    assert {"run", "test"} <= {one or other for one, other in named} <= targets


@pytest.mark.parametrize("block", [text for text in SHELL if "dsec run --resume" in text], ids=["kill it"])
def test_a_run_that_is_killed_as_the_readme_says_is_finished_as_it_says(dsec: Any, place: Path, block: str) -> None:
    cores = ",".join(map(str, sorted(os.sched_getaffinity(0))[:2]))  # on a big machine it would end before the kill
    ran = dsec("-c", cores, "bash", "-c", block, command="taskset", cwd=place)
    assert ran.code == 0, ran.out + ran.err
    said = r"(bash: .*Killed.*\n|WARNING .* cut \d+ bytes of an unfinished write .*\n)*"  # the shell's word, a repair's
    assert re.fullmatch(said, ran.err)
    assert ran.out.count("64 of 64 rollouts (100.0%)") == 1  # the killed run said nothing, the resume finished it
    assert re.findall(r"(\d+) tokens regenerated, (\d+) commands run twice", ran.out) == [("0", "0")]
    (resumed,) = re.findall(r"(\d+) rollouts resumed", ran.out)
    assert int(resumed) > 0
    assert "bug-1-000" in ran.out


@pytest.mark.parametrize("block", [text for text in SHELL if "dsec edge serve" in text], ids=["sandboxes"])
def test_a_sandbox_outlives_its_edge_as_the_readme_says(dsec: Any, place: Path, block: str) -> None:
    ran = dsec("-c", block, command="bash", cwd=place)
    assert ran.code == 0, ran.out + ran.err
    lines = ran.out.splitlines()
    assert "0 sandboxes taken up" in lines[0]
    assert re.fullmatch(r"\d+", lines[1])
    assert lines[1] == lines[2] == lines[4]  # it ran once, and its file is there after the kill
    assert "1 sandboxes taken up" in lines[3]
    original, copy = re.findall(r"^(\S+) +running +\S+ +host", ran.out, re.MULTILINE)
    assert lines[5] in (original, copy)
    assert re.search(r"^1 +build +finished +0 .* bash -c ", ran.out, re.MULTILINE)


@pytest.mark.parametrize("block", PYTHON, ids=["ten lines"])
def test_the_program_of_the_readme_prints_a_reward_for_each_rollout(dsec: Any, place: Path, block: str) -> None:
    (place / "program.py").write_text(block)
    ran = dsec.done("program.py", command=sys.executable, cwd=place)
    tasks = re.findall(r'"([a-z]+-\d+-\d+)"', block)
    lines = sorted(line.split() for line in ran.out.splitlines())
    assert [name for name, _, _ in lines] == sorted(f"{task}.{index}" for task in tasks for index in range(4))
    assert {reward for _, reward, _ in lines} <= {"0.0", "1.0"}
    assert all(int(count) > 0 for _, _, count in lines)


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
