"""Real bugs: pairs of releases of small packages, as Harbor tasks, through the whole service.

The tasks are built by `pypi_pairs/make_tasks.py` from source distributions (pinned by sha256); they
need pytest and a few libraries from the host's own packages, as `.ci/run` installs them.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
DSEC = str(Path(sys.executable).parent / "dsec")


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("pairs")
    subprocess.run(
        [sys.executable, str(HERE / "pypi_pairs/make_tasks.py"), str(out / "tasks"), "--cache", str(out / "cache")],
        check=True,
    )
    return out / "tasks"


@pytest.mark.parametrize(("agent", "reward"), [("oracle", 1.0), ("nop", 0.0)])
def test_the_reference_fix_earns_1_and_an_untouched_tree_0(
    tasks: Path, tmp_path: Path, agent: str, reward: float
) -> None:
    ran = subprocess.run(
        [DSEC, "run", str(tasks), "--agent", agent, "--concurrency", "2", "--out", str(tmp_path / "run"), "--json"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr + ran.stdout
    summary = json.loads(ran.stdout)
    assert summary["infra_failures"] == 0
    assert summary["tasks"] == 18
    assert {row["task"]: row["reward_mean"] for row in summary["per_task"]} == dict.fromkeys(
        (row["task"] for row in summary["per_task"]), reward
    )
