"""Every file of examples/ runs as it stands."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def test_every_example_is_run_here() -> None:
    assert {path.name for path in EXAMPLES.glob("*.py")} == {
        "grpo_group.py",
        "log_tokens.py",
        "pack_for_training.py",
        "run_in_process.py",
        "sandbox.py",
        "submit_group.py",
        "three_modes.py",
    }


def test_the_log_example_goes_on_where_it_stopped(dsec: Any, tmp_path: Path) -> None:
    for count in (5, 10):
        ran = dsec.done(EXAMPLES / "log_tokens.py", tmp_path / "log", command=sys.executable)
        *durable, haiku, limerick = ran.out.splitlines()
        assert len(durable) == 5
        assert haiku.startswith(f"haiku {list(range(count))} ")
        assert limerick.startswith(f"limerick {list(range(count))} ")


def test_the_in_process_example_prints_rewards_and_goes_on_where_it_stood(dsec: Any, tmp_path: Path) -> None:
    first = dsec.done(EXAMPLES / "run_in_process.py", tmp_path / "run", command=sys.executable)
    again = dsec.done(EXAMPLES / "run_in_process.py", tmp_path / "run", command=sys.executable)
    lines = first.out.splitlines()
    assert len(lines) == 8
    assert [line for line in lines if line.split()[1] not in ("0.0", "1.0")] == []
    assert sorted(again.out.splitlines()) == sorted(lines)


def test_the_three_modes_are_shown_with_what_they_thought_and_solved(dsec: Any, tmp_path: Path) -> None:
    asked = ("copy-1-000", tmp_path / "modes", "--group-size", "2")
    first = dsec.done(EXAMPLES / "three_modes.py", *asked, command=sys.executable)
    assert dsec.done(EXAMPLES / "three_modes.py", *asked, command=sys.executable).out == first.out
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in first.out.splitlines() if "│" in line]
    assert [(row[0], row[1]) for row in rows] == [
        ("Non-think", "0 of 256"),
        ("High", "256 of 512"),
        ("Max", "1024 of 1280"),
    ]
    none, high, most = ({"prompt": int(row[2]), "thought": int(row[3])} for row in rows)
    assert none["thought"] == 0 < min(high["thought"], most["thought"])
    assert none["prompt"] == high["prompt"] < most["prompt"]
    other = dsec(EXAMPLES / "three_modes.py", "sort-1-000", tmp_path / "modes", command=sys.executable)
    said = f"{tmp_path / 'modes'} holds the logs of another task, size or seed: name another DIRECTORY\n"
    assert (other.code, other.err) == (1, said)
    assert "usage: three_modes.py" in dsec.done(EXAMPLES / "three_modes.py", "--help", command=sys.executable).out


def test_the_sandbox_example_runs_against_an_edge_and_leaves_nothing(
    dsec: Any, edge_process: Any, tmp_path: Path
) -> None:
    edge = edge_process(dsec, tmp_path)
    try:
        ran = dsec.done(EXAMPLES / "sandbox.py", command=sys.executable, env=edge.env)
        assert ran.out.splitlines() == [
            "sum 42",
            "runs 1",
            "runs 1",
            "said ['got a', 'got b']",
            "timed out True 137",
            "fork has ['add.py', 'runs']",
            "fork has ['add.py', 'runs']",
        ]
        assert edge.done("ps", "-q") == ""
    finally:
        edge.stop()


def test_the_group_example_prints_rewards_of_a_bundled_task_and_of_a_folder(
    dsec: Any, make_task: Any, tmp_path: Path
) -> None:
    server = dsec.start("serve", "--out", tmp_path / "server", "--listen", "127.0.0.1:0")
    try:
        address = server.stdout.readline().split()[2].rstrip(",")
        for task in ("copy-1-000", make_task(tmp_path / "mine")):
            ran = dsec.done(EXAMPLES / "submit_group.py", address, task, command=sys.executable)
            *lines, mean = ran.out.splitlines()
            rewards = [float(line.split()[1]) for line in lines]
            assert len(rewards) == 4
            assert mean == f"mean {sum(rewards) / 4:.2f} of 4"
    finally:
        server.terminate()
        server.communicate(timeout=120)


def test_the_group_example_attaches_again_after_a_crash_and_tells_a_wrong_task_in_a_line(
    dsec: Any, tmp_path: Path
) -> None:
    serve = ("serve", "--out", tmp_path / "server", "--listen")
    server = dsec.start(*serve, "127.0.0.1:0")
    try:
        address = server.stdout.readline().split()[2].rstrip(",")
        wrong = dsec(EXAMPLES / "submit_group.py", address, "nosuch", command=sys.executable)
        assert (wrong.code, len(wrong.err.splitlines())) == (1, 1), wrong
        dsec.kill(server)
        example = dsec.start(EXAMPLES / "submit_group.py", address, "copy-1-000", command=sys.executable)
        assert example.stderr.readline().endswith("; asking again\n")
        server = dsec.start(*serve, address)
        out, _ = example.communicate(timeout=120)
        assert (example.returncode, out.splitlines()[-1][-4:]) == (0, "of 4")
    finally:
        server.terminate()
        server.communicate(timeout=120)


def test_fifteen_lines_drive_a_grpo_group_and_again_after_a_crash_the_same(dsec: Any, tmp_path: Path) -> None:
    server = dsec.start("serve", "--out", tmp_path / "server", "--listen", "127.0.0.1:0")
    try:
        address = server.stdout.readline().split()[2].rstrip(",")
        ran = dsec.done(EXAMPLES / "grpo_group.py", address, "copy-1-000", "sort-1-000", command=sys.executable)
        unknown = dsec(EXAMPLES / "grpo_group.py", address, "no-such-task", command=sys.executable)
    finally:
        server.terminate()
        server.communicate(timeout=120)
    (said,) = unknown.err.splitlines()
    assert "no bundled task no-such-task" in said
    lines = ran.out.splitlines()
    assert len(lines) == 18
    assert [line.split()[0] for line in lines if "mean" in line and line.endswith("whole")] != []
    advantages = [float(line.split()[1]) for line in lines if line.endswith("tokens")]
    assert abs(sum(advantages)) < 0.1
    code = (EXAMPLES / "grpo_group.py").read_text().rpartition('"""')[2]
    assert len([line for line in code.splitlines() if line]) <= 15


def test_the_group_example_fits_on_a_screen() -> None:
    assert len((EXAMPLES / "submit_group.py").read_text().splitlines()) <= 45
