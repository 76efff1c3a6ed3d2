"""Rewards of tests: the commands, run against a real file system, and how results are read."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import msgspec
import pytest

from dsec.types import Command, ExecResult, Output
from rollout.bench.tasks import Task, task_from_files
from rollout.errors import TaskError, VerifierError
from rollout.rewards.tests import REWARD_BYTES_MAX, Reward, reward_from, solution_commands, verify_commands


def make(test_sh: str = "true\n", **files: bytes) -> Task:
    base = {
        "task.toml": b"[verifier]\ntimeout_sec = 7.5\nenv = {V = '1'}\n[solution]\nenv = {S = '2'}\n",
        "instruction.md": b"x",
        "environment/Dockerfile": b"FROM debian\nWORKDIR /app\n",
        "tests/test.sh": test_sh.encode(),
    }
    return task_from_files("t", {**base, **files})


def moved(command: Command, root: Path) -> Command:
    """The command with /app, /tests, /logs and /solution below `root`, so that it needs no sandbox."""
    words = (re.sub(r"/(?=(app|tests|logs|solution)\b)", f"{root}/", word) for word in command.argv)
    return msgspec.structs.replace(command, argv=tuple(words), cwd=str(root) + command.cwd)


def execute(task: Task, root: Path, answer: str | None) -> list[tuple[str, ExecResult]]:
    results = []
    for name, command in verify_commands(task, answer):
        real = moved(command, root)
        env = {**real.env, "R": str(root)}
        done = subprocess.run(real.argv, cwd=real.cwd, env=env, input=real.stdin, capture_output=True, check=False)
        results.append((name, result(done.stdout, done.returncode)))
    return results


def result(stdout: bytes = b"", exit_code: int = 0, *, timed_out: bool = False) -> ExecResult:
    return ExecResult(exit_code=exit_code, stdout=Output(head=stdout), timed_out=timed_out)


def read(printed: bytes, ran: ExecResult | None = None) -> Reward:
    return reward_from(make(), [("test.sh", ran or result()), ("read reward", result(printed))])


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "app").mkdir()
    return tmp_path


def test_the_tests_run_from_the_workdir_and_their_number_is_the_reward(root: Path) -> None:
    task = make('[ "$PWD" = "$R/app" ] && [ "$V" = 1 ] && echo 0.25 > "$R/logs/verifier/reward.txt"\nexit 3\n')
    reward = reward_from(task, execute(task, root, ""))
    assert reward == Reward(0.25, {"reward": 0.25}, task.verifier_digest)


def test_the_tests_find_the_final_message(root: Path) -> None:
    task = make('grep -qx "it is 4 \N{SNOWMAN}" "$R/logs/agent/answer.txt" && echo 1 > "$R/logs/verifier/reward.txt"\n')
    assert reward_from(task, execute(task, root, "it is 4 \N{SNOWMAN}")).value == 1


def test_a_reward_that_the_agent_left_behind_does_not_count(root: Path) -> None:
    (root / "logs/verifier").mkdir(parents=True)
    (root / "logs/verifier/reward.json").write_text('{"reward": 1}')
    (root / "tests").mkdir()
    (root / "tests/conftest.py").write_text("")
    task = make('[ ! -e "$R/tests/conftest.py" ] && echo 0 > "$R/logs/verifier/reward.txt"\n')
    assert reward_from(task, execute(task, root, "")).value == 0


@pytest.mark.parametrize("link", ["logs", "tests", "app"])
def test_an_agent_that_put_a_link_or_nothing_in_place_of_a_folder_is_graded(root: Path, link: str) -> None:
    (root / "app").rmdir()
    (root / "elsewhere").mkdir()
    (root / "elsewhere/kept").touch()
    (root / link).symlink_to(root / "elsewhere/kept")
    task = make('echo 0 > "$R/logs/verifier/reward.txt"\n')
    assert reward_from(task, execute(task, root, "")).value == 0
    assert (root / "elsewhere/kept").exists()


def test_the_oracle_keeps_the_message_that_its_script_wrote(root: Path) -> None:
    (root / "logs/agent").mkdir(parents=True)
    (root / "logs/agent/answer.txt").write_text("4\n")
    task = make('cp "$R/logs/agent/answer.txt" "$R/logs/verifier/reward.txt"\n')
    assert reward_from(task, execute(task, root, None)).value == 4


def test_reward_json_goes_before_reward_txt(root: Path) -> None:
    task = make('cd "$R/logs/verifier"; echo 1 > reward.txt; echo \'{"speed": 0.5, "reward": 0.75}\' > reward.json\n')
    reward = reward_from(task, execute(task, root, ""))
    assert (reward.value, reward.components) == (0.75, {"speed": 0.5, "reward": 0.75})


def test_tests_that_write_no_reward_are_an_error_with_the_end_of_their_output(root: Path) -> None:
    task = make("echo starting; echo broken >&2; exit 4\n")
    with pytest.raises(VerifierError, match="no reward: ") as why:
        reward_from(task, execute(task, root, ""))
    assert "exit code 4" in str(why.value)
    assert "starting" in str(why.value)


def test_a_huge_reward_file_is_an_error_and_is_not_read_whole(root: Path) -> None:
    task = make(f'head -c {1 << 20} /dev/zero > "$R/logs/verifier/reward.txt"\n')
    results = execute(task, root, "")
    assert len(results[-1][1].stdout.data) < 2 * REWARD_BYTES_MAX
    with pytest.raises(VerifierError, match=f"over {REWARD_BYTES_MAX} bytes"):
        reward_from(task, results)


def test_the_only_number_of_a_reward_json_is_the_value() -> None:
    assert read(b'reward.json\n{"score": 2}').value == 2


@pytest.mark.parametrize(
    ("printed", "says"),
    [
        (b"reward.txt\n \n", "empty"),
        (b"reward.txt\nnan", "not a finite number"),
        (b"reward.txt\n-inf", "not a finite number"),
        (b"reward.txt\none", "cannot be read as a number"),
        (b"reward.json\n{", "cannot be read as JSON"),
        (b"reward.json\n[1]", "must hold an object"),
        (b"reward.json\n{}", "must hold an object"),
        (b'reward.json\n{"reward": true}', "not a finite number"),
        (b'reward.json\n{"reward": NaN}', "not a finite number"),
        (b'reward.json\n{"reward": 1, "x": "y"}', "not a finite number"),
        (b'reward.json\n{"reward": 1' + b"0" * 400 + b"}", "not a finite number"),
        (b'reward.json\n{"a": 1, "b": 2}', "none of them named"),
        (b"reward.json\n" + b"[" * 50_000, "cannot be read as JSON"),
        (b"none\n", "no reward"),
    ],
)
def test_a_reward_file_without_a_reward_is_an_error_and_not_zero(printed: bytes, says: str) -> None:
    with pytest.raises(VerifierError, match=says):
        read(printed)


def test_tests_that_ran_out_of_time_are_an_error() -> None:
    with pytest.raises(VerifierError, match=r"no end within 7\.5 s"):
        read(b"reward.txt\n1", result(b"slow", 137, timed_out=True))


def test_a_step_before_the_tests_that_fails_is_named() -> None:
    with pytest.raises(VerifierError, match="upload tests: exit code 2, output ends:\ntar: no space"):
        reward_from(make(), [("upload tests", result(b"tar: no space\n", 2))])


def test_results_that_stop_before_the_tests_are_an_error() -> None:
    with pytest.raises(VerifierError, match="did not run to its end"):
        reward_from(make(), [("clean", result())])


def test_the_verifier_digest_changes_with_the_tests_only() -> None:
    assert make("a\n").verifier_digest != make("b\n").verifier_digest
    assert make("a\n").verifier_digest == make("a\n", **{"solution/solve.sh": b"x"}).verifier_digest


def test_the_solution_runs_from_the_workdir_with_its_variables() -> None:
    *_, (name, run) = solution_commands(make(**{"solution/solve.sh": b"x"}))
    assert (name, run.argv, run.cwd, run.env["S"]) == ("solve.sh", ("bash", "/solution/solve.sh"), "/app", "2")


def test_a_task_without_a_solution_has_no_oracle() -> None:
    with pytest.raises(TaskError, match="the oracle has nothing to run"):
        solution_commands(make())
