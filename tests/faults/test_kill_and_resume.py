"""kill -9 at random moments, of the run alone or of its sandboxes too: it ends as if nothing had happened."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.usefixtures("own_cgroups")
def test_a_run_that_is_killed_at_random_moments_ends_with_the_tokens_of_one_that_was_not(tmp_path: Path) -> None:
    generate = [sys.executable, "-m", "training.curriculum", str(tmp_path / "tasks"), "--count", "16", "--seed", "11"]
    subprocess.run(generate, cwd=ROOT, check=True)
    script = [sys.executable, str(ROOT / "benchmarks/kill_and_resume.py"), "--tasks", str(tmp_path / "tasks")]
    ran = subprocess.run([*script, "--kills", "2", "--json"], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    report = json.loads(ran.stdout)
    assert report["figures"]["good"] == report["figures"]["kills"] == 2
    assert report["figures"]["rollouts"] == 16
    for row in report["rows"]:
        assert row["is_equal"]
        assert (row["tokens_regenerated"], row["commands_run_twice"], row["left"]) == (0, 0, [])
        assert row["kind"] == "tree" or row["commands_replayed"] == 0
