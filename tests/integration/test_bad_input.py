"""Bad input: each fault is one clear line that names the thing and the way out, and nothing is lost or made."""

from __future__ import annotations

import json
import shutil
import socket
from pathlib import Path
from typing import Any

import pytest


def refused(ran: Any, *said: str, code: int = 2) -> None:
    """One line on stderr with all of `said`, the right exit code, nothing on stdout."""
    assert (ran.code, ran.out) == (code, ""), ran
    assert len(ran.err.splitlines()) == 1, ran.err
    assert ran.err.startswith("dsec: ")
    for text in said:
        assert text in ran.err


NEEDED = {
    "task.toml": "task.toml: missing: a task is a folder with task.toml",
    "instruction.md": "instruction.md: missing: a task is a folder with task.toml",
    "tests/test.sh": "tests/test.sh: missing: a task is a folder with task.toml",
    "environment/Dockerfile": "environment/: missing or empty: add environment/Dockerfile",
    "solution/solve.sh": "solution/solve.sh: missing, though there is a solution/",
}


def test_tasks_that_miss_a_file_are_refused_all_at_once_and_nothing_runs(
    dsec: Any, make_task: Any, tmp_path: Path
) -> None:
    tasks = [make_task(tmp_path / "tasks" / f"no-{number}") for number in range(len(NEEDED))]
    for task, missing in zip(tasks, NEEDED, strict=True):
        (task / "solution/notes.md").write_text("so that there is a solution folder")
        (task / missing).unlink()
    make_task(tmp_path / "tasks/good")
    (make_task(tmp_path / "tasks/toml") / "task.toml").write_text("[agent\n")
    ran = dsec("run", tmp_path / "tasks", "--out", tmp_path / "run")
    assert (ran.code, ran.out) == (2, "")
    *lines, last = ran.err.removeprefix("dsec: ").splitlines()
    for line, task, said in zip(lines, tasks, NEEDED.values(), strict=True):
        assert line.startswith(f"{task}: {said}")
    assert last.startswith(f"{tmp_path}/tasks/toml: task.toml: not TOML")
    assert not (tmp_path / "run").exists()


def test_one_task_that_misses_a_file_is_one_line(dsec: Any, make_task: Any, tmp_path: Path) -> None:
    task = make_task(tmp_path / "mine")
    (task / "tests/test.sh").unlink()
    refused(dsec("run", task, "--out", tmp_path / "run"), f"{task}: ", NEEDED["tests/test.sh"])
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--temperature", "-1"), "temperature is -1.0, must be 0 (greedy) or 0.001 to 10"),
        (("--temperature", "nan"), "temperature is nan, must be 0 (greedy) or 0.001 to 10"),
        (("--seed", "-1"), "seed is -1, must fit 64 bits without sign"),
    ],
)
def test_a_value_out_of_bounds_is_refused(
    dsec: Any, make_task: Any, tmp_path: Path, options: tuple[str, str], said: str
) -> None:
    refused(dsec("run", make_task(tmp_path / "task"), "--out", tmp_path / "run", *options), said)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--bogus",), "No such option '--bogus'"),
        (("--group-size", "0"), "Invalid value for '--group-size': 0 is not in the range 1<=x<=1024"),
        (("--turns-max", "0"), "Invalid value for '--turns-max': 0 is not in the range x>=1"),
        (("--concurrency", "0"), "Invalid value for '--concurrency': 0 is not in the range 1<=x<=1024"),
        (("--thinking", "loud"), "Invalid value for '--thinking': 'loud' is not one of 'none', 'high', 'max'"),
        (("--seed", "x"), "Invalid value for '--seed': 'x' is not a valid integer"),
    ],
)
def test_a_flag_that_cannot_be_read_is_refused_with_the_usage(
    dsec: Any, make_task: Any, tmp_path: Path, options: tuple[str, ...], said: str
) -> None:
    ran = dsec("run", make_task(tmp_path / "task"), "--out", tmp_path / "run", *options)
    assert (ran.code, ran.out) == (2, "")
    assert ran.err.startswith("Usage: dsec run [OPTIONS] [TASKS_DIR]\nTry 'dsec run --help' for help.\n")
    assert f"Error: {said}" in ran.err
    assert not (tmp_path / "run").exists()


def test_a_setting_in_the_environment_that_is_no_good_is_named(dsec: Any, make_task: Any, tmp_path: Path) -> None:
    task = make_task(tmp_path / "task")
    ran = dsec("run", task, "--out", tmp_path / "run", env={"DSEC_LOG_SYNC": "interval(0)"})
    refused(ran, "environment variable DSEC_LOG_SYNC is 'interval(0)'", "must be above 0")
    ran = dsec("run", task, "--out", tmp_path / "run", env={"DSEC_EDGE_SANDBOXES_COUNT_MAX": "many"})
    refused(ran, "environment variable DSEC_EDGE_SANDBOXES_COUNT_MAX is 'many'", "valid integer")
    for name, value, said in (
        ("DSEC_CONCURRENCY", "abc", "valid integer"),
        ("DSEC_PROJECT_WEIGHTS", "abc", "write a JSON object of project to weight"),
        ("DSEC_REWARD_CALLABLES", "[a:b", "write module:function,module:function"),
    ):
        refused(dsec("run", task, "--out", tmp_path / "run", env={name: value}), f"variable {name} is '{value}'", said)


def test_a_bound_below_the_concurrency_is_named(dsec: Any, make_task: Any, tmp_path: Path) -> None:
    task, options = make_task(tmp_path / "task"), ("--out", tmp_path / "run", "--concurrency", 20)
    ran = dsec("run", task, *options, env={"DSEC_EDGE_SANDBOXES_COUNT_MAX": "19"})
    refused(ran, "20 rollouts at once need as many sandboxes, and DSEC_EDGE_SANDBOXES_COUNT_MAX allows 19")
    ran = dsec("-c", 'ulimit -n 64; exec "$@"', "-", dsec.path, "run", task, *options, command="bash")
    refused(ran, "20 rollouts at once need 416 open files, and this process may have 64: raise the hard limit")
    assert not (tmp_path / "run").exists()


def test_a_tasks_folder_that_holds_no_task_is_refused(dsec: Any, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    refused(dsec("run", tmp_path / "nothere", "--out", tmp_path / "run"), "nothere: no such folder: name a task folder")
    refused(dsec("run", tmp_path / "empty", "--out", tmp_path / "run"), "empty: no task in this folder: a task is")
    refused(dsec("run", tmp_path / "file", "--out", tmp_path / "run"), "file: no such folder")
    assert not (tmp_path / "run").exists()


def test_a_run_directory_that_cannot_be_is_refused(dsec: Any, make_task: Any, tmp_path: Path) -> None:
    task = make_task(tmp_path / "task")
    (tmp_path / "file").write_text("mine")
    refused(
        dsec("run", task, "--out", tmp_path / "file"), f"cannot use {tmp_path}/file as a run directory: File exists"
    )
    refused(dsec("run", task, "--out", "/proc/run"), "cannot use /proc/run as a run directory: No such file")
    refused(dsec("run", "--resume"), "--resume needs --out: which run shall be finished?")
    assert (tmp_path / "file").read_text() == "mine"


def test_a_run_that_was_refused_before_it_began_does_not_block_the_corrected_one(
    dsec: Any, make_task: Any, tmp_path: Path
) -> None:
    asked = ("run", make_task(tmp_path / "task"), "--agent", "nop", "--out", tmp_path / "run", "--json")
    ran = dsec(*asked, "--edge", f"unix:{tmp_path}/nosuch")
    assert (ran.code, ran.out) == (3, "")
    ran = dsec(*asked)
    assert (ran.code, ran.json()["finished"]) == (0, 1), ran


def test_looking_at_what_is_no_run_is_refused(dsec: Any, tmp_path: Path) -> None:
    for command in ("show", "log"):
        refused(dsec(command, tmp_path), f"{tmp_path} holds no run: there is no {tmp_path}/wal")


NO_REWARDS = {
    "nothing": ("true", "no reward: test.sh must write /logs/verifier/reward.txt or reward.json"),
    "empty": (": > /logs/verifier/reward.txt", "/logs/verifier/reward.txt: empty: write a number to it"),
    "garbage": ("echo lots > /logs/verifier/reward.txt", "'lots' cannot be read as a number"),
    "nan": ("echo nan > /logs/verifier/reward.txt", "reward is nan, not a finite number"),
    "unnamed": ('echo \'{"a": 1, "b": 2}\' > /logs/verifier/reward.json', 'none of them named "reward"'),
}


def test_a_verifier_without_a_reward_is_an_infrastructure_failure_and_no_zero(
    dsec: Any, make_task: Any, tmp_path: Path
) -> None:
    for name, (writes, _) in NO_REWARDS.items():
        make_task(tmp_path / "tasks" / name, test_sh=f"echo looking\n{writes}\nexit 3\n")
    make_task(tmp_path / "tasks/sound")
    ran = dsec("run", tmp_path / "tasks", "--out", tmp_path / "run", "--agent", "oracle", "--json")
    summary = ran.json()
    assert (ran.code, ran.err) == (1, "")
    assert [summary[key] for key in ("rollouts", "finished", "solved", "infra_failures")] == [6, 1, 1, 5]
    assert summary["tools_s"] > 0  # those that failed count, too
    records, rows = dsec.show(tmp_path / "run"), {row["task"]: row for row in summary["per_task"]}
    for name, (_, said) in NO_REWARDS.items():
        message = summary["infra_failure_messages"][f"{name}.0"]
        assert message.startswith(f"VERIFIER_ERROR: {name}: ")
        assert [text for text in (said, "exit code 3", "looking") if text not in message] == []
        record, row = records[f"{name}.0"], rows[name]
        assert (record["reward"]["value"], record["finish_reason"]) == (None, None)
        assert record["infra_failure"]["fault"] == "peer"
        assert (row["reward_mean"], row["infra_failures"], row["finished"]) == (None, 1, 0)
    assert (records["sound.0"]["reward"]["value"], records["sound.0"]["infra_failure"]) == (1, None)


def test_a_failed_rollout_is_taken_up_again_by_a_resume(dsec: Any, make_task: Any, tmp_path: Path) -> None:
    task = make_task(tmp_path / "task", test_sh="[ $RANDOM -ge 0 ] || echo 1 > /logs/verifier/reward.txt\n")
    first = dsec("run", task, "--out", tmp_path / "run", "--agent", "oracle", "--json")
    again = dsec("run", "--resume", "--out", tmp_path / "run", "--json")
    for ran, resumes in ((first, 0), (again, 1)):
        assert ran.code == 1
        summary = ran.json()
        assert (summary["infra_failures"], summary["resumes"], summary["commands_run_twice"]) == (1, resumes, 0)


def test_an_oracle_without_a_solution_is_a_failure_of_the_task(dsec: Any, make_task: Any, tmp_path: Path) -> None:
    task = make_task(tmp_path / "task")
    shutil.rmtree(task / "solution")
    ran = dsec("run", task, "--out", tmp_path / "run", "--agent", "oracle", "--json")
    assert ran.code == 1
    assert "solution/solve.sh: missing: the oracle has nothing to run" in json.dumps(ran.json())


def test_one_directory_has_one_writer_and_ports_one_server(dsec: Any, make_task: Any, tmp_path: Path) -> None:
    task = make_task(tmp_path / "task")
    server = dsec.start("serve", "--out", tmp_path / "run", "--listen", "127.0.0.1:0")
    try:
        address = server.stdout.readline().split()[2].rstrip(",")
        refused(
            dsec("run", task, "--out", tmp_path / "run"), f"is locked by process {server.pid}: a log has one writer"
        )
        refused(dsec("serve", "--out", tmp_path / "run", "--listen", "127.0.0.1:0"), "is locked by process")
        other = dsec("serve", "--out", tmp_path / "other", "--listen", address)
        refused(other, f"cannot listen on {address}: the port is in use")
    finally:
        server.terminate()
        server.communicate(timeout=120)
    assert server.returncode == 0


@pytest.mark.parametrize("listen", ["7710", "127.0.0.1:65536", "two words:1"])
def test_an_address_that_is_none_is_refused(dsec: Any, tmp_path: Path, listen: str) -> None:
    ran = dsec("serve", "--out", tmp_path / "run", "--listen", listen)
    refused(ran, f"{listen!r} is no address: give unix:PATH, HOST:PORT or tls:HOST:PORT")


def test_an_address_of_another_machine_is_refused(dsec: Any, tmp_path: Path) -> None:
    env = {"DSEC_ROLLOUT_KEY": "correct-horse-battery"}
    ran = dsec("serve", "--out", tmp_path / "run", "--listen", "192.0.2.1:7710", env=env)
    assert ran.code == 2
    assert "dsec: cannot listen on 192.0.2.1:7710: the port is in use or the host is not ours" in ran.err
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", 7710)) != 0
