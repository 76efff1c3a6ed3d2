"""Generated tasks: reproducible, loadable, and graded by checks that tell right from wrong."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from rollout.bench.dockerfile import BASE_ENV
from rollout.bench.tasks import BUNDLED, load_tasks
from training.curriculum.__main__ import FAMILIES, main, make_problem
from training.curriculum.draw import words
from training.curriculum.folder import files_of

SEED = 1
COUNT = 64


class Trial:
    """A task in folders that stand for the sandbox's /app, /tests and /logs."""

    def __init__(self, task: Path, root: Path) -> None:
        self.task, self.root, self.app = task, root, root / "app"
        for folder in (self.app, root / "logs/agent"):
            folder.mkdir(parents=True)
        if (task / "environment/files").is_dir():
            shutil.copytree(task / "environment/files", self.app, dirs_exist_ok=True)

    def answer(self, text: str) -> None:
        (self.root / "logs/agent/answer.txt").write_text(text)

    def solve(self) -> None:
        self.run(self.task / "solution/solve.sh")

    def reward(self) -> str:
        self.run(self.task / "tests/test.sh")
        return (self.root / "logs/verifier/reward.txt").read_text().strip()

    def run(self, script: Path) -> None:
        folders = {"APP_DIR": self.app, "TESTS_DIR": self.task / "tests", "LOGS_DIR": self.root / "logs"}
        env = {**BASE_ENV, **{name: str(path) for name, path in folders.items()}}
        subprocess.run(["bash", script], cwd=self.app, env=env, check=True, capture_output=True, timeout=60)


@pytest.fixture
def trial(tmp_path: Path) -> Callable[..., Trial]:
    """Makes a trial of a bundled task; by default of the first one of a family."""

    def make(family: str, index: int = 0) -> Trial:
        return Trial(BUNDLED / f"{family}-{SEED}-{index:03d}", tmp_path / f"{family}{index}")

    return make


def contents(root: Path) -> dict[str, tuple[bytes, int]]:
    return {
        str(path.relative_to(root)): (path.read_bytes(), path.stat().st_mode & 0o111)
        for path in root.rglob("*")
        if path.is_file()
    }


def test_the_bundled_tasks_are_what_seed_1_gives(tmp_path: Path) -> None:
    assert main([str(tmp_path / "again"), "--count", str(COUNT), "--seed", str(SEED)]) == 0
    assert contents(tmp_path / "again") == contents(BUNDLED)


def test_all_bundled_tasks_load_and_each_family_has_as_many() -> None:
    tasks = load_tasks(BUNDLED)
    assert Counter(task.name.partition("-")[0] for task in tasks) == dict.fromkeys(FAMILIES, COUNT // len(FAMILIES))
    assert len({task.digest for task in tasks}) == COUNT


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_an_untouched_tree_scores_0_and_the_solution_1(tmp_path: Path, family: str) -> None:
    for task in sorted(BUNDLED.glob(f"{family}-*")):
        untouched, solved = Trial(task, tmp_path / f"{task.name}-nop"), Trial(task, tmp_path / f"{task.name}-oracle")
        solved.solve()
        assert (task.name, untouched.reward(), solved.reward()) == (task.name, "0", "1")


@pytest.mark.parametrize("family", sorted(set(FAMILIES) - {"create"}))
def test_a_solved_task_whose_other_files_were_lost_scores_0(trial: Callable[..., Trial], family: str) -> None:
    tried = trial(family)
    tried.solve()
    for path in tried.app.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert tried.reward() == "0"


@pytest.mark.parametrize("family", sorted(set(FAMILIES) - {"bug", "writefn"}))
def test_one_more_line_in_any_file_scores_0(trial: Callable[..., Trial], family: str) -> None:
    tried = trial(family)
    tried.solve()
    for path in sorted(p for p in tried.app.rglob("*") if p.is_file()):
        before = path.read_text()
        path.write_text(before + "more\n")
        assert tried.reward() == "0"
        path.write_text(before)
    assert tried.reward() == "1"


def test_a_file_that_was_to_go_but_stayed_scores_0(trial: Callable[..., Trial]) -> None:
    for family in ("move", "delete"):
        tried = trial(family)
        kept = {path: path.read_bytes() for path in tried.app.iterdir()}
        tried.solve()
        for path, body in kept.items():
            path.write_bytes(body)
        assert tried.reward() == "0"


def test_a_lookup_is_graded_by_the_final_message(trial: Callable[..., Trial]) -> None:
    problem = make_problem("lookup", SEED, 0)
    tried = trial("lookup")
    for said, reward in (
        (f"The value is {problem.answer}.", "1"),
        (f"{problem.answer}x", "0"),
        (f"{problem.answer} or {problem.wrong_answers[0]}", "0"),
        ("", "0"),
    ):
        tried.answer(said)
        assert (said, tried.reward()) == (said, reward)


def test_a_result_copied_from_the_visible_test_scores_0(trial: Callable[..., Trial]) -> None:
    for family in ("bug", "writefn"):
        program = make_problem(family, SEED, 0).program
        assert program is not None
        tried = trial(family)
        source = f"def {program.function}(*_):\n    return {program.cases[0][1]!r}\n"
        (tried.app / f"{program.module}.py").write_text(source)
        assert tried.reward() == "0"


def test_a_test_file_that_was_made_to_pass_scores_0(trial: Callable[..., Trial]) -> None:
    for family in ("bug", "writefn"):
        tried = trial(family)
        for path in tried.app.glob("test_*.py"):
            path.write_text('print("PASS")\n')
        assert tried.reward() == "0"


def test_code_that_prints_pass_and_ends_the_process_scores_0(trial: Callable[..., Trial]) -> None:
    for family in ("bug", "writefn"):
        program = make_problem(family, SEED, 0).program
        assert program is not None
        tried = trial(family)
        (tried.app / f"{program.module}.py").write_text("import os\nprint('PASS', flush=True)\nos._exit(0)\n")
        assert tried.reward() == "0"


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_fresh_seeds_give_fresh_tasks_that_are_not_solved_at_the_start(family: str) -> None:
    problems = [make_problem(family, seed, index) for seed in range(40) for index in range(2)]
    assert len({problem.request for problem in problems}) == len(problems)
    for problem in problems:
        changed = any(problem.files.get(name) != body for name, body in problem.expected.items())
        assert changed or problem.gone or problem.answer or problem.program


def test_a_task_does_not_depend_on_count_or_on_the_other_families(tmp_path: Path) -> None:
    main([str(tmp_path), "--count", "3", "--seed", str(SEED), "--families", "sort"])
    assert contents(tmp_path / "sort-1-002") == contents(BUNDLED / "sort-1-002")


def test_the_settings_of_a_config_task_occur_once_so_that_an_edit_can_name_them() -> None:
    for seed in range(60):
        problem = make_problem("setcfg", seed, 0)
        ((name, before),) = problem.files.items()
        (changed,) = set(before.splitlines()) - set(problem.expected[name].splitlines())
        assert before.count(changed) == 1


def test_the_word_list_is_plain_and_sorted() -> None:
    assert list(words()) == sorted(set(words()))
    assert [word for word in words() if re.fullmatch(r"[a-z]{3,9}", word) is None] == []


def test_the_files_of_a_task_end_with_a_newline() -> None:
    for family in FAMILIES:
        files = files_of("t", family, make_problem(family, 3, 0))
        assert [name for name, body in files.items() if not body.endswith("\n")] == []


def test_json_rows_name_what_was_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main([str(tmp_path), "--count", "2", "--seed", "5", "--families", "copy", "wc", "--json"])
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["name"] for row in rows] == ["copy-5-000", "wc-5-000"]
    for row in rows:
        assert (Path(row["folder"]) / "instruction.md").read_text() == row["request"] + "\n"


def test_a_folder_in_the_way_is_told_and_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "create-1-000").mkdir()
    (tmp_path / "create-1-000/mine").touch()
    assert main([str(tmp_path), "--count", "1"]) == 1
    assert "create-1-000: File exists: choose an empty folder" in capsys.readouterr().err
    assert [path.name for path in tmp_path.rglob("*")] == ["create-1-000", "mine"]


@pytest.mark.parametrize("wrong", [["--count", "0"], ["--count", "many"], ["--families", "knit"], ["--sed", "1"], []])
def test_a_usage_error_writes_nothing(tmp_path: Path, wrong: list[str]) -> None:
    out = [str(tmp_path / "out")] if wrong else []
    with pytest.raises(SystemExit, match="2"):
        main([*out, *wrong])
    assert not (tmp_path / "out").exists()
